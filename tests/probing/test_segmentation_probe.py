"""The segmentation probe and its caches: the seed's interface, none of its defects."""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ssl_geo.errors import UserError
from ssl_geo.probing.heads import HEADS
from ssl_geo.probing.probe import CachedFeaturesDataset, GPUTensorCache, SegmentationProbe, compact_labels


class Pyramid(nn.Module):
    """Two stages with BatchNorm, counting its passes; not timm's and of any input size."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(channels, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.stage2 = nn.Sequential(nn.Conv2d(8, 16, 2, 2), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        deep: Tensor = self.stage2(self.stage1(x))
        return deep


LAYERS = ["stage2", "stage1"]


def images_and_labels(count: int = 6, side: int = 20, classes: int = 3) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, side, side, generator=source)
    labels = torch.randint(0, classes, (count, side, side), generator=source)
    labels[:, :2] = 255
    return images, labels


class Dicts(Dataset[dict[str, Tensor]]):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "mask": self.labels[index]}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_constructor_is_the_seeds() -> None:
    parameters = inspect.signature(SegmentationProbe).parameters
    positional = {name: p.default for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert positional == {
        "backbone": inspect.Parameter.empty,
        "layer_names": inspect.Parameter.empty,
        "num_classes": inspect.Parameter.empty,
        "freeze_backbone": True,
        "head_type": "linear",
        "hidden_dim": None,
    }
    probe = SegmentationProbe(Pyramid(), LAYERS, 3)
    assert (probe.channels_list, probe.effective_classes, probe.layer_names) == ([16, 8], 3, LAYERS)
    assert {key.split(".")[0] for key in probe.state_dict()} == {"backbone", "head"}


@pytest.mark.parametrize("head_type", HEADS)
def test_a_loop_written_for_the_seed_trains_a_head(head_type: str) -> None:
    """Extract, move to the device, shuffled batches, ordered batches: as torchgeo-bench's solver does."""
    layers = ["layer4", "layer3", "layer2", "layer1"]
    model = timm.create_model("resnet18", num_classes=0)
    probe = SegmentationProbe(model, layers, num_classes=3, head_type=head_type, hidden_dim=16)
    images, labels = images_and_labels(side=64)
    labels = torch.where(labels == 255, 255, torch.arange(64).gt(31).long())  # two halves, one dark, one bright
    images += 4 * torch.arange(64).gt(31) - 2
    cache = GPUTensorCache.from_cached(probe.extract_segmentation_features(DataLoader(Dicts(images, labels), 4)), "cpu")
    optimizer = torch.optim.AdamW(probe.head.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        for features, masks in cache.shuffled_batches(4):
            loss: Any = F.cross_entropy(probe.head(features, 64, 64), masks, ignore_index=255)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    probe.eval()
    seen = [masks for _, masks in cache.ordered_batches(4)]
    assert torch.equal(torch.cat(seen), labels)
    with torch.no_grad():
        live = probe(images[:4])
        cached = probe.head(next(cache.ordered_batches(4))[0], 64, 64)
    assert live.shape == (4, 3, 64, 64)
    torch.testing.assert_close(live, cached, rtol=0.02, atol=0.02)  # float16 features


@pytest.mark.parametrize("extra_axis", [False, True])
def test_batches_come_as_dicts_or_pairs_with_or_without_a_mask_axis(extra_axis: bool) -> None:
    images, labels = images_and_labels()
    masks = labels[:, None] if extra_axis else labels
    probe = SegmentationProbe(Pyramid(), LAYERS, 3)
    as_dicts = probe.extract_segmentation_features(DataLoader(Dicts(images, masks), 4))
    as_pairs = probe.extract_segmentation_features(DataLoader(TensorDataset(images, masks), 3))
    assert len(as_dicts) == 6
    for one, other in zip(as_dicts.layer_tensors, as_pairs.layer_tensors, strict=True):
        assert one.dtype == torch.float16
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)
    assert torch.equal(as_dicts.masks.long(), labels)
    features, mask = as_dicts[2]
    assert [f.shape for f in features] == [(16, 5, 5), (8, 10, 10)]
    F.cross_entropy(torch.randn(1, 3, 20, 20), mask[None], ignore_index=255)  # int64, as losses want it


def test_no_layer_names_means_the_backbones_output() -> None:
    probe = SegmentationProbe(Pyramid(), [], 3)
    assert (probe.layer_names, probe.channels_list) == (["backbone_output"], [16])
    assert probe(torch.randn(1, 3, 24, 40)).shape == (1, 3, 24, 40)


def test_names_inside_a_wrapper_are_stripped_of_their_prefix() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Pyramid(5)
            self.num_channels = 5

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.backbone(x)
            return output

    probe = SegmentationProbe(Wrapper(), LAYERS, 3)
    assert probe(torch.randn(1, 5, 24, 24)).shape == (1, 3, 24, 24)


