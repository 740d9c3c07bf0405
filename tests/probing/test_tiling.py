"""Tiles blended over a scene: weights that add up to 1, no seam, and a convolution that sees no tile's edge."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl_geo.probing.tiling import NotFiniteError, any_within, blended, lay_tiles


def reader(image, valid, side, width):
    """Rows of an array, padded as the entry pads a scene's."""

    def read(top):
        rows, inside = image[:, top : top + side], valid[top : top + side]
        below, beside = side - rows.shape[1], width - rows.shape[2]
        return np.pad(rows, ((0, 0), (0, below), (0, beside))), np.pad(inside, ((0, below), (0, beside)))

    return read


def mapped(image, valid, model, size, overlap, channels, reduction=1, batch_size=3):
    """All strips put together, cut to the scene."""
    cells = [-(-length // reduction) for length in image.shape[1:]]
    rows, columns = (lay_tiles(length, size, overlap) for length in cells)
    read = reader(image, valid, size * reduction, columns.length * reduction)
    strips = [
        (top, values.clone(), inside)
        for top, values, inside in blended(
            read, model, rows, columns, channels, reduction=reduction, batch_size=batch_size
        )
    ]
    assert [top for top, _, _ in strips] == list(np.cumsum([0, *(v.shape[1] for _, v, _ in strips)])[:-1])
    whole = torch.cat([values for _, values, _ in strips], dim=1)[:, : cells[0], : cells[1]]
    inside = np.concatenate([part for _, _, part in strips])[: image.shape[1], : image.shape[2]]
    np.testing.assert_array_equal(inside, valid)
    return whole.numpy()


@given(st.integers(1, 300), st.integers(1, 64), st.floats(0, 0.5))
@settings(max_examples=200, deadline=None)
def test_weights_add_up_to_one_and_tiles_lie_within(length, size, overlap):
    axis = lay_tiles(length, size, overlap)
    assert axis.length == max(length, size)
    assert axis.starts[0] == 0
    assert axis.starts[-1] + size == axis.length
    total = np.zeros(axis.length)
    for start, weight in zip(axis.starts, axis.weights, strict=True):
        total[start : start + size] += weight
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert (axis.weights >= 0).all()
    common = [a + size - b for a, b in zip(axis.starts, axis.starts[1:], strict=False)]
    assert all(found >= min(int(overlap * size), size // 2) for found in common)


def test_weights_change_little_from_pixel_to_pixel_and_are_zero_at_tile_edges():
    axis = lay_tiles(500, 64, 0.25)
    inner = axis.weights[1:-1]
    assert (inner[:, :4] == 0).all()
    assert (inner[:, -4:] == 0).all()
    assert (axis.weights[0, :48] == 1).all()  # nothing to blend with at the scene's border
    assert np.abs(np.diff(axis.weights, axis=1)).max() < 0.25


@pytest.mark.parametrize("shape", [(150, 97), (40, 131), (20, 17), (64, 64)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_a_constant_model_gives_a_constant_map(shape, overlap):
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    constant = torch.tensor([0.2, 0.7, 0.1])[:, None, None]

    def model(tiles):
        return constant.expand(len(tiles), 3, *tiles.shape[-2:])

    found = mapped(image, np.ones(shape, bool), model, 32, overlap, 3)
    np.testing.assert_allclose(found, constant.numpy() + np.zeros((3, *shape)), atol=1e-6)
    assert (found.argmax(axis=0) == 1).all()


def test_a_map_in_tiles_is_that_in_one_piece_where_the_receptive_field_fits_the_unweighted_edge():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, 4, 5, padding=2)).eval()  # 4 pixels
    image = np.random.default_rng(1).normal(size=(2, 211, 170)).astype(np.float32)
    with torch.inference_mode():
        whole = net(torch.from_numpy(image)[None])[0].numpy()
    found = mapped(image, np.ones(image.shape[1:], bool), net, 64, 0.25, 4)
    np.testing.assert_allclose(found, whole, atol=1e-5)  # at the scene's border too
    # Without overlap the tiles' edges show: the test can tell.
    assert np.abs(mapped(image, np.ones(image.shape[1:], bool), net, 64, 0.0, 4) - whole).max() > 0.05


def test_features_on_a_coarser_grid_lie_where_the_layer_has_them():
    torch.manual_seed(0)
    stem = nn.Conv2d(2, 6, 4, stride=4)
    image = np.random.default_rng(1).normal(size=(2, 100, 122)).astype(np.float32)
    found = mapped(image, np.ones((100, 122), bool), stem, 8, 0.25, 6, reduction=4)
    padded = np.pad(image, ((0, 0), (0, 0), (0, 2)))
    with torch.inference_mode():
        np.testing.assert_allclose(found, stem(torch.from_numpy(padded)[None])[0].numpy(), atol=1e-5)


def test_tiles_without_a_valid_pixel_are_not_computed():
    seen = []

    def model(tiles):
        seen.append(len(tiles))
        return tiles

    valid = np.zeros((128, 128), bool)
    valid[70, 100] = True
    image = np.ones((1, 128, 128), np.float32)
    found = mapped(image, valid, model, 32, 0.0, 1)
    assert sum(seen) == 1
    assert found[0, 70, 100] == 1
    assert found[0, 0, 0] == 0


def test_a_cell_is_valid_where_one_of_its_pixels_is():
    valid = np.zeros((4, 6), bool)
    valid[3, 2] = True
    np.testing.assert_array_equal(any_within(valid, 2), [[False] * 3, [False, True, False]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_wherever_they_lie(value):
    image, valid = np.zeros((1, 70, 70), np.float32), np.ones((70, 70), bool)
    image[0, 69, 0] = 1

    def model(tiles):
        return torch.where(tiles > 0, value, tiles)

    with pytest.raises(NotFiniteError, match="first in rows 38 to 70"):
        mapped(image, valid, model, 32, 0.25, 1)
