"""Backbones of every kind for bands and view sizes; out to plain timm and back; nothing is unpickled."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_geo.backbones import (
    create_backbone,
    describe_backbone,
    drop_unused_tokens,
    export_backbone,
    is_transformer,
    load_backbone,
    outline,
    required_multiple,
    untrained,
)
from ssl_geo.errors import UserError
from ssl_geo.weights import adapt_input_weights

TEN = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
VIT = ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3})
SWIN = ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 3, 4]})
KINDS = {
    "vit": VIT,
    "vit_registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}),
    "resnet": ("resnet18", {}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
    "swin": SWIN,
    "xcit": ("xcit_nano_12_p8_224", {"depth": 2, "embed_dim": 32, "num_heads": 2}),
    "eva": ("eva02_tiny_patch14_224", {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(kind: str = "vit", channels: int = 10, sizes: tuple[tuple[int, int], ...] = ((32, 32), (16, 16))) -> nn.Module:
    name, arguments = KINDS[kind]
    return create_backbone(name, channels, sizes, **arguments)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


# Making


@pytest.mark.parametrize(
    ("name", "transformer"),
    [
        *((name, True) for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "levit_128s")),
        *((name, True) for name in ("twins_svt_small", "eva02_tiny_patch14_224", "convit_tiny")),
        *((name, False) for name in ("resnet10t", "seresnet50", "skresnet18", "convnext_atto", "efficientnet_b0")),
    ],
)
def test_what_attends_is_a_transformer(name: str, transformer: bool) -> None:
    """Most hierarchical transformers were once taken for convolutional nets, which bear eight times the rate."""
    assert is_transformer(outline(name)) is transformer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [((64, 64), (32, 32)), ((64, 96), (40, 32)), ((120, 120), (56, 56))])
def test_views_of_all_sizes_become_one_vector_each(kind: str, sizes: tuple[tuple[int, int], ...]) -> None:
    backbone = make(kind, sizes=sizes)
    assert backbone.training
    backbone.eval()
    for height, width in sizes:
        assert backbone(torch.randn(2, 10, height, width)).shape == (2, backbone.num_features)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("vit", {}),
        ("vit", {"qk_norm": True, "scale_attn_norm": True, "init_values": 0.1, "qkv_bias": False}),
        ("vit_registers", {"drop_path_rate": 0.5, "proj_drop_rate": 0.2}),
    ],
    ids=["vit", "norms", "registers"],
)
def test_the_class_token_alone_is_the_same_embedding_with_the_same_gradients(kind: str, more: dict) -> None:
    name, arguments = KINDS[kind]
    whole = create_backbone(name, 4, [(32, 32)], **arguments, **more)
    alone = create_backbone(name, 4, [(32, 32)], checkpointing=True, **arguments, **more)
    alone.load_state_dict(whole.state_dict())
    assert drop_unused_tokens(alone)
    alone = copy.deepcopy(alone).double()  # copied, as DINO's teacher is
    whole.double()
    names, seen = list(whole.state_dict()), []
    alone.blocks[-1].register_forward_hook(lambda _, given, output: seen.append((given[0].shape, output.shape)))
    view, outputs = torch.randn(3, 4, 32, 32, dtype=torch.float64), []
    for backbone in (whole, alone):
        for module in backbone.modules():  # draws of dropout differ with the shape, those of drop path do not
            if isinstance(module, nn.Dropout):
                module.eval()
        torch.manual_seed(1)
        outputs.append(backbone(view))
        (outputs[-1] * torch.randn(3, 48)).sum().backward()
    torch.testing.assert_close(*outputs)
    for a, b in zip(whole.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12)
    assert seen[0][0][1] > 16
    assert seen[0][1] == (3, 1, 48)
    assert list(alone.state_dict()) == names


@pytest.mark.parametrize(("kind", "more"), [("vit", {"global_pool": "avg"}), ("resnet", {}), ("swin", {}), ("eva", {})])
def test_a_backbone_that_embeds_otherwise_keeps_all_its_tokens(kind: str, more: dict) -> None:
    name, arguments = KINDS[kind]
    backbone = create_backbone(name, 4, [(32, 32)], **arguments, **more).eval()
    view = torch.randn(2, 4, 32, 32)
    expected = backbone(view)
    assert not drop_unused_tokens(backbone)
    assert torch.equal(backbone(view), expected)


@pytest.mark.parametrize("kind", ["vit", "resnet", "swin"])
def test_activations_computed_again_give_the_same_gradients_from_less_memory(kind: str) -> None:
    name, arguments = KINDS[kind]
    sizes = ((64, 64), (32, 32))
    arguments = {**arguments, "drop_path_rate": 0.5}  # what is drawn is drawn again
    keeping = create_backbone(name, 4, sizes, **arguments)
    again = create_backbone(name, 4, sizes, checkpointing=True, **arguments)
    again.load_state_dict(keeping.state_dict())
    kept = []
    for backbone in (keeping, again):
        saved: list[int] = []

        def keep(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.nbytes)
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            embedding = torch.cat([backbone(torch.randn(4, 4, *size)) for size in sizes])
        kept.append(sum(saved))
        embedding.square().sum().backward()
    for a, b in zip(keeping.parameters(), again.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
    assert kept[1] < kept[0] / 2
    assert again.timm == keeping.timm  # what is exported says nothing of it


def test_a_model_that_cannot_compute_activations_again_is_refused() -> None:
    assert "--backbone.checkpointing: dla46_c" in refusal(
        lambda: create_backbone("dla46_c", 4, [(32, 32)], checkpointing=True)
    )


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_gradients_reach_every_parameter_from_views_of_both_sizes(kind: str) -> None:
    backbone = make(kind, sizes=((64, 64), (32, 32)))
    for size in (64, 32):
        backbone.zero_grad()
        backbone(torch.randn(2, 10, size, size)).square().sum().backward()
        unmoved = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
        assert unmoved == []


def test_position_embeddings_are_the_largest_views_and_interpolated_for_others() -> None:
    backbone = make("vit", sizes=((32, 32), (64, 48))).eval()
    assert backbone.pos_embed.shape == (1, 1 + 8 * 6, 48)
    small = torch.randn(1, 10, 32, 32)
    before = backbone(small)
    with torch.no_grad():
        grid = backbone.pos_embed[:, 1:].unflatten(1, (8, 6)).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(grid, (4, 4), mode="bicubic", antialias=True)
    square = make("vit", sizes=((32, 32),)).eval()
    state = backbone.state_dict()
    state["pos_embed"] = torch.cat([backbone.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], 1).detach()
    square.load_state_dict(state)
    torch.testing.assert_close(square(small), before)


def test_the_users_arguments_go_first() -> None:
    name, arguments = VIT
    backbone = create_backbone(name, 4, [(32, 32)], img_size=64, drop_path_rate=0.1, **arguments)
    assert backbone.pos_embed.shape[1] == 1 + 8 * 8
    assert backbone.timm["model_args"]["img_size"] == 64


@pytest.mark.parametrize(
    ("kind", "multiple"), [("vit", 8), ("vit_registers", 8), ("swin", 4), ("resnet", 1), ("convnext", 1), ("xcit", 8)]
)
def test_required_multiple_is_the_patch_where_patches_do_not_overlap(kind: str, multiple: int) -> None:
    name, arguments = KINDS[kind]
    assert required_multiple(outline(name, **arguments)) == multiple
    assert required_multiple(outline("pvt_v2_b0")) == 1  # its embedding has kernels of 7 pixels, but with stride 4
    sizes = ((multiple * 9, multiple * 7) if multiple > 1 else (45, 37),)
    assert make(kind, sizes=sizes).eval()(torch.randn(1, 10, *sizes[0])).ndim == 2


def test_a_size_that_the_patch_does_not_divide_names_the_sizes_that_do() -> None:
    said = refusal(lambda: make("vit", sizes=((64, 64), (32, 30))))
    for words in ("32×30", "8-pixel patch", "24 or 32", "--views.global_size", "--views.local_size"):
        assert words in said


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("convnext_atto", [(64, 64), (16, 16)], "16×16"),  # less than its stride of 32
        ("beit_base_patch16_224", [(64, 64), (32, 32)], "32×32"),  # one size alone
        ("maxvit_pico_rw_256", [(64, 64), (32, 32)], "32×32"),  # windows
    ],
)
def test_a_size_that_a_backbone_cannot_take_is_named(name: str, sizes: list[tuple[int, int]], words: str) -> None:
    depth = {"depth": 1} if name.startswith("beit") else {}
    said = refusal(lambda: create_backbone(name, 3, sizes, **depth))
    assert words in said
    assert "--views.local_size" in said


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("resnet1888", {}, "resnet18"),
        ("vit_tiny", {}, "vit_tiny_patch16_224"),
        ("hf-hub:timm/resnet18", {}, "not a model of timm"),
        ("resnet18.no_such_weights", {}, "no_such_weights"),
        ("vit_tiny_patch16_224", {"pach_size": 8}, "patch_size"),
        ("vit_tiny_patch16_224", {"embed_dim": 50}, "divisible"),
        ("resnet18", {"num_classes": 5}, "num_classes"),
        ("resnet18", {"checkpoint_path": "x.pth"}, "checkpoint_path"),
        ("resnet18", {"pretrained": True}, "pretrained"),
        ("resnet18", {"global_pool": ""}, "global_pool"),
    ],
)
def test_names_and_arguments_that_cannot_be(name: str, arguments: dict, words: str) -> None:
    assert words in refusal(lambda: create_backbone(name, 3, [(32, 32)], **arguments))


# The input layer


def test_each_band_gets_its_own_filter_or_the_mean_and_the_response_is_kept() -> None:
    weight = torch.randn(5, 3, 2, 2)
    red, green, blue = weight.unbind(1)
    found = adapt_input_weights(weight, TEN)
    assert found.shape == (5, 10, 2, 2)
    for position, expected in enumerate([blue, green, red] + [(red + green + blue) / 3] * 7):
        torch.testing.assert_close(found[:, position], expected * 3 / 10)
    torch.testing.assert_close(found.sum(1), weight.sum(1))  # response to an image alike in all bands
    torch.testing.assert_close(adapt_input_weights(weight, ["B08", "B11"]).sum(1), weight.sum(1))
    assert torch.equal(adapt_input_weights(weight, ["B04", "B03", "B02"]), weight)


def test_the_response_to_alike_bands_is_timms_and_better_where_it_loses_some() -> None:
    from timm.models._manipulate import adapt_input_conv

    weight = torch.randn(5, 3, 2, 2)
    nine = TEN[:9]
    torch.testing.assert_close(adapt_input_weights(weight, nine).sum(1), adapt_input_conv(9, weight.clone()).sum(1))
    assert not torch.allclose(adapt_input_conv(10, weight.clone()).sum(1), weight.sum(1))


def test_other_bands_are_carried_over_by_name() -> None:
    weight = torch.randn(5, 2, 2, 2)
    found = adapt_input_weights(weight, ["B08", "B04", "B02"], ["B04", "B08"])
    expected = torch.stack([weight[:, 1], weight[:, 0], weight.mean(1)], 1) * 2 / 3
    torch.testing.assert_close(found, expected)


# Starting from weights


def saved(model: nn.Module, path: Path, key: str | None = None) -> Path:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({key: state, "epoch": 3} if key else state, path)
    return path


@pytest.mark.parametrize(("file", "key"), [("w.safetensors", None), ("w.pth", None), ("w.pt", "state_dict")])
def test_rgb_weights_of_a_classifier_go_to_named_bands(tmp_path: Path, file: str, key: str | None) -> None:
    rgb = timm.create_model("resnet18", num_classes=7)
    path = saved(rgb, tmp_path / file, key)
    backbone = create_backbone("resnet18", 10, [(32, 32)], weights=path, bands=TEN)
    torch.testing.assert_close(backbone.conv1.weight, adapt_input_weights(rgb.conv1.weight, TEN))
    assert torch.equal(backbone.layer4[1].conv2.weight, rgb.layer4[1].conv2.weight)
    gray = torch.randn(2, 1, 32, 32)
    rgb.reset_classifier(0)
    found, expected = (m.eval()(gray.expand(-1, c, -1, -1)) for m, c in ((backbone, 10), (rgb, 3)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # timm's interpolation of Swin's position biases
@pytest.mark.parametrize("kind", ["vit", "swin", "convnext", "xcit"])
def test_weights_of_every_kind_fit_other_bands(tmp_path: Path, kind: str) -> None:
    name, arguments = KINDS[kind]
    given = {**arguments, **({"img_size": 32} if kind in ("vit", "swin") else {})}
    rgb = timm.create_model(name, num_classes=5, **given)
    path = saved(rgb, tmp_path / "w.safetensors")
    backbone = create_backbone(name, 10, [(64, 64), (32, 32)], weights=path, bands=TEN, **arguments).eval()
    rgb.reset_classifier(0)
    gray = torch.randn(2, 1, 32, 32)
    if kind in ("convnext", "xcit"):  # nothing depends on the size that a network was made for
        expected = rgb.eval()(gray.expand(-1, 3, -1, -1))
        torch.testing.assert_close(backbone(gray.expand(-1, 10, -1, -1)), expected, rtol=1e-4, atol=1e-5)
    else:
        body = "blocks.1.mlp.fc1.weight" if kind == "vit" else "layers.0.blocks.0.mlp.fc1.weight"
        assert torch.equal(backbone.state_dict()[body], rgb.state_dict()[body])


def test_patches_and_positions_are_resampled(tmp_path: Path) -> None:
    name, arguments = VIT
    rgb = timm.create_model(name, img_size=64, **{**arguments, "patch_size": 16})
    path = saved(rgb, tmp_path / "w.pth")
    backbone = create_backbone(name, 10, [(64, 64)], weights=path, bands=TEN, **arguments)
    assert backbone.patch_embed.proj.weight.shape == (48, 10, 8, 8)
    assert backbone.pos_embed.shape == (1, 65, 48)
    assert torch.equal(backbone.blocks[0].attn.qkv.weight, rgb.blocks[0].attn.qkv.weight)


def test_swins_position_tables_are_resized_to_smaller_windows(tmp_path: Path) -> None:
    name, arguments = SWIN
    table = "layers.{}.blocks.0.attn.relative_position_bias_table"
    rgb = timm.create_model(name, **arguments)  # windows of 7 in all stages
    with torch.no_grad():
        rgb.get_parameter(table.format(2)).copy_(torch.tensor([1.0, -2.0, 3.0]))
        rgb.get_parameter(table.format(3)).copy_(torch.arange(169.0).view(169, 1).expand(169, 4))
    path = saved(rgb, tmp_path / "w.safetensors")
    backbone = create_backbone(name, 10, [(64, 64)], weights=path, bands=TEN, **arguments)  # grids 16, 8, 4 and 2
    sides = [math.isqrt(len(backbone.get_parameter(table.format(stage)))) for stage in range(4)]
    assert sides == [2 * window - 1 for window in (7, 7, 4, 2)]
    even, slope = (backbone.get_parameter(table.format(stage)).detach() for stage in (2, 3))
    torch.testing.assert_close(even, torch.tensor([1.0, -2.0, 3.0]).expand(49, 3))
    assert slope[4].tolist() == pytest.approx([84.0] * 4)  # no distance stays no distance
    assert (slope.diff(dim=0) > 0).all()  # and the order of distances theirs


@pytest.mark.parametrize("place", ["", "backbone.safetensors", "checkpoint.pt"])
def test_an_own_backbone_says_its_bands(tmp_path: Path, place: str) -> None:
    first = create_backbone("resnet18", 3, [(32, 32)])
    given, bands = ["B08", "B11", "B03"], ["B03", "B08", "B12"]
    description = describe_backbone(first, bands=given)
    export_backbone(tmp_path, first, description)
    torch.save({"backbone": first.state_dict(), "backbone_description": description}, tmp_path / "checkpoint.pt")
    second = create_backbone("resnet18", 3, [(32, 32)], weights=tmp_path / place, bands=bands)
    torch.testing.assert_close(second.conv1.weight, adapt_input_weights(first.conv1.weight, bands, given))
    assert not torch.allclose(second.conv1.weight, first.conv1.weight)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    twelve = saved(timm.create_model("resnet18", in_chans=12, num_classes=0), tmp_path / "twelve.pth")
    said = refusal(lambda: create_backbone("resnet18", 10, [(32, 32)], weights=twelve, bands=TEN))
    assert "12 channels" in said
    assert "wanted are 10" in said
    same = create_backbone("resnet18", 12, [(32, 32)], weights=twelve)
    assert torch.equal(same.conv1.weight, torch.load(twelve, weights_only=True)["conv1.weight"])
    other = saved(timm.create_model("resnet34"), tmp_path / "other.pth")
    said = refusal(lambda: create_backbone("resnet18", 10, [(32, 32)], weights=other, bands=TEN))
    assert "not of a resnet18" in said
    assert "--backbone.weights" in said
    for file in ("no.pth", "no.safetensors"):
        said = refusal(lambda name=file: create_backbone("resnet18", 3, [(32, 32)], weights=tmp_path / name))
        assert "does not exist" in said
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    said = refusal(lambda: create_backbone("resnet18", 3, [(32, 32)], weights=tmp_path / "empty.pt"))
    assert "no named tensors" in said


# Out and back

PLAIN_TIMM = """
import json, sys, timm, torch
from pathlib import Path
from safetensors.torch import load_file
sys.modules["ssl_geo"] = None
for folder in map(Path, sys.argv[1:]):
    j = json.loads((folder / "backbone.json").read_text())
    model = timm.create_model(j["architecture"], **j["model_args"]).eval()
    model.load_state_dict(load_file(folder / "backbone.safetensors"))
    images = torch.load(folder / "images.pt", weights_only=True)
    with torch.no_grad():
        torch.save([model(i) for i in images], folder / "embeddings.pt")
