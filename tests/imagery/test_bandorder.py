import numpy as np
import pytest

from ssl_geo.imagery.bandorder import FITS, check_band_order, known_orders, order_evidence, suspicious_order
from ssl_geo.imagery.rasters import find_scenes, open_scene, read_window
from ssl_geo.imagery.sensors import LIKELY_ORDERS, SENTINEL2_L2A

L2A = SENTINEL2_L2A.names
ARCHIVES = {
    "scenes": {},
    "bigearthnet": {},
    "chips_coastal": {"band_names": LIKELY_ORDERS[12]},
    "chips_seasonal": {},
    "landcover/images_l2a": {"band_names": LIKELY_ORDERS[12]},
    "landcover/images_l1c": {"band_names": LIKELY_ORDERS[13]},
    "water/images": {"band_names": LIKELY_ORDERS[12]},
    "cloud/images": {"scale": 1.0},
}


@pytest.fixture(scope="module")
def real(shared_data):
    """Valid spectra of the scenes of each real archive, (C, N) each, with their bands."""
    spectra = {}
    for folder, settings in ARCHIVES.items():
        spectra[folder] = []
        for path in find_scenes([shared_data / folder])[:: 3 if folder.startswith("chips") else 1]:
            scene = open_scene(path, **settings)
            dn, valid = read_window(scene, scene.bands, 0, 0, min(400, scene.height), min(400, scene.width))
            values = dn[:, valid]
            spectra[folder].append((values[:, :: max(1, values.shape[1] // 2048)], scene.bands))
    return spectra


def by_bands(scenes):
    groups = {}
    for values, bands in scenes:
        groups.setdefault(bands, []).append(values)
    return groups


@pytest.mark.parametrize("folder", ARCHIVES)
def test_real_archives_in_their_right_order_are_not_suspected(real, folder):
    for bands, scenes in by_bands(real[folder]).items():
        assert suspicious_order([e for x in scenes if (e := order_evidence(x, bands)) is not None]) is None


@pytest.mark.parametrize("folder", ARCHIVES)
def test_real_archives_in_another_order_than_named_are_found_and_put_right(real, folder):
    for bands, scenes in by_bands(real[folder]).items():
        if not any(e.tells for x in scenes if (e := order_evidence(x, bands)) is not None):
            continue  # the burnt scene of ten bands: nothing to tell by
        for name, order in known_orders(bands).items():
            stored = [bands.index(band) for band in order]
            evidence = [e for x in scenes if (e := order_evidence(x[stored], bands)) is not None]
            suspicion = suspicious_order(evidence)
            if name == "as named":
                assert suspicion is None
            elif name != "red first":
                assert suspicion is not None, (folder, name)
                assert evidence[0].orders[suspicion[0]] == order
            else:  # the closest one: never taken for a third, at most not found
                assert suspicion is None or evidence[0].orders[suspicion[0]] == order


def test_red_and_blue_are_told_apart_on_most_real_archives(real):
    right = 0
    folders = ("scenes", "bigearthnet", "chips_coastal", "landcover/images_l2a", "landcover/images_l1c", "water/images")
    for folder in folders:
        bands, scenes = max(by_bands(real[folder]).items(), key=lambda item: len(item[1]))
        stored = [bands.index({"B02": "B04", "B04": "B02"}.get(band, band)) for band in bands]
        suspicion = suspicious_order([e for x in scenes if (e := order_evidence(x[stored], bands)) is not None])
        right += suspicion is not None
    assert right >= 5


def test_units_and_offsets_do_not_matter(land):
    spectra = land(shape=(64, 64)).reshape(12, -1)
    plain, scaled = order_evidence(spectra, L2A), order_evidence(spectra * 1e-4 + 0.1, L2A)
    assert plain is not None
    assert scaled is not None
    assert plain.tells
    assert plain.distances == pytest.approx(scaled.distances, abs=1e-9)


def test_noise_clouds_and_too_little_tell_nothing(land):
    rng = np.random.default_rng(0)
    noise = order_evidence(rng.normal(size=(12, 4000)), L2A)
    cloud = order_evidence(rng.gamma(4, 1000, 4000) + rng.normal(0, 20, (12, 4000)), L2A)
    for evidence in (noise, cloud):
        assert evidence is not None
        assert min(evidence.distances.values()) > FITS
    spectra = land(shape=(64, 64)).reshape(12, -1)
    assert order_evidence(spectra[:, :100], L2A) is None
    assert order_evidence(spectra[:3], L2A[:3]) is None
    constant = spectra.copy()
    constant[4] = 7
    assert order_evidence(constant, L2A) is None


def test_a_minority_does_not_accuse_the_archive(land):
    right = [land(k).reshape(12, -1) for k in range(6)]
    swapped = [values[::-1] for values in right]
    evidence = [(str(k), order_evidence(x, L2A)) for k, x in enumerate([*right[:4], *swapped[4:]])]
    assert check_band_order(evidence) == []
    (finding,) = check_band_order([(str(k), order_evidence(x, L2A)) for k, x in enumerate(swapped)])
    assert finding.count == 6
    assert " ".join(L2A[::-1]) in finding.fix


def test_known_orders_are_permutations_each_listed_once():
    for bands in (
        L2A,
        LIKELY_ORDERS[13],
        LIKELY_ORDERS[10],
        ("B02", "B03", "B04", "B08"),
        ("B08", "B04", "B03", "B02"),
    ):
        orders = known_orders(bands)
        assert orders["as named"] == bands
        assert all(sorted(order) == sorted(bands) for order in orders.values())
        assert len(set(orders.values())) == len(orders)
    assert known_orders(LIKELY_ORDERS[13])["B8A last"][-3:] == ("B11", "B12", "B8A")
