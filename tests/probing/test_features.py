"""Features of layers named in three ways: equal tensors, grids from the model, nothing left behind."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from ssl_geo.errors import UserError
from ssl_geo.probing.features import FeatureExtractor, auto_layers, list_layers, node_names
from ssl_geo.probing.geometry import channel_axis, token_grid


def vit(**kwargs: object) -> Any:
    arguments = {"embed_dim": 24, "depth": 4, "num_heads": 2, "reg_tokens": 4, "dynamic_img_size": True}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **(arguments | kwargs)).eval()


def swin(**kwargs: object) -> Any:
    arguments = {"embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 2, 2), "img_size": (160, 288)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **(arguments | kwargs)).eval()


def resnet() -> Any:
    return timm.create_model("resnet18", num_classes=0).eval()


def convnext() -> Any:
    return timm.create_model("convnext_atto", num_classes=0, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)).eval()


# model, input size, stages by index, channels, reductions
Case = tuple[Any, tuple[int, int], list[int], list[int], list[int]]

BACKBONES: dict[str, tuple[Callable[[], Any], tuple[int, int], list[int], list[int], list[int]]] = {
    "vit with 4 registers": (vit, (128, 288), [3, 1], [24, 24], [16, 16]),
    "swin at 160x288": (swin, (160, 288), [3, 0], [64, 8], [32, 4]),
    "swin of any size": (lambda: swin(strict_img_size=False), (64, 120), [3, 0], [64, 8], [32, 4]),
    "resnet": (resnet, (64, 96), [4, 2], [512, 128], [32, 8]),
    "convnext": (convnext, (120, 64), [3, 0], [32, 8], [32, 4]),
}


@pytest.fixture(scope="module", params=list(BACKBONES))
def case(request: pytest.FixtureRequest) -> Case:
    make, size, indices, channels, reduction = BACKBONES[request.param]
    torch.manual_seed(0)
    return make(), size, indices, channels, reduction


def test_three_ways_give_the_same_tensor(case: Case) -> None:
    model, size, indices, channels, reduction = case
    names = [list_layers(model)[index].name for index in indices]
    images = torch.randn(2, 3, *size)
    found = {}
    with torch.no_grad():
        reference = model.forward_intermediates(images, indices=sorted(indices), intermediates_only=True)[::-1]
        for way in ("info", "module", "node"):
            extractor = FeatureExtractor(model, names, by=way)
            assert (extractor.way, extractor.channels, extractor.reduction) == (way, channels, reduction)
            found[way] = extractor(images)
            assert list(found[way]) == names
    for way, features in found.items():
        for name, expected, depth, factor in zip(names, reference, channels, reduction, strict=True):
            assert features[name].shape == expected.shape, way
            assert features[name].shape[1] == depth
            # A stride rounds the last place down (ConvNeXt) or up (Swin).
            for places, side in zip(features[name].shape[2:], size, strict=True):
                assert places in (side // factor, -(-side // factor))
            torch.testing.assert_close(features[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [64, 120, 224])
@pytest.mark.parametrize(
    "make",
    [lambda: vit(patch_size=8), lambda: swin(strict_img_size=False), resnet, convnext],
    ids=["vit", "swin", "resnet", "convnext"],
)
def test_one_extractor_serves_every_size(make: Callable[[], Any], size: int) -> None:
    model = make()
    names = auto_layers(model)
    for way in ("module", "node"):
        extractor = FeatureExtractor(model, names, by=way)
        with torch.no_grad():
            found = extractor.as_list(torch.randn(1, 3, size, size))
        for features, factor in zip(found, extractor.reduction, strict=True):
            assert features.shape[2] == features.shape[3]
            assert features.shape[2] in (size // factor, -(-size // factor))


def test_trained_graph_follows_the_mode_of_the_model() -> None:
    model = resnet().train()
    by_node, by_module = (FeatureExtractor(model, ["layer1"], by=way) for way in ("node", "module"))
    assert model.training
    images = torch.randn(2, 3, 32, 32)
    for mode in (True, False, True):
        model.train(mode)
        state = copy.deepcopy(model.state_dict())
        expected = by_module(images)["layer1"]
        moved = model.bn1.running_mean.clone()
        model.load_state_dict(state)
        torch.testing.assert_close(by_node(images)["layer1"], expected)
        torch.testing.assert_close(model.bn1.running_mean, moved)
        assert torch.equal(moved, state["bn1.running_mean"]) is not mode


def test_an_inplace_activation_does_not_change_what_was_taken() -> None:
    model = resnet()
    seen: list[Tensor] = []
    handle = model.bn1.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model(images)
        handle.remove()
        for way in ("module", "node"):
            taken = FeatureExtractor(model, ["bn1"], by=way)(images)["bn1"]
            assert torch.equal(taken, seen[0]), way
    assert (seen[0] < 0).any()


def test_layers_by_index_and_under_names_of_the_callers_choice() -> None:
    model = vit()
    images = torch.randn(1, 3, 64, 64)
    by_index = FeatureExtractor(model, [-1, 0])
    assert (by_index.way, by_index.layers, by_index.names) == (
        "info",
        ["blocks.3", "blocks.0"],
        ["blocks.3", "blocks.0"],
    )
    chosen = FeatureExtractor(model, {"blocks.0": "shallow", 3: "deep"})
    found = chosen(images)
    assert list(found) == ["shallow", "deep"]
    assert torch.equal(found["deep"], by_index.as_list(images)[0])
    assert FeatureExtractor(model, ["3"]).layers == ["blocks.3"]


def test_forward_pre_hook_takes_a_modules_input() -> None:
    model = vit()
    images = torch.randn(1, 3, 64, 64)
    entering = FeatureExtractor(model, ["blocks.2"], hook="forward_pre")
    assert entering.way == "module"
    torch.testing.assert_close(entering(images)["blocks.2"], FeatureExtractor(model, ["blocks.1"])(images)["blocks.1"])
    with pytest.raises(UserError, match="by='module'"):
        FeatureExtractor(model, ["blocks.2"], by="node", hook="forward_pre")


def test_channels_and_reduction_are_told_without_disturbing_the_caller() -> None:
    model = resnet()
    model.layer1.train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    extractor = FeatureExtractor(model, ["layer3.0.conv1", "global_pool"])
    node_names(model)
    assert torch.equal(state, torch.get_rng_state())
    assert model.layer1.training
    assert not model.layer2.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (extractor.channels, extractor.reduction) == ([256, 512], [16, 224])
    assert extractor(torch.randn(2, 3, 64, 64))["global_pool"].shape == (2, 512, 1, 1)


def test_defect_4_a_missing_layer_raises_at_once_with_the_closest_names() -> None:
    model = resnet()
    for way in ("auto", "info", "module", "node"):
        with pytest.raises(UserError, match=r"'layer5'.*did you mean layer\d") as error:
            FeatureExtractor(model, ["layer4", "layer5"], by=way)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not among the model's 5"):
        FeatureExtractor(model, [7])
    with pytest.raises(UserError, match="given twice"):
        FeatureExtractor(model, ["layer4", -1])
    with pytest.raises(UserError, match="no layers asked for"):
        FeatureExtractor(model, [])


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_defect_5_no_hook_and_no_stale_feature_stays() -> None:
    model = resnet()
    with FeatureExtractor(model, ["layer1.0.conv1"]) as extractor:
        assert hooks_on(model) == 0
        extractor(torch.randn(1, 3, 64, 64))
        assert hooks_on(model) == 0
        with pytest.raises(RuntimeError):
            extractor(torch.randn(1, 5, 64, 64))  # a wrong band count fails inside the model
        assert hooks_on(model) == 0
    with pytest.raises(RuntimeError, match="closed"):
        extractor(torch.randn(1, 3, 64, 64))


class Sometimes(nn.Module):
    """Runs its second layer on request alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 1)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x if self.skip else self.second(x)