"""


def test_plain_timm_in_a_fresh_interpreter_gives_the_same_embeddings(tmp_path: Path) -> None:
    expected: dict[Path, list[Tensor]] = {}
    sizes = ((64, 48), (32, 32))
    for kind in KINDS:
        folder = tmp_path / kind
        folder.mkdir()
        backbone = make(kind, sizes=sizes)
        if kind == "resnet":
            backbone(torch.randn(4, 10, 64, 48) + 1)  # statistics of its own
        images = [torch.randn(2, 10, *size) for size in sizes]
        export_backbone(folder, backbone, describe_backbone(backbone, bands=TEN))
        torch.save(images, folder / "images.pt")
        with torch.no_grad():
            expected[folder] = [backbone.eval()(i) for i in images]
    command = [sys.executable, "-c", PLAIN_TIMM, *map(str, expected)]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for folder, embeddings in expected.items():
        found = torch.load(folder / "embeddings.pt", weights_only=True)
        torch.testing.assert_close(found, embeddings, msg=lambda m, n=folder.name: f"{n}: {m}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as pretraining leaves it."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    backbone = make("vit")
    description = describe_backbone(backbone, bands=TEN, mean=[0.1] * 10, std=[0.2] * 10, gsd=10.0)
    export_backbone(folder, backbone, description)
    content = {"step": 4, "backbone": backbone.state_dict(), "backbone_description": description}
    torch.save(content, folder / "checkpoints" / "step-4.pt")
    return folder


@pytest.mark.parametrize("place", ["", "backbone.safetensors", "backbone.json", "checkpoints/step-4.pt"])
def test_a_backbone_comes_back_from_a_run_or_a_checkpoint(run: Path, place: str) -> None:
    backbone = load_backbone(run / place)
    assert not backbone.training
    assert backbone.description["bands"] == TEN
    assert backbone.description["mean"] == [0.1] * 10
    torch.manual_seed(0)
    images = torch.randn(2, 10, 16, 16)
    torch.testing.assert_close(backbone(images), load_backbone(str(run))(images), rtol=0, atol=0)
    export_backbone(run, backbone, describe_backbone(backbone, bands=TEN))
    assert torch.equal(load_backbone(run)(images), backbone(images))


def test_export_is_whole_or_not_at_all(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def torn(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssl_geo.backbones.save_file", torn)
    backbone = make("vit")
    assert "No space left" in refusal(lambda: export_backbone(run, backbone, describe_backbone(backbone)))
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_torn_files_and_files_from_elsewhere_are_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step-4.pt"
    whole = checkpoint.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        checkpoint.write_bytes(whole[:length])
        assert str(checkpoint) in refusal(lambda: load_backbone(checkpoint))
    torch.save({"weights": torch.zeros(2)}, checkpoint)
    assert "not from ssl_geo.pretrain" in refusal(lambda: load_backbone(checkpoint))
    torch.save(torch.zeros(2), checkpoint)
    assert "holds a Tensor" in refusal(lambda: load_backbone(checkpoint))

    weights = run / "backbone.safetensors"
    whole = weights.read_bytes()
    for length in (0, 10, len(whole) // 2):
        weights.write_bytes(whole[:length])
        assert str(weights) in refusal(lambda: load_backbone(run))
    save_file({"norm.weight": torch.zeros(3)}, weights)
    assert "do not fit" in refusal(lambda: load_backbone(run))
    weights.write_bytes(whole)

    described = run / "backbone.json"
    text = described.read_text()
    for content in (text[: len(text) // 2], "[]", "{}", '{"architecture": "no_such_net", "model_args": {}}'):
        described.write_text(content)
        refusal(lambda: load_backbone(run))
    described.unlink()
    assert "backbone.json" in refusal(lambda: load_backbone(run))
    assert "does not exist" in refusal(lambda: load_backbone(tmp_path / "nowhere"))


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("write", [lambda trap, path: path.write_bytes(pickle.dumps(trap)), torch.save])
def test_a_pickle_is_never_opened(tmp_path: Path, write: Callable[[object, Path], object]) -> None:
    path, sprung = tmp_path / "checkpoint.pt", tmp_path / "sprung"
    write({"backbone": {}, "backbone_description": Trap(sprung)}, path)
    assert str(path) in refusal(lambda: load_backbone(path))
    refusal(lambda: create_backbone("resnet18", 3, [(32, 32)], weights=path))
    assert not sprung.exists()


def test_a_description_cannot_name_other_files(run: Path) -> None:
    described = run / "backbone.json"
    whole = described.read_text()
    for bad in ({"checkpoint_path": "/tmp/x.pth"}, {"pretrained": True}, {"pretrained_cfg": {"file": "/tmp/x"}}):
        content = json.loads(whole)
        content["model_args"] |= bad
        described.write_text(json.dumps(content))
        assert next(iter(bad)) in refusal(lambda: load_backbone(run))


# Rivals


def test_an_untrained_rival() -> None:
    backbone = load_backbone("random:resnet18", bands=TEN)
    assert not backbone.training
    assert backbone(torch.randn(1, 10, 40, 32)).shape == (1, 512)
    assert backbone.description["bands"] == TEN
    assert backbone.description["weights"] == "random"
    assert "mean" not in backbone.description
    assert load_backbone("random:vit_tiny_patch16_224")(torch.randn(1, 3, 64, 32)).shape == (1, 192)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "vit_tiny_patch16_224"])
def test_the_untrained_twin_has_the_weights_that_a_run_of_its_seed_started_from(name: str) -> None:
    torch.manual_seed(3)
    started = create_backbone(name, 10, [(64, 64), (32, 32)])
    state = torch.random.get_rng_state()
    twin, other = untrained(started, 3).state_dict(), untrained(started, 4).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, twin[key]) for key, value in started.state_dict().items())
    assert not all(torch.equal(value, other[key]) for key, value in started.state_dict().items())


def test_a_rival_with_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    published, create = timm.create_model("resnet18", num_classes=0), timm.create_model

    def fetch(name: str, pretrained: bool = False, **arguments: object) -> nn.Module:
        return published if pretrained else create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", fetch)
    rgb, ten = load_backbone("timm:resnet18"), load_backbone("timm:resnet18", bands=TEN)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(rgb(images), published.eval()(images))
    assert rgb.description["bands"] == ["B04", "B03", "B02"]
    torch.testing.assert_close(ten.conv1.weight, adapt_input_weights(published.conv1.weight, TEN))


def test_published_weights_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def fetch(name: str, pretrained: bool = False, **arguments: object) -> nn.Module:
        if pretrained:
            raise FileNotFoundError("An error happened while trying to locate the file on the Hub")
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", fetch)
    assert "random:resnet18" in refusal(lambda: load_backbone("timm:resnet18"))
    assert "resnet18" in refusal(lambda: load_backbone("timm:resnet1888"))


def test_an_argument_of_timm_named_like_ours_reaches_timm() -> None:
    narrow = create_backbone("resnet18", 3, [(64, 64)], channels=(16, 24, 32, 40)).eval()
    assert narrow(torch.zeros(1, 3, 64, 64)).shape == (1, 40)
