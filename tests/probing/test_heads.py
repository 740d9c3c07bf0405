"""The five heads: definitions against references written out here, parameter counts, every size."""

import itertools
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_geo.errors import UserError
from ssl_geo.probing.features import FeatureExtractor, auto_layers
from ssl_geo.probing.heads import HEADS, DPTHead, FPNHead, SegmentationHead, build_head

VIT_S = 384


def parameters(name: str, layers: int) -> int:
    head: Any = build_head(name, [VIT_S] * layers, 10, reduction=[16] * layers)
    return sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize(
    ("name", "layers", "count", "published"),
    [
        ("linear", 1, 2 * 384 + 384 * 10 + 10, 4.6e3),
        ("patch_linear", 1, 2 * 384 + 384 * 2560 + 2560, 986e3),
        ("conv_block", 4, 4 * (384 * 256 + 2 * 256) + 4 * 256 * 10 + 10, 406e3),
        ("fpn", 4, 4 * (2 * 384 + 384 * 256 + 9 * 256 * 256 + 2 * 256) + 4 * 256 * 10 + 10, 2.8e6),
        # Fourteen 3×3 of seven residual units, the first block having one; projections; the classifier.
        ("dpt", 4, 14 * (9 * 256**2 + 256) + 4 * (768 + 384 * 256 + 256) + 9 * 256**2 + 256 + 9 * 2560 + 10, 9.3e6),
    ],
)
def test_parameter_counts_are_those_published(name: str, layers: int, count: int, published: float) -> None:
    assert parameters(name, layers) == count
    digits = {4.6e3: 100, 986e3: 1e3, 406e3: 1e3, 2.8e6: 1e5, 9.3e6: 1e5}[published]
    assert round(count / digits) * digits == pytest.approx(published)


def test_a_head_must_say_how_it_decodes() -> None:
    abstract: Any = SegmentationHead
    with pytest.raises(TypeError, match=r"abstract method '?decode"):
        abstract([4], 2)


def up(maps: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)


