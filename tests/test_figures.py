"""What figures show is what the arrays hold; drawn, they are not empty."""

import io
import re
import xml.etree.ElementTree as ET

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from ssl_geo import figures
from ssl_geo.backbones import create_backbone
from ssl_geo.class_token import class_token_attention
from ssl_geo.errors import UserError

BANDS = ("B02", "B03", "B04", "B08", "B8A", "B12")
RNG = np.random.default_rng(0)
IMAGE = RNG.gamma(2, 0.1, (6, 24, 20)).astype(np.float32)
VALID = np.ones((24, 20), np.bool_)
VALID[:6, :5] = False


def pixels(figure) -> np.ndarray:
    """The figure as it is rendered, (H, W, 3)."""
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=80)
    written.seek(0)
    return matplotlib.image.imread(written)[..., :3]


def assert_drawn(figure) -> None:
    assert len(np.unique(pixels(figure).reshape(-1, 3), axis=0)) > 10
    ET.fromstring(figures.as_svg(figure))  # well formed


def test_limits_are_the_percentiles_of_all_valid_pixels_together():
    holed = IMAGE.copy()
    holed[:, ~VALID] = 99
    got = figures.limits([holed, IMAGE], [VALID, np.ones_like(VALID)], (5, 90))
    for band in range(6):
        together = np.concatenate([IMAGE[band][VALID], IMAGE[band].ravel()])
        assert got[band] == pytest.approx(np.percentile(together, (5, 90)))


def test_nothing_valid_or_a_constant_band_still_has_limits():
    assert figures.limits([IMAGE], [np.zeros_like(VALID)]).tolist() == [[0, 1]] * 6
    assert figures.limits([np.full((1, 4, 4), 0.3)]) == pytest.approx(np.array([[-0.2, 0.8]]))


@given(st.floats(-1, 1), st.floats(0.01, 2))
def test_stretch_keeps_the_order_and_ends_at_the_limits(low, width):
    ramp = np.linspace(low - 1, low + width + 1, 50)[None, None]
    got = figures.stretch(ramp, np.array([[low, low + width]]))[0, 0]
    assert (np.diff(got) >= 0).all()
    assert (got[ramp[0, 0] <= low] == 0).all()
    assert (got[ramp[0, 0] >= low + width + 1e-9] == 1).all()
    assert figures.stretch(np.full((1, 1, 1), low + width / 2), np.array([[low, low + width]])).item() == pytest.approx(
        0.5, abs=1e-5
    )


@pytest.mark.parametrize(
    ("name", "channels"), [("true colour", (2, 1, 0)), ("colour infrared", (3, 2, 1)), ("SWIR", (5, 4, 2))]
)
def test_composites_by_name_take_their_bands_wherever_they_are(name, channels):
    got = figures.composite(IMAGE, BANDS, name, valid=VALID)
    order = RNG.permutation(6)
    again = figures.composite(IMAGE[order], [BANDS[k] for k in order], name, valid=VALID)
    np.testing.assert_array_equal(got, again)
    for colour, channel in enumerate(channels):
        low, high = np.percentile(IMAGE[channel][VALID], (2, 98))
        expected = np.clip((IMAGE[channel] - low) / (high - low), 0, 1)
        np.testing.assert_allclose(got[..., colour][VALID], expected[VALID], atol=1e-5)
    np.testing.assert_array_equal(got[..., 3], VALID)


def test_what_cannot_be_shown_is_one_line():
    with pytest.raises(UserError, match=r"no band B12 among B02 B03"):
        figures.composite(IMAGE[:2], BANDS[:2], "SWIR")
    with pytest.raises(UserError, match="true colour"):
        figures.composite(IMAGE, BANDS, "true color")
    assert figures.default_composite(("B08", "B11")) == ("B08",) * 3
    assert figures.default_composite(("VV", "VH", "B08")) == ("VV", "VH", "B08")
    assert figures.default_composite(BANDS) == ("B04", "B03", "B02")