def test_defect_5_a_layer_that_was_not_run_is_said_and_not_served_from_the_last_call() -> None:
    model = Sometimes()
    extractor = FeatureExtractor(model, ["second"])
    extractor(torch.randn(1, 3, 8, 8))
    model.skip = True
    with pytest.raises(UserError, match="'second' takes no part"):
        extractor(torch.randn(1, 3, 8, 8))


class Tokens(nn.Module):
    """Not timm's: a patch embedding after `prefix` learned tokens, fixed to the sizes of `sides` if given."""

    def __init__(self, patch: int, prefix: int, dim: int, side: int | None = None, declare: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.prefix = nn.Parameter(torch.randn(1, prefix, dim))
        self.body = nn.Identity()
        self.side = side
        if declare:
            self.patch_size = patch

    def forward(self, x: Tensor) -> Tensor:
        if self.side is not None and x.shape[-2:] != (self.side, self.side):
            raise RuntimeError(f"made for {self.side} px")
        maps = self.embed(x).flatten(2).transpose(1, 2)
        tokens: Tensor = self.body(torch.cat([self.prefix.expand(len(x), -1, -1), maps], dim=1))
        return tokens


def test_defect_1_class_and_register_tokens_are_dropped_by_what_the_model_says() -> None:
    images = torch.randn(1, 3, 224, 224)
    features = FeatureExtractor(vit(), ["blocks.0"], by="module")(images)["blocks.0"]
    assert features.shape == (1, 24, 14, 14)
    declared = Tokens(16, 5, 1024, declare=True)
    features = FeatureExtractor(declared, ["body"])(images)["body"]
    torch.testing.assert_close(features, declared.embed(images))
    # 201 tokens of 1024 channels: no grid of 32 x 32 over the channels, a question instead.
    with pytest.raises(UserError, match=r"201 tokens.*patch_size="):
        FeatureExtractor(Tokens(16, 5, 1024), ["body"])
    told = FeatureExtractor(Tokens(16, 5, 1024), ["body"], patch_size=16, prefix_tokens=5)
    assert (told.channels, told.reduction) == ([1024], [16])


@pytest.mark.parametrize("prefix", [0, 1])
def test_defect_1_a_rectangle_of_144_tokens_is_no_square(prefix: int) -> None:
    images = torch.randn(1, 3, 128, 288)
    assert FeatureExtractor(vit(), ["blocks.1"], by="module")(images)["blocks.1"].shape[2:] == (8, 18)
    model = Tokens(16, prefix, 6)
    features = FeatureExtractor(model, ["body"])(images)["body"]
    torch.testing.assert_close(features, model.embed(images))


def test_a_square_only_where_nothing_else_fits() -> None:
    undeclared, declared = nn.Identity(), Tokens(16, 0, 4, declare=True)
    assert token_grid(50, (100, 230), model=undeclared) == (1, 7, 7)
    with pytest.raises(UserError, match="cannot lay the 49 tokens"):
        token_grid(49, (128, 288), model=declared)
    # Later stages of a hierarchical transformer: half the grid, rounded up.
    assert token_grid(5 * 9, (160, 288), model=declared, patch_size=4) == (0, 5, 9)


def test_defect_2_channel_axis_is_not_guessed_from_a_square() -> None:
    # Swin at 512 px: stage 0 is 128 x 128 x 96, deeper than wide never; and a rectangle.
    assert channel_axis((2, 128, 128, 96), (512, 512), "NHWC") == 3
    assert channel_axis((2, 40, 72, 8), (160, 288), "NHWC") == 3
    assert channel_axis((2, 40, 72, 8), (160, 288)) == 3
    assert channel_axis((2, 8, 8, 16), (128, 256)) == 1
    assert channel_axis((2, 16, 16, 64), (256, 256), channels=64) == 3
    # Inception's unpadded convolutions: 35 places of 299 pixels.
    assert channel_axis((2, 192, 35, 35), (299, 299)) == 1
    assert channel_axis((2, 35, 35, 192), (299, 299)) == 3
    assert channel_axis((2, 6, 201, 64), (224, 224)) is None
    # An inner convolution of a channel-last model stays channel-first.
    assert channel_axis((2, 8, 40, 72), (160, 288), "NHWC") == 1


def test_defect_2_swin_where_channels_are_fewer_than_columns() -> None:
    model = swin(img_size=512)
    images = torch.randn(1, 3, 512, 512)
    with torch.no_grad():
        found = FeatureExtractor(model, ["layers.0", "patch_embed.proj"], by="module")(images)
        expected = model.patch_embed(images)
    assert found["layers.0"].shape == (1, 8, 128, 128)
    assert found["patch_embed.proj"].permute(0, 2, 3, 1).shape == expected.shape


def test_the_inside_of_an_attention_is_refused() -> None:
    with pytest.raises(UserError, match=r"'layers.0.blocks.0.attn' puts out .*no map of the image"):
        FeatureExtractor(swin(), ["layers.0.blocks.0.attn"], by="module")
    with pytest.raises(UserError, match="no map of the image"):
        FeatureExtractor(vit(), ["blocks.0.attn.q_norm"], by="module")


def test_tokens_in_order_of_windows_are_refused_and_served_by_index() -> None:
    model = timm.create_model("hiera_tiny_224", num_classes=0, embed_dim=8, num_heads=1, stages=(1, 1, 1, 1)).eval()
    with pytest.raises(UserError, match="by index"):
        FeatureExtractor(model, ["blocks.0"], by="module")
    assert FeatureExtractor(model, [0])(torch.randn(1, 3, 224, 224))["blocks.0"].shape == (1, 8, 56, 56)


def test_defect_3_no_size_is_taken_for_granted() -> None:
    assert FeatureExtractor(vit(img_size=64, dynamic_img_size=False), ["blocks.1"], by="module").reduction == [16]
    assert FeatureExtractor(Tokens(8, 0, 4, side=120), ["body"]).reduction == [8]
    odd = Tokens(8, 0, 4, side=72)
    with pytest.raises(UserError, match=r"made for 72 px.*input_size="):
        FeatureExtractor(odd, ["body"])
    assert FeatureExtractor(odd, ["body"], input_size=72).channels == [4]


class Wrapper(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_channels = 3

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.backbone(x)
        return output


def test_names_inside_a_wrapper_with_and_without_its_prefix() -> None:
    model = Wrapper(vit())
    images = torch.randn(1, 3, 64, 96)
    plain = FeatureExtractor(model.backbone, ["blocks.2"], by="module")(images)["blocks.2"]
    for name in ("blocks.2", "backbone.blocks.2"):
        found = FeatureExtractor(model, {name: "x"})(images)["x"]
        assert torch.equal(found, plain)
    assert FeatureExtractor(vit(), ["backbone.blocks.2"]).layers == ["blocks.2"]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 2, 2)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.sum() > 0:
            x = self.relu(x)
        return x + 1


def test_an_untraceable_model_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match=r"Branching cannot be traced .* by module") as error:
        node_names(Branching())
    assert "\n" not in str(error.value)
    assert FeatureExtractor(Branching(), ["a"]).way == "module"


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if self.training else x * 2


