"""A head comes back as it was saved, and what is not one of ours is refused in one line."""

import json
import math

import numpy as np
import pytest
import torch

from ssl_geo.backbones import create_backbone, describe_backbone
from ssl_geo.errors import UserError
from ssl_geo.probing.features import FeatureExtractor
from ssl_geo.probing.heads import HEADS, build_head
from ssl_geo.probing.pixels import LinearOnLayers
from ssl_geo.probing.saved import FORMAT, HeadDescription, load_head, save_head

BANDS = ("B02", "B03", "B04")


def saved(folder, kind="linear", layers=("stages.1",)):
    """A head with drawn weights on a small untrained backbone; it and its extractor."""
    torch.manual_seed(3)
    backbone = create_backbone("convnext_atto", 3, [(32, 32)], depths=[1, 1, 1, 1], dims=[8, 8, 12, 16]).eval()
    extractor = FeatureExtractor(backbone, list(layers), input_size=32)
    if kind == "linear probe":
        head = LinearOnLayers(torch.randn(2, sum(extractor.channels)), torch.randn(2), extractor.channels)
    else:
        head = build_head(kind, extractor.channels, 2, reduction=extractor.reduction)
    description = HeadDescription(
        name=f"{kind} @ somewhere",
        kind=kind,
        layers=tuple(layers),
        channels=tuple(extractor.channels),
        reduction=tuple(extractor.reduction),
        chip_size=32,
        bands=BANDS,
        mean=(0.1, 0.2, 0.3),
        std=(0.1, 0.1, 0.2),
        class_ids=(3, 7),
        class_names=("water", "land"),
        class_colours=((0, 0, 255), (9, 99, 9)),
        checkpoint="runs/x",
        confusion=np.arange(24).reshape(6, 2, 2),
        provenance={"version": "0"},
    )
    save_head(folder, head, description, backbone, describe_backbone(backbone, bands=list(BANDS)))
    return description, extractor, head.eval()


@pytest.mark.parametrize("kind", [*HEADS, "linear probe"])
def test_a_head_gives_the_same_probabilities_again(tmp_path, kind):
    single = kind in ("linear", "patch_linear")
    layers = ("stages.1",) if single else ("stages.3", "stages.2", "stages.1", "stages.0")
    description, extractor, head = saved(tmp_path / "best_head", kind, layers)
    again = load_head(tmp_path / "best_head")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = head(extractor.as_list(images), 32, 32).softmax(dim=1)
        assert torch.equal(again.probabilities(images), expected)
    assert again.description.to_json() == description.to_json()
    np.testing.assert_array_equal(again.description.confusion, description.confusion)
    assert not again.head.training
    assert not again.backbone.training


def test_a_head_of_a_version_that_did_not_enlarge_is_read_as_it_was(tmp_path):
    saved(tmp_path / "best_head")
    damaged(tmp_path / "best_head", lambda content: content.pop("enlarge"))
    assert load_head(tmp_path / "best_head").description.enlarge == 1


def damaged(folder, change):
    path = folder / "head.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format=FORMAT + 1), "format 2"),
        (lambda c: c.pop("format"), "format None"),
        (lambda c: c.pop("bands"), "lacks bands"),
        (lambda c: c.update(bands=None), "not as ssl_geo.probe writes it"),
        (lambda c: c.update(std=[0.1, 0.0, 0.2]), "std must be greater than 0"),
        (lambda c: c.update(enlarge=0), "chip_size times enlarge"),
        (lambda c: c.update(mean=["0.1", 0.1, 0.1]), "mean[0] is '0.1'"),
        (lambda c: c.update(mean=[math.inf, 0.1, 0.1]), "mean[0] is inf"),
        (lambda c: c.update(mean=[math.nan, 0.1, 0.1]), "mean[0] is nan"),
        (lambda c: c.update(chip_size=2**70), "a whole number"),
        (lambda c: c.update(chip_size=2**40), "chip_size times enlarge"),
        (lambda c: c["classes"][0].update(id="1"), "id is '1'"),
        (lambda c: c["classes"][0].update(colour=[1, 2, 999]), "a colour"),
        (lambda c: c.update(provenance={"class_path": "os.system"}), "names code"),
        (lambda c: c.update(enlarge=2), "not of one probe"),
        (lambda c: c.update(mean=[0.1]), "differ in number"),
        (lambda c: c.update(kind="os.system"), "unknown kind"),
        (lambda c: c["classes"].pop(), "confusion"),
        (lambda c: c["classes"][0].update(colour=[1]), "not as ssl_geo.probe writes it"),
        (lambda c: c.update(confusion=[[["x"]]]), "confusion"),
        (lambda c: c.update(confusion=["x" * 2_000_000] + [""] * 100_000), "confusion"),  # terabytes as an array
        (lambda c: c.update(confusion=[1]), "confusion"),
        (lambda c: c.update(channels=[99]), "not of one probe"),
        (lambda c: c.update(kind="fpn"), "not of one probe"),
        (lambda c: c.update(layers=["stages.9"]), "stages.9"),
    ],
)
def test_a_description_that_is_not_ours_is_one_line(tmp_path, change, words):
    saved(tmp_path / "best_head")
    damaged(tmp_path / "best_head", change)
    with pytest.raises(UserError) as error:
        load_head(tmp_path / "best_head")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["head.json", "head.safetensors", "backbone.json", "backbone.safetensors"])
def test_a_torn_or_missing_file_is_named(tmp_path, name):
    saved(tmp_path / "best_head")
    path = tmp_path / "best_head" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=name.split(".")[0]):
        load_head(tmp_path / "best_head")
    path.unlink()
    with pytest.raises(UserError, match=name):
        load_head(tmp_path / "best_head")


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        saved(tmp_path / "file" / "best_head")