def pyramid(channels: tuple[int, ...] = (6, 5, 4, 3), side: int = 2) -> list[Tensor]:
    return [torch.randn(2, d, side * 2**k, side * 2**k + 1) for k, d in enumerate(channels)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_linear_is_a_batch_norm_and_a_matrix_per_layer() -> None:
    features = pyramid((6, 5))
    head: Any = build_head("linear", [6, 5], 3, reduction=[32, 16])
    assert torch.equal(head.layer_weights, torch.ones(2))
    with torch.no_grad():
        head.layer_weights.copy_(torch.tensor([0.5, 2.0]))
    expected = torch.zeros(2, 3, 33, 40)
    for f, weight, (norm, conv) in zip(features, (0.5, 2.0), head.layers, strict=True):
        mean, var = f.mean((0, 2, 3), keepdim=True), f.var((0, 2, 3), unbiased=False, keepdim=True)
        logits = torch.einsum("bdhw,kd->bkhw", (f - mean) / (var + norm.eps).sqrt(), conv.weight[:, :, 0, 0])
        expected += weight * up(logits + conv.bias[:, None, None], 33, 40)
    torch.testing.assert_close(head(features, 33, 40), expected, rtol=1e-4, atol=1e-5)
    assert build_head("linear", [6], 3, reduction=[32]).layer_weights is None


def test_patch_linear_gives_each_token_its_own_pixels() -> None:
    head: Any = build_head("patch_linear", [6, 5], 3, reduction=[4, 2])
    feature = torch.randn(1, 6, 2, 3)
    logits = head([feature, torch.randn(1, 5, 4, 6)], 8, 12)
    for row, column in itertools.product(range(8), range(12)):
        token = F.layer_norm(feature[0, :, row // 4, column // 4], [6])
        for k in range(3):
            out = k * 16 + (row % 4) * 4 + column % 4
            expected = head.to_pixels.weight[out, :, 0, 0] @ token + head.to_pixels.bias[out]
            torch.testing.assert_close(logits[0, k, row, column], expected)


def test_conv_block_concatenates_at_the_finest_size() -> None:
    head: Any = build_head("conv_block", [6, 5], 3, reduction=[32, 16], hidden_dim=7).eval()
    features = pyramid((6, 5))
    hidden = [
        F.silu(F.conv2d(f, p[0].weight) / (1 + 1e-5) ** 0.5) for f, p in zip(features, head.projections, strict=True)
    ]
    hidden[0] = up(hidden[0], *features[1].shape[2:])
    expected = up(F.conv2d(torch.cat(hidden, 1), head.classify.weight, head.classify.bias), 30, 50)
    torch.testing.assert_close(head(features, 30, 50), expected, rtol=1e-4, atol=1e-5)


def test_fpn_sums_from_coarse_to_fine() -> None:
    head: Any = FPNHead([6, 5, 4], 3, hidden_dim=7).eval()
    features = pyramid((6, 5, 4))
    scale = 1 / (1 + 1e-5) ** 0.5  # of a fresh BatchNorm in eval mode
    levels = [F.conv2d(f * scale, lateral[1].weight) for f, lateral in zip(features, head.laterals, strict=True)]
    levels[1] = levels[1] + up(levels[0], *levels[1].shape[2:])
    levels[2] = levels[2] + up(levels[1], *levels[2].shape[2:])
    smooth = [F.relu(F.conv2d(m, s[0].weight, padding=1) * scale) for m, s in zip(levels, head.smooth, strict=True)]
    joined = torch.cat([up(m, *features[2].shape[2:]) for m in smooth], 1)
    expected = up(F.conv2d(joined, head.classify.weight, head.classify.bias), 64, 70)
    torch.testing.assert_close(head(features, 64, 70), expected, rtol=1e-4, atol=1e-5)


def test_dpt_fuses_four_token_grids() -> None:
    head: Any = DPTHead([6] * 4, 3, hidden_dim=8)
    features = [torch.randn(1, 6, 3, 4) for _ in range(4)]

    def unit(x: Tensor, u: Any) -> Tensor:
        inner = F.conv2d(F.relu(x), u.first.weight, u.first.bias, padding=1)
        return x + F.conv2d(F.relu(inner), u.second.weight, u.second.bias, padding=1)

    running: Any = None
    for f, (norm, conv), block in zip(features, head.projections, head.fusions, strict=True):
        normed = F.layer_norm(f.movedim(1, -1), [6], norm.weight, norm.bias).movedim(-1, 1)
        level = up(F.conv2d(normed, conv.weight, conv.bias), 6, 8)
        running = level if running is None else running + unit(level, block.refine_skip)
        running = unit(running, block.refine)
    expected = up(head.classify(up(running, 24, 32)), 48, 64)
    torch.testing.assert_close(head(features, 48, 64), expected, rtol=1e-4, atol=1e-5)


def test_dpt_works_at_no_finer_a_size_than_the_input() -> None:
    head: Any = DPTHead([6, 5, 4, 3], 2, hidden_dim=8)
    sizes: list[torch.Size] = []
    head.classify.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[2:]))
    features = [torch.randn(1, d, s, s) for d, s in zip((6, 5, 4, 3), (2, 4, 8, 16), strict=True)]
    assert head(features, 64, 64).shape == (1, 2, 64, 64)
    assert sizes == [(64, 64)]


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_dpt_takes_four_layers(layers: int) -> None:
    with pytest.raises(UserError, match=f"takes 4 layers.*not {layers}.*--layers"):
        DPTHead([8] * layers, 2)


def test_an_unknown_head_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'convblock'.*did you mean conv_block"):
        build_head("convblock", [8], 2, reduction=[16])
    with pytest.raises(UserError, match="--layers"):
        build_head("linear", [], 2, reduction=[])


BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "vit_tiny_patch16_224",
        {
            "embed_dim": 24,
            "depth": 4,
            "num_heads": 2,
            "reg_tokens": 4,
            "dynamic_img_size": True,
            "dynamic_img_pad": True,
        },
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "strict_img_size": False},
    ),
    "resnet": ("resnet18", {}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_all_heads_on_every_backbone_at_every_size(name: str) -> None:
    architecture, arguments = BACKBONES[name]
    model = timm.create_model(architecture, num_classes=0, **arguments).eval()
    extractor = FeatureExtractor(model, auto_layers(model))
    heads = {
        head: build_head(head, extractor.channels, 5, reduction=extractor.reduction, hidden_dim=8) for head in HEADS
    }
    for height, width in ((64, 64), (120, 120), (224, 224), (160, 288)):
        with torch.no_grad():
            features = extractor.as_list(torch.randn(2, 3, height, width))
        for head in heads.values():
            logits = head(features, height, width)
            assert logits.shape == (2, 5, height, width)
            assert logits.isfinite().all()


@pytest.mark.parametrize("name", HEADS)
def test_every_parameter_of_a_head_learns(name: str) -> None:
    layers = 1 if name == "patch_linear" else 4
    head: Any = build_head(name, [6] * layers, 3, reduction=[4] * layers, hidden_dim=8)
    head([torch.randn(2, 6, 4, 4) for _ in range(layers)], 16, 16).square().sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"dpt"}))
def test_one_chip_with_features_of_one_place_trains_a_head(name: str) -> None:
    """The last batch of an epoch may be one chip, which has no variance: it once ended in a traceback."""
    head = build_head(name, [8], 3, reduction=[4])
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean += 1
            module.running_var *= 4
    feature = torch.randn(1, 8, 1, 1)
    logits = head.train()([feature], 4, 4)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    logits.sum().backward()
    assert all(torch.equal(before[key], value) for key, value in head.state_dict().items())
    assert torch.equal(logits, head.eval()([feature], 4, 4))  # by what it has seen so far