def test_node_names_are_listed_for_train_and_eval_mode() -> None:
    train, evaluation = node_names(Modes())
    assert train == ["x", "a", "b"]
    assert evaluation == ["x", "a", "mul"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="'mul'"):
            FeatureExtractor(Modes(), ["mul"], by="node")
    train, evaluation = node_names(resnet())
    assert "layer4.1.add" in evaluation
    assert "layer4.1.act2" in train


def test_layers_are_listed_with_their_description() -> None:
    listed = list_layers(resnet())
    assert str(listed[4]) == "layer4  (index 4, 512 channels, 1/32)"
    assert "layer1.0.conv1" in [str(layer) for layer in listed]
    assert len({layer.name for layer in listed}) == len(listed)


def test_auto_layers_run_from_coarse_to_fine() -> None:
    assert auto_layers(resnet()) == ["layer3", "layer2", "layer1", "act1"]  # none of a stride of 32
    # Shown at twice the size, its places are half as wide: 16 pixels of the image at most again.
    assert auto_layers(resnet(), enlarge=2) == ["layer4", "layer3", "layer2", "layer1", "act1"]
    convnext = timm.create_model("convnext_atto", num_classes=0)
    assert auto_layers(convnext) == ["stages.3", "stages.2", "stages.1", "stages.0"]  # there are no more
    assert auto_layers(convnext, enlarge=2) == auto_layers(convnext)
    assert auto_layers(vit(depth=12)) == ["blocks.11", "blocks.8", "blocks.5", "blocks.2"]
    assert auto_layers(vit(depth=3)) == ["blocks.2", "blocks.1", "blocks.0"]
    with pytest.raises(UserError, match="--layers"):
        auto_layers(Modes())