def features(dimensions=12, chips=3):
    rng = np.random.default_rng(1)
    scales = np.array([9.0, 5.0, 3.0, *[0.1] * (dimensions - 3)])
    rotation = np.linalg.qr(rng.normal(size=(dimensions, dimensions)))[0]
    return np.einsum("de,nehw->ndhw", rotation, rng.normal(size=(chips, dimensions, 6, 5)) * scales[:, None, None]) + 2


def test_pca_basis_spans_what_scikit_learn_finds_and_does_not_flip():
    maps = features()
    rows = maps.transpose(0, 2, 3, 1).reshape(-1, 12)
    basis, peer = figures.pca_basis(maps), PCA(3).fit(rows)
    np.testing.assert_allclose(np.abs(np.sum(basis.directions * peer.components_.T, axis=0)), 1, atol=1e-9)
    np.testing.assert_allclose(basis.mean, peer.mean_)
    largest = np.abs(basis.directions).argmax(axis=0)
    assert (basis.directions[largest, range(3)] > 0).all()
    again = figures.pca_basis(maps[::-1])
    np.testing.assert_allclose(again.directions, basis.directions, atol=1e-9)


def test_one_basis_gives_equal_features_equal_colours_in_every_chip():
    maps = features()
    maps[2, :, 0, 0] = maps[0, :, 3, 3]
    basis = figures.pca_basis(maps)
    np.testing.assert_allclose(basis.colours(maps[2])[0, 0], basis.colours(maps[0])[3, 3])
    assert basis.colours(maps[1]).shape == (6, 5, 3)
    assert figures.pca_basis(np.ones((1, 2, 3, 3))).colours(np.ones((2, 3, 3))).max() == 0


def test_similarity_is_the_cosine_to_the_chosen_place():
    one, other = features(chips=2)
    got = figures.cosine_similarity(other, (1, 2), one)
    for y, x in np.ndindex(6, 5):
        a, b = other[:, y, x], one[:, 1, 2]
        assert got[y, x] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert figures.cosine_similarity(one, (1, 2))[1, 2] == pytest.approx(1)


def test_kmeans_finds_what_is_apart_and_numbers_it_by_size():
    truth = np.array([[0, 0, 0], [0, 0, 1], [1, 2, 0]])
    centres = np.eye(8)[:3] * 5
    maps = np.stack([centres[truth].transpose(2, 0, 1) + RNG.normal(0, 0.05, (8, 3, 3)) for _ in range(2)])
    np.testing.assert_array_equal(figures.kmeans_segments(maps, 3), np.stack([truth, truth]))


def test_nearest_chips_are_by_angle_without_the_query():
    embeddings = np.array([[1, 0], [10, 0.1], [0, 1], [-1, 0], [1, 1.0]])
    numbers, similarity = figures.nearest_chips(embeddings, 0, 3)
    assert numbers.tolist() == [1, 4, 2]
    assert similarity[1] == pytest.approx(np.sqrt(0.5))


def test_nodata_is_grey_on_any_ground():
    picture = figures.composite(IMAGE, BANDS, valid=np.zeros_like(VALID))
    shown = pixels(figures.image_sheet([[picture]]))
    assert np.abs(shown - np.array([0x9A, 0xA3, 0xAB]) / 255).max(axis=2).min() < 0.01


