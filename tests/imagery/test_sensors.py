"""The sensors' tables and the spellings of their bands."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_geo.imagery.sensors import (
    DEFAULT_BANDS,
    KNOWN_BANDS,
    LIKELY_ORDERS,
    SENSORS,
    SENTINEL1_GRD,
    SENTINEL2_L1C,
    SENTINEL2_L2A,
    canonical_band,
    likely_order,
)


def test_products_hold_the_bands_that_esa_delivers() -> None:
    twelve = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
    assert list(SENTINEL2_L2A.names) == twelve
    assert list(SENTINEL2_L1C.names) == [*twelve[:10], "B10", *twelve[10:]]
    assert SENTINEL1_GRD.names == ("VV", "VH")
    assert set(SENSORS) == {"S2-L2A", "S2-L1C", "S1-GRD"}


def test_native_resolutions() -> None:
    by_gsd = {gsd: {b.name for b in SENTINEL2_L1C.bands if b.gsd_m == gsd} for gsd in (10, 20, 60)}
    assert by_gsd[10] == {"B02", "B03", "B04", "B08"}
    assert by_gsd[20] == {"B05", "B06", "B07", "B8A", "B11", "B12"}
    assert by_gsd[60] == {"B01", "B09", "B10"}
    assert set(DEFAULT_BANDS) == by_gsd[10] | by_gsd[20]


def test_wavelengths_rise_in_product_order_and_8a_lies_within_8() -> None:
    wavelengths = [band.wavelength_nm for band in SENTINEL2_L1C.bands]
    assert wavelengths == sorted(wavelengths)
    wide, narrow = SENTINEL2_L2A["B08"], SENTINEL2_L2A["B8A"]
    assert wide.bandwidth_nm is not None
    assert abs(narrow.wavelength_nm - wide.wavelength_nm) < wide.bandwidth_nm / 2
    with pytest.raises(KeyError):
        SENTINEL2_L2A["B10"]


@pytest.mark.parametrize(
    ("text", "band"),
    [
        ("B2", "B02"),
        ("B02", "B02"),
        ("b8a", "B8A"),
        ("B08A", "B8A"),
        ("Band 4", "B04"),
        ("band_04", "B04"),
        ("Band 8A", "B8A"),
        ("B04 - Red", "B04"),
        ("B4_10m", "B04"),
        ("B04_10m", "B04"),
        ("B4, central wavelength 665 nm", "B04"),
        ("B8 (842 nm)", "B08"),
        ("B8 - NIR", "B08"),
        ("B1 - ultra blue", "B01"),
        ("B05 (Red Edge)", "B05"),
        ("S2_SR_B4", "B04"),
        ("T33UUU_20170216T102101_B8A", "B8A"),
        ("S2A_MSIL2A_20170613T101031_87_48_B01", "B01"),
        ("HLS.S30.T10SEG.B11", "B11"),
        ("vv", "VV"),
        ("S1A_IW_GRDH_VH", "VH"),
    ],
)
def test_spellings_of_a_band(text: str, band: str) -> None:
    assert canonical_band(text) == band


@pytest.mark.parametrize(
    "text",
    [
        *("", "red", "nir", "B13", "B00", "B99", "SCL", "QA60", "TCI", "B02 B03", "S2B_MSIL2A_20180204", "B10m"),
        *("B04_std", "MSK_QUALIT_B01", "std_B04", "LC08_L1TP_194024_B4", "HLS.L30.T10SEG.B05", "band", "B"),
        *("SR_B5", "ST_B10", "sur_refl_b02", "B4 - NIR", "B1 - Blue", "B2 - Green", "B5 (Red)"),
    ],
)
def test_what_names_no_band(text: str) -> None:
    assert canonical_band(text) is None


@given(st.sampled_from(sorted(KNOWN_BANDS)), st.sampled_from(["", "x_", "T33UUU_20200101_", "a.b-"]))
def test_canonical_names_are_fixed_points_in_any_case(band: str, prefix: str) -> None:
    assert canonical_band(prefix + band) == canonical_band((prefix + band).lower()) == band


def test_likely_orders_have_their_count_and_known_bands() -> None:
    for count, order in LIKELY_ORDERS.items():
        assert len(order) == len(set(order)) == count
        assert set(order) <= KNOWN_BANDS
        assert " ".join(order) in likely_order(count)
    assert LIKELY_ORDERS[13].index("B10") + 1 == LIKELY_ORDERS[13].index("B11")
    assert "B02" in likely_order(7)