def test_gradients_reach_the_model_by_every_way() -> None:
    model = resnet()
    for way in ("info", "module", "node"):
        model.zero_grad()
        FeatureExtractor(model, ["layer2"], by=way)(torch.randn(1, 3, 32, 32))["layer2"].sum().backward()
        assert model.conv1.weight.grad is not None, way
        assert model.conv1.weight.grad.abs().sum() > 0, way


def test_an_extractor_is_saved_once_and_copies_whole() -> None:
    model = resnet()
    extractor = FeatureExtractor(model, ["layer1"], by="node")
    assert len(extractor.state_dict()) == len(model.state_dict())
    twin: Any = copy.deepcopy(extractor)
    with torch.no_grad():
        twin.model.conv1.weight.zero_()
    images = torch.randn(1, 3, 32, 32)
    assert not torch.equal(twin(images)["layer1"], extractor(images)["layer1"])
    torch.testing.assert_close(
        twin(images)["layer1"],
        twin.model.layer1(twin.model.maxpool(twin.model.act1(twin.model.bn1(twin.model.conv1(images))))),
    )


def test_a_node_that_gives_a_tuple_is_its_first_tensor_and_one_without_is_named() -> None:
    """torchvision's attention gives (tokens, None); what gives no tensor in front is told by its name."""
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=2
    ).eval()
    images, layer = torch.randn(2, 3, 32, 32), "encoder.layers.encoder_layer_0.self_attention"
    by_node, by_hook = (FeatureExtractor(model, [layer], by=way)(images)[layer] for way in ("node", "module"))
    assert by_node.shape == (2, 8, 4, 4)
    assert torch.equal(by_node, by_hook)
    for node, kind in (("encoder.layers.encoder_layer_0.eq", "bool"), ("getattr", "int"), ("_assert", "NoneType")):
        with pytest.raises(UserError, match=rf"layer '{node}' puts out {kind}, .*tuple.*--layers"):
            FeatureExtractor(model, [node], by="node")