def test_every_sheet_draws():
    picture = figures.composite(IMAGE, BANDS, valid=VALID)
    maps = features().astype(np.float32)
    labels = RNG.integers(0, 3, (24, 20)).astype(np.uint8)
    labels[:4] = 255
    mean, std = IMAGE.mean(axis=(1, 2)), IMAGE.std(axis=(1, 2))
    view = (IMAGE - mean[:, None, None]) / std[:, None, None]
    repeated = (IMAGE[:1] - mean[:, None, None]) / std[:, None, None]
    sheet = figures.view_sheet([view, repeated, view[:, ::2, ::2]], BANDS, mean, std, chip=(IMAGE, VALID))
    assert "one band" in figures.as_svg(sheet)
    three = [picture] * 3
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    for figure in (
        sheet,
        figures.band_sheet(IMAGE, BANDS, valid=VALID),
        figures.composite_sheet(IMAGE, BANDS, valid=VALID),
        figures.statistics_chart(IMAGE, view, BANDS, valid=VALID),
        figures.pca_sheet(three, {"layer": maps}),
        figures.similarity_sheet(three, maps, [(0, 0), (1, 1), (5, 4)]),
        figures.segment_sheet(three, maps, 4),
        figures.attention_sheet(three, np.abs(maps[:, :2])),
        figures.nearest_sheet(three, RNG.normal(size=(3, 4)), [0, 1], 2),
        figures.class_sheet([picture], [labels], [labels[::-1]], ["a", "b", "c"], colours),
    ):
        assert_drawn(figure)


def test_every_chart_draws_what_it_was_given():
    bars = figures.class_bars(["water", "<moor>", "gone"], [0.5, 0.9, None], [0.4, 0.8, None], [0.6, None, None])
    svg = figures.as_svg(bars)
    assert svg.index("0.90") < svg.index("0.50")  # the best first
    assert "not in the test labels" in svg
    assert "&lt;moor&gt;" in svg
    counts = np.array([[90, 10, 0], [5, 15, 0], [0, 0, 0]])
    matrix = figures.as_svg(figures.confusion_chart(counts, ["a", "b", "c"]))
    assert all(share in matrix for share in ("90%", "10%", "25%", "75%"))
    bounds = np.array([[10, 50, 10.1, 50.1], [12, 51, 12.1, 51.1]])
    models = figures.model_chart(["one", "two"], [0.5, 0.4], [0.4, None], [0.6, None], ["head", "baseline"])
    for figure in (bars, models, figures.footprints_map(bounds, ["train", "test"])):
        assert_drawn(figure)


HOSTILE = ["$\\frac{", "$x$", "<b>", "\x1b[31mred", "_hidden", "a" * 5000, "caf\udce9", "\u6c34", "two\nlines"]


def test_names_are_never_markup():
    """`$\\frac{` once ended the page in a ValueError; a long name left no room for the figure."""
    colours, count = [(20 * k, 0, 0) for k in range(len(HOSTILE))], len(HOSTILE)
    picture = figures.composite(IMAGE, BANDS, valid=VALID)
    maps = dict.fromkeys((HOSTILE[0], HOSTILE[3]), features().astype(np.float32))
    labels = np.arange(24 * 20).reshape(24, 20).astype(np.uint8) % count
    halves = [0.5] * count
    bounds = np.array([[number, 50, number + 0.1, 50.1] for number in range(count)])
    for figure in (
        figures.class_bars(HOSTILE, halves, halves, halves, colours=colours),
        figures.model_chart(HOSTILE, halves, halves, halves, ["head"] * count, chosen=HOSTILE[0]),
        figures.confusion_chart(np.eye(count, dtype=int), HOSTILE),
        figures.curves(HOSTILE[0], [1, 2], {name: [1, 2] for name in HOSTILE[:6]}),
        figures.footprints_map(bounds, HOSTILE),
        figures.image_sheet([[picture] * count], titles=[HOSTILE], column_titles=HOSTILE, row_titles=HOSTILE),
        figures.statistics_chart(IMAGE[:2], IMAGE[:2], HOSTILE[:2]),
        figures.pca_sheet([picture] * 3, maps),
        figures.class_sheet([picture], [labels], [labels], HOSTILE, colours),
    ):
        svg = figures.as_svg(figure)
        assert len(svg.encode()) < 1e6
        assert "$" in svg
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f]|a{100}", svg)
        assert "<b>" not in svg
        ET.fromstring(svg)  # the names broke nothing
    assert "_hidden" in svg
    assert "\u6c34" in svg