def test_defect_1_token_grids_come_from_the_model() -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, embed_dim=24, depth=2, num_heads=2, reg_tokens=4, dynamic_img_size=True
    )
    probe: Any = SegmentationProbe(vit, ["blocks.1"], 3, head_type="patch_linear")
    (feature,) = probe.extract_features(torch.randn(1, 3, 128, 288))
    assert feature.shape == (1, 24, 8, 18)
    assert probe.head.to_pixels.out_channels == 3 * 16**2
    assert probe(torch.randn(1, 3, 128, 288)).shape == (1, 3, 128, 288)


def test_defect_2_swin_is_channel_last_in_a_rectangle() -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=0,
        embed_dim=8,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        img_size=(160, 288),
    )
    probe = SegmentationProbe(swin, ["layers.3", "layers.0"], 3)
    assert probe.channels_list == [64, 8]
    assert [f.shape[1:] for f in probe.extract_features(torch.randn(1, 3, 160, 288))] == [(64, 5, 9), (8, 40, 72)]


@pytest.mark.parametrize("side", [64, 120])
def test_defect_3_the_input_size_is_not_fixed_at_224(side: int) -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, embed_dim=24, depth=1, num_heads=2, patch_size=8, img_size=side
    )
    probe: Any = SegmentationProbe(vit, ["blocks.0"], 3)
    assert probe(torch.randn(1, 3, side, side)).shape == (1, 3, side, side)
    with pytest.raises(AssertionError):
        vit(torch.randn(1, 3, 224, 224))


def test_defect_4_a_missing_layer_raises_in_the_constructor() -> None:
    with pytest.raises(UserError, match=r"'stage3'.*did you mean stage\d"):
        SegmentationProbe(Pyramid(), ["stage3", "stage1"], 3)


def test_defect_5_hooks_and_features_do_not_outlive_a_pass() -> None:
    backbone = Pyramid()
    probes = [SegmentationProbe(backbone, LAYERS, 3) for _ in range(3)]
    for probe in probes:
        probe(torch.randn(1, 3, 16, 16))
        assert probe.hooks == []
    assert not any(module._forward_hooks for module in backbone.modules())


def test_defect_6_labels_are_kept_in_one_byte() -> None:
    images, labels = images_and_labels()
    cache = SegmentationProbe(Pyramid(), LAYERS, 3).extract_segmentation_features(DataLoader(Dicts(images, labels), 4))
    assert cache.masks.dtype == torch.uint8
    assert cache.masks.nbytes == labels.nbytes // 8
    on_device = GPUTensorCache.from_cached(cache, "cpu")
    assert on_device.masks.dtype == torch.uint8
    assert next(on_device.ordered_batches(2))[1].dtype == torch.int64


def test_defect_6_a_cache_larger_than_allowed_is_refused_after_one_batch() -> None:
    images, labels = images_and_labels(count=40)
    backbone = Pyramid()
    probe = SegmentationProbe(backbone, LAYERS, 3)
    loader = DataLoader(Dicts(images, labels), 4)
    exact = probe.extract_segmentation_features(loader).num_bytes
    assert exact == 40 * (2 * (16 * 25 + 8 * 100) + 400)
    probe.extract_segmentation_features(loader, max_bytes=exact)
    backbone.passes = 0
    with pytest.raises(UserError, match=r"features of 40 images take .* GiB.*max_bytes"):
        probe.extract_segmentation_features(loader, max_bytes=exact - 1)
    assert backbone.passes == 1


def test_defect_6_a_loader_of_unknown_length_is_refused_as_it_grows() -> None:
    images, labels = images_and_labels(count=8)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for k in range(0, 8, 2):
            yield images[k : k + 2], labels[k : k + 2]

    with pytest.raises(UserError, match="features of 4 images"):
        SegmentationProbe(Pyramid(), LAYERS, 3).extract_segmentation_features(batches(), max_bytes=3 * 2800)


def test_defect_7_float16_overflow_keeps_the_layer_in_float32() -> None:
    images, labels = images_and_labels()
    backbone: Any = Pyramid()
    with torch.no_grad():
        backbone.stage2[1].weight.mul_(1e5)
    images[:4] *= 1e-4  # the first batch fits
    probe = SegmentationProbe(backbone, LAYERS, 3)
    cache = probe.extract_segmentation_features(DataLoader(Dicts(images, labels), 4))
    assert [tensor.dtype for tensor in cache.layer_tensors] == [torch.float32, torch.float16]
    live = probe.extract_features(images)
    assert live[0].max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(cache.layer_tensors[0][4:], live[0][4:])
    torch.testing.assert_close(cache.layer_tensors[0], live[0], rtol=2e-3, atol=1e-3)
    batch = next(GPUTensorCache.from_cached(cache, "cpu").ordered_batches(6))[0]
    assert all(f.isfinite().all() for f in batch)


@pytest.mark.parametrize("head_type", ["conv_block", "fpn", "dpt"])
def test_defect_8_hidden_dim_reaches_the_head(head_type: str) -> None:
    layers = ["stage2", "stage1", "stage2.0", "stage1.0"]
    sizes = {}
    for hidden_dim in (None, 256, 16):
        probe = SegmentationProbe(Pyramid(), layers, 3, head_type=head_type, hidden_dim=hidden_dim)
        sizes[hidden_dim] = sum(p.numel() for p in probe.head.parameters())
    assert sizes[None] == sizes[256]
    assert sizes[16] < sizes[256] / 10


