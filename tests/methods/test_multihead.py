"""Many heads on one backbone: one pass an input, views of several sizes, freezing, restoring in parts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_geo.errors import UserError
from ssl_geo.methods.multihead import LoadReport, MultiHeadModel


class Backbone(nn.Module):
    """Features of two layers and their pooled last; remembers the shape of every batch it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4))
        self.deep = nn.Conv2d(4, 6, 2, 2)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.seen.append(tuple(x.shape))
        stem = self.stem(x)
        deep = self.deep(stem)
        return {"stem": stem, "deep": deep, "pooled": deep.mean((2, 3))}


class Sum(nn.Module):
    """A head on several layers that wants the size to end in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, features: list[Tensor], height: int, width: int) -> Tensor:
        maps = [nn.functional.interpolate(f.mean(1, keepdim=True), (height, width)) for f in features]
        return self.weight[0] * maps[0] + self.weight[1] * maps[1]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pooled_model(**kwargs: bool) -> Any:
    heads: dict[str, Any] = {"class": nn.Linear(6, 3), "chain": [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)]}
    routes = {"class": ("images", "pooled"), "chain": ("images", "pooled")}
    return MultiHeadModel(Backbone(), heads, routes, **kwargs)


def test_every_head_sees_its_layers_after_one_pass() -> None:
    backbone = Backbone().eval()
    heads = {"one": nn.Conv2d(6, 2, 1), "other": nn.Conv2d(4, 2, 1), "same": nn.Conv2d(6, 3, 1)}
    model: Any = MultiHeadModel(
        backbone, heads, {"one": ("x", "deep"), "other": ("x", "stem"), "same": ("x", "deep")}
    ).eval()
    images = torch.randn(2, 3, 8, 12)
    features = backbone(images)
    backbone.seen.clear()
    found = model(images)
    assert backbone.seen == [(2, 3, 8, 12)]
    assert list(found) == list(heads)
    torch.testing.assert_close(found["one"], heads["one"](features["deep"]))
    torch.testing.assert_close(found["other"], heads["other"](features["stem"]))
    torch.testing.assert_close(found["same"], heads["same"](features["deep"]))


def test_a_list_of_layers_reaches_a_head_as_a_list_with_the_callers_arguments() -> None:
    model: Any = MultiHeadModel(Backbone(), {"sum": Sum()}, {"sum": ("x", ["deep", "stem"])}).eval()
    images = torch.randn(2, 3, 8, 12)
    features = model.backbone(images)
    assert torch.equal(model({"x": images}, 8, 12)["sum"], Sum()([features["deep"], features["stem"]], 8, 12))


def test_named_inputs_pass_the_backbone_once_each() -> None:
    heads = {"image": nn.Linear(6, 3), "patch": nn.Linear(6, 3), "patch2": nn.Linear(6, 2)}
    routes = {"image": ("images", "pooled"), "patch": ("patches", "pooled"), "patch2": ("patches", "pooled")}
    model: Any = MultiHeadModel(Backbone(), heads, routes).eval()
    batch = {"images": torch.randn(2, 3, 16, 16), "patches": torch.randn(5, 3, 8, 8), "labels": torch.zeros(2)}
    found = model(batch)
    assert sorted(model.backbone.seen) == [(2, 3, 16, 16), (5, 3, 8, 8)]
    torch.testing.assert_close(found["patch2"], heads["patch2"](model.backbone(batch["patches"])["pooled"]))
    assert found["image"].shape == (2, 3)


def test_a_sequence_of_modules_runs_as_one_head() -> None:
    model = pooled_model().eval()
    images = torch.randn(4, 3, 8, 8)
    expected = model.backbone(images)["pooled"]
    for module in model.heads["chain"]:
        expected = module(expected)
    torch.testing.assert_close(model(images)["chain"], expected)


@pytest.mark.parametrize("one_pass_per_view", [False, True])
def test_views_of_several_sizes_go_by_size_and_come_back_in_order(one_pass_per_view: bool) -> None:
    model = pooled_model(one_pass_per_view=one_pass_per_view).eval()
    # Equal widths, unlike heights: the grouping is by both, and reaches past neighbours.
    views = [torch.randn(2, 3, height, 8) for height in (8, 4, 8, 16, 4)]
    expected = torch.cat([model(view)["class"] for view in views])
    model.backbone.seen.clear()
    found = model(views)["class"]
    torch.testing.assert_close(found, expected)
    if one_pass_per_view:
        assert model.backbone.seen == [tuple(view.shape) for view in views]
    else:
        assert model.backbone.seen == [(4, 3, 8, 8), (4, 3, 4, 8), (2, 3, 16, 8)]


def test_maps_of_views_of_several_sizes_are_refused() -> None:
    model: Any = MultiHeadModel(Backbone(), {"map": nn.Conv2d(6, 2, 1)}, {"map": ("x", "deep")})
    assert model([torch.randn(1, 3, 8, 8)] * 2)["map"].shape == (2, 2, 2, 2)
    with pytest.raises(UserError, match="'deep' gives features of 2 sizes"):
        model([torch.randn(1, 3, 8, 8), torch.randn(1, 3, 16, 16)])


def test_a_backbone_of_one_tensor_and_cached_features() -> None:
    plain = MultiHeadModel(nn.Conv2d(3, 4, 1), {"h": nn.Conv2d(4, 2, 1)}, {"h": ("x", "output")})
    assert plain(torch.randn(1, 3, 5, 5))["h"].shape == (1, 2, 5, 5)
    cached = MultiHeadModel(
        nn.Identity(), {"h": nn.Linear(4, 2), "k": nn.Linear(3, 2)}, {"h": ("x", "a"), "k": ("x", "b")}
    )
    features = {"a": torch.randn(5, 4), "b": torch.randn(5, 3)}
    for given in (features, {"x": features}):
        torch.testing.assert_close(cached(given)["k"], cached.heads["k"](features["b"]))


@pytest.mark.parametrize("part", ["backbone", "heads", "all"])
def test_what_is_frozen_does_not_move_and_the_rest_does(part: str) -> None:
    model = pooled_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not any(model.is_frozen(name) for name in ("backbone", "heads", "all"))
    model.freeze(part).train()
    before = copy.deepcopy(model.state_dict())
    loss = sum(output.square().sum() for output in model(torch.randn(8, 3, 8, 8)).values())
    if part != "all":
        loss.backward()
        optimizer.step()
    moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"backbone": {"heads"}, "heads": {"backbone"}, "all": set()}[part]
    assert model.is_frozen("backbone") == (part != "heads")
    assert model.is_frozen("heads") == (part != "backbone")
    assert model.is_frozen() == (part == "all")
    assert loss.requires_grad == (part != "all")


def test_parts_are_saved_and_restored_through_a_file(tmp_path: Path) -> None:
    saved, fresh = pooled_model().eval(), pooled_model().eval()
    torch.save(saved.parts_state(), tmp_path / "parts.pt")
    state = torch.load(tmp_path / "parts.pt", weights_only=True)
    images = torch.randn(2, 3, 8, 8)
    report = fresh.load_parts(state, strict=True)
    assert report.complete
    assert len(report.loaded) == len(fresh.state_dict())
    for name, output in saved(images).items():
        assert torch.equal(output, fresh(images)[name])


def test_one_part_is_restored_and_the_rest_stays() -> None:
    saved, fresh = pooled_model(), pooled_model()
    before = copy.deepcopy(fresh.state_dict())
    report = fresh.load_parts(saved.parts_state(), parts=["class"])
    assert report == LoadReport(loaded=["heads.class.bias", "heads.class.weight"])
    changed = {key for key, value in fresh.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(report.loaded)
    assert torch.equal(fresh.heads["class"].weight, saved.heads["class"].weight)


def other_model() -> Any:
    """Shares the backbone; head `class` of another width, `chain` absent, `new` beside it."""
    heads = {"class": nn.Linear(6, 4), "new": nn.Linear(6, 1, bias=False)}
    return MultiHeadModel(Backbone(), heads, dict.fromkeys(heads, ("images", "pooled")))


def test_the_report_tells_every_key_once() -> None:
    saved, model = pooled_model(), other_model()
    report = model.load_parts(saved.parts_state())
    assert report.loaded == sorted(key for key in model.state_dict() if key.startswith("backbone."))
    assert report.missing == ["heads.new.weight"]
    assert report.mismatched == [("heads.class.bias", (3,), (4,)), ("heads.class.weight", (3, 6), (4, 6))]
    assert report.unexpected == sorted(key for key in saved.state_dict() if key.startswith("heads.chain."))
    assert torch.equal(model.backbone.deep.weight, saved.backbone.deep.weight)
    lines = str(report).splitlines()
    assert lines[0] == "loaded 9 of 12 tensors"
    assert lines[1] == "  missing (1): heads.new.weight"
    assert lines[2].startswith("  unexpected (9): heads.chain.0.bias, ")
    assert lines[2].endswith(", and 1 more")
    assert lines[3].endswith("heads.class.weight [3, 6] in place of [4, 6]")


def test_strict_refuses_before_anything_is_loaded() -> None:
    model = other_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"missing .1.: heads.new.weight"):
        model.load_parts(pooled_model().parts_state(), strict=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.load_parts(pooled_model().parts_state(), parts=["backbone"], strict=True).complete


def test_what_the_user_gave_wrong_is_told() -> None:
    linear = nn.Linear(6, 2)
    with pytest.raises(UserError, match=r"no route for 'clas'.*did you mean class"):
        MultiHeadModel(Backbone(), {"clas": linear}, {"class": ("x", "pooled")})
    for name in ("a.b", "", "keys", "training", "backbone"):
        with pytest.raises(UserError, match="cannot be called"):
            MultiHeadModel(Backbone(), {name: linear}, {name: ("x", "pooled")})
    model: Any = MultiHeadModel(Backbone(), {"h": linear}, {"h": ("x", "poold")})
    with pytest.raises(UserError, match=r"no layer 'poold' for head 'h'; did you mean pooled\?"):
        model(torch.randn(1, 3, 8, 8))
    two = MultiHeadModel(Backbone(), {"h": linear, "k": linear}, {"h": ("image", "pooled"), "k": ("crop", "pooled")})
    with pytest.raises(UserError, match="mapping with image, crop"):
        two(torch.randn(1, 3, 8, 8))
    with pytest.raises(UserError, match=r"no input is called 'image'; did you mean images\?"):
        two({"images": torch.randn(1, 3, 8, 8), "crop": torch.randn(1, 3, 8, 8)})
    with pytest.raises(UserError, match="no part 'head'; did you mean heads"):
        pooled_model().freeze("head")
    with pytest.raises(UserError, match="no part 'clas'; did you mean class"):
        pooled_model().load_parts({"heads": {}}, parts=["clas"])
    with pytest.raises(UserError, match=r"not a state saved by parts.*it holds model"):
        pooled_model().load_parts({"model": {}})