def test_places_without_a_pixel_are_not_asked_for_and_grey():
    valid = RNG.random((22, 17)) > 0.4
    valid[:9] = False
    share = figures.valid_share(valid, (5, 4))
    for row, column in np.ndindex(5, 4):
        behind = [valid[y, x] for y in range(22) for x in range(17) if (y * 5 // 22, x * 4 // 17) == (row, column)]
        assert share[row, column] == pytest.approx(np.mean(behind))
    row, column = figures.central_place(valid, (5, 4))
    assert share[row, column] == share.max()
    assert figures.central_place(np.ones((64, 64), np.bool_), (8, 8)) in {(3, 3), (3, 4), (4, 3), (4, 4)}
    image = np.concatenate([np.zeros((*valid.shape, 3)), valid[..., None]], axis=2)
    sheet = figures.pca_sheet([image], {"layer": RNG.normal(size=(1, 6, 5, 4))})
    shown = sheet.axes[1].images[0].get_array()
    np.testing.assert_allclose(shown[0], np.broadcast_to(mpl.colors.to_rgb("#9aa3ab"), (4, 3)), atol=1e-6)
    assert np.ptp(shown[2:], axis=(0, 1)).max() > 0.1


def test_the_layer_shown_is_the_deepest_that_still_is_a_map():
    sides = {"stem": 32, "first": 16, "second": 8, "third": 4}
    layers = {name: np.zeros((1, 2, side, side)) for name, side in sides.items()}
    assert figures.readable_layer(layers) == "second"
    assert figures.readable_layer({name: layers[name] for name in ("second", "third")}, least=9) == "second"


def test_curves_of_a_run_share_their_axis_and_stay_inside():
    log = [{"step": s, "loss": 2.0, "effective_rank": 180.0 - s if s in (20, 40) else None} for s in range(10, 41, 10)]
    loss, rank = (figure.axes[0] for figure in figures.training_curves(log).values())
    assert loss.get_xlim() == rank.get_xlim()
    for axes in (loss, rank):
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 1.05 * np.nanmax(axes.lines[0].get_ydata())


def test_training_curves_join_what_is_logged_seldom():
    log = [{"step": s, "loss": 5.0 - s / 10, "ln_k": 7.0, "effective_rank": 3.0 if s % 20 == 0 else None}
           for s in range(10, 61, 10)]  # fmt: skip
    drawn = figures.training_curves(log)
    assert set(drawn) == {"loss", "effective rank"}
    (rank,) = drawn["effective rank"].axes[0].lines
    assert rank.get_xdata().tolist() == [20, 40, 60]


def test_svg_takes_the_colours_of_the_page():
    svg = figures.as_svg(figures.curves("loss", [1, 2], {"loss": [1, 2]}))
    assert "currentColor" in svg
    assert "var(--line)" in svg
    assert not re.search(r"#1b2127|#c9d0d7|<g id|https?://(?!www\.w3\.org)", svg)
    assert svg == figures.as_svg(figures.curves("loss", [1, 2], {"loss": [1, 2]}))  # the same every time


def test_attention_of_the_class_token_is_that_of_the_whole_softmax():
    arguments = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    backbone = create_backbone("vit_tiny_patch16_224", 4, [(32, 24)], **arguments).eval()
    images = torch.randn(2, 4, 32, 24)
    got = class_token_attention(backbone, images)
    assert got.shape == (2, 3, 4, 3)
    rest = 1 - got.sum(dim=(2, 3))  # the class token's own share
    assert ((rest > 0) & (rest < 1)).all()
    attention = backbone.blocks[-1].attn
    seen = []
    hook = backbone.blocks[-1].norm1.register_forward_hook(lambda m, a, o: seen.append(o))
    backbone(images)
    hook.remove()
    q, k = (part.view(2, -1, 3, 16) for part in attention.qkv(seen[0]).split(48, dim=2)[:2])
    for head in range(3):
        weights = torch.softmax(q[0, 0, head] @ k[0, :, head].T / 4, dim=0)
        torch.testing.assert_close(got[0, head].flatten(), weights[1:])
    assert class_token_attention(create_backbone("resnet18", 4, [(32, 32)]).eval(), images) is None