@pytest.mark.parametrize(("value", "told"), [(3, "labels 3 in 5"), (-1, "labels -1 in 5"), (254, "labels 254 in 5")])
def test_defect_11_labels_that_are_no_class_are_told(value: int, told: str) -> None:
    images, labels = images_and_labels()
    labels[4, 7, :5] = value
    probe = SegmentationProbe(Pyramid(), LAYERS, 3)
    with pytest.raises(UserError, match=rf"{told} of \d+ pixels are outside 0 \.\.\. 2 and not 255"):
        probe.extract_segmentation_features(DataLoader(Dicts(images, labels), 6))


def test_labels_of_other_types_and_shapes() -> None:
    labels = torch.tensor([[[0, 2], [255, 1]]])
    for dtype in (torch.float32, torch.uint8, torch.int16, torch.uint16):
        assert torch.equal(compact_labels(labels.to(dtype), 3), labels.to(torch.uint8))
    assert compact_labels(torch.ones(1, 2, 2, dtype=torch.bool), 2).sum() == 4
    for wrong, told in ((labels + 0.5, "labels 0.5"), (labels * torch.nan, "labels nan"), (labels[0], "shape")):
        with pytest.raises(UserError, match=told):
            compact_labels(wrong, 3)


def test_a_frozen_backbone_does_not_move() -> None:
    """Not even its BatchNorm statistics, though the probe and the backbone are put in train mode."""
    backbone = Pyramid()
    probe = SegmentationProbe(backbone, LAYERS, 3)
    before = copy.deepcopy(backbone.state_dict())
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
    images, labels = images_and_labels()
    probe.train()
    assert probe.head.training
    assert not any(module.training for module in backbone.modules())
    backbone.train()
    for _ in range(2):
        loss: Any = F.cross_entropy(probe(images), labels, ignore_index=255)
        loss.backward()
        optimizer.step()
    assert not any(p.requires_grad for p in backbone.parameters())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_fine_tuning_trains_the_backbone() -> None:
    backbone = Pyramid()
    SegmentationProbe(backbone, LAYERS, 3)  # an earlier probe froze it
    probe = SegmentationProbe(backbone, LAYERS, 3, freeze_backbone=False)
    before = copy.deepcopy(backbone.state_dict())
    images, labels = images_and_labels()
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
    loss: Any = F.cross_entropy(probe.train()(images), labels, ignore_index=255)
    loss.backward()
    optimizer.step()
    moved = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert {"stage1.0.weight", "stage2.1.weight", "stage1.1.running_mean"} <= moved
    assert not any(module.training for module in probe.eval().modules())


def test_features_are_extracted_once_for_a_data_set() -> None:
    images, labels = images_and_labels(count=12)
    backbone = Pyramid()
    probe = SegmentationProbe(backbone, LAYERS, 3)
    backbone.passes = 0
    cache = GPUTensorCache.from_cached(probe.extract_segmentation_features(DataLoader(Dicts(images, labels), 4)), "cpu")
    for _ in range(3):
        for features, _ in cache.shuffled_batches(5):
            probe.head(features, 20, 20)
    assert backbone.passes == 3


def test_shuffled_batches_hold_every_image_once_and_repeat_with_a_seed() -> None:
    cache = CachedFeaturesDataset([torch.arange(7.0)[:, None, None, None]], torch.arange(7)[:, None, None].byte())
    tensors = GPUTensorCache.from_cached(cache, "cpu")
    orders = []
    for seed_ in (0, 0, 1):
        batches = list(tensors.shuffled_batches(3, torch.Generator().manual_seed(seed_)))
        assert [len(masks) for _, masks in batches] == [3, 3, 1]
        for features, masks in batches:
            assert torch.equal(features[0].flatten(), masks.flatten().float())
        orders.append(torch.cat([masks.flatten() for _, masks in batches]))
    assert torch.equal(orders[0].sort().values, torch.arange(7))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_what_the_user_gave_wrong_is_told() -> None:
    with pytest.raises(UserError, match="did you mean linear"):
        SegmentationProbe(Pyramid(), LAYERS, 3, head_type="linar")
    with pytest.raises(UserError, match="not 2: name four"):
        SegmentationProbe(Pyramid(), LAYERS, 3, head_type="dpt")
    with pytest.raises(UserError, match="300 classes: 1 to 255"):
        SegmentationProbe(Pyramid(), LAYERS, 300)
    probe = SegmentationProbe(Pyramid(), LAYERS, 3)
    with pytest.raises(UserError, match="gave no batch"):
        probe.extract_segmentation_features([])
    (small, large) = (images_and_labels(side=16), images_and_labels(side=24))
    with pytest.raises(UserError, match="images of one size"):
        probe.extract_segmentation_features([small, large])
    with pytest.raises(UserError, match="cannot be kept as"):
        probe.extract_segmentation_features([small], cache_dtype=torch.int8)
    with pytest.raises(UserError, match="features of 3 images, labels of 2"):
        CachedFeaturesDataset([torch.zeros(3, 1, 2, 2)], torch.zeros(2, 4, 4))
