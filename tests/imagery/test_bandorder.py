import numpy as np
import pytest

from ssl_geo.imagery.bandorder import (
    FITS,
    check_band_order,
    known_orders,
    order_evidence,
    suggested_orders,
    suspicious_order,
)
from ssl_geo.imagery.findings import merge
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


EUROSAT = known_orders(LIKELY_ORDERS[13])["B8A last"]


def with_cirrus(land, seed, bands, level=0):
    """(13, N) DN of land in the order of `bands`, B10 near 13."""
    dn = land(seed, bands=SENTINEL2_L2A.names).reshape(12, -1)
    b10 = np.random.default_rng(seed).normal(13, 2, (1, dn.shape[1])).clip(5, 30)
    spectra = dict(zip((*SENTINEL2_L2A.names, "B10"), np.concatenate([dn, b10]), strict=True))
    return np.stack([spectra[band] for band in bands]) + level


@pytest.mark.parametrize("level", [0, 1000])
def test_b10_alone_refuses_an_order_that_puts_it_elsewhere(land, level):
    """Files in EuroSAT's order, read with B8A in place, were called clean: no distance came below `FITS`."""
    values = with_cirrus(land, 0, EUROSAT, level)
    unlike = values.copy()
    unlike[[2, 3, 7, 12]] = unlike[[12, 7, 3, 2]]  # so that no order fits the land
    evidence = order_evidence(unlike, LIKELY_ORDERS[13])
    assert min(evidence.distances.values()) > FITS
    assert (evidence.cirrus, evidence.misplaces_cirrus, evidence.nearest) == (9, True, "B8A last")
    (finding,) = check_band_order([("a.tif", evidence)])
    assert finding.severity == "error"
    assert "band 10 of 13" in finding.found
    assert " ".join(EUROSAT) in finding.fix
    right = order_evidence(values, EUROSAT)
    assert (right.cirrus, right.misplaces_cirrus) == (9, False)
    assert check_band_order([("a.tif", right)]) == []


def test_one_scene_with_b10_elsewhere_is_found_among_many(land):
    scenes = [(str(k), order_evidence(with_cirrus(land, k, LIKELY_ORDERS[13]), LIKELY_ORDERS[13])) for k in range(4)]
    assert check_band_order(scenes) == []
    scenes.append(("other", order_evidence(with_cirrus(land, 4, EUROSAT), LIKELY_ORDERS[13])))
    (finding,) = check_band_order(scenes)
    assert finding.paths == ("other",)


def test_b10_in_no_known_place_is_told_without_an_order(land):
    values = with_cirrus(land, 0, ("B10", *SENTINEL2_L2A.names))
    (finding,) = check_band_order([("a.tif", order_evidence(values, LIKELY_ORDERS[13]))])
    assert "band 1 of 13" in finding.found
    assert "no known order" in finding.found
    assert "--data.band_names" not in finding.fix


def test_cirrus_and_sea_tell_nothing_of_b10(land):
    values = with_cirrus(land, 0, LIKELY_ORDERS[13])
    cloudy = values.copy()
    cloudy[10] += np.random.default_rng(0).gamma(2, 200, values.shape[1])
    rng = np.random.default_rng(0)
    levels = np.array([1200, 900, 500, 250, 200, 150, 130, 110, 100, 60, 12, 20, 12.0])
    sea = levels[:, None] + rng.normal(0, 3, (13, 4000))
    for spectra in (cloudy, sea):
        assert order_evidence(spectra, LIKELY_ORDERS[13]).cirrus is None


def test_what_is_suggested_for_missing_names_is_what_the_pixels_say(land):
    """The count of 13 alone decided, and EuroSAT's files were proposed another order than they have."""
    likely = LIKELY_ORDERS[13]
    scenes = [(str(k), order_evidence(with_cirrus(land, k, EUROSAT), likely)) for k in range(3)]
    sea = np.random.default_rng(0).normal(500, 3, (13, 4000))
    scenes.append(("sea", order_evidence(sea, likely)))
    suggested = suggested_orders(scenes)
    assert {order for order, _ in suggested.values()} == {EUROSAT}  # what tells nothing follows what does
    agreed = suggested_orders([("a", order_evidence(with_cirrus(land, 0, likely), likely))])
    assert agreed["a"] == (likely, "the likely order, and the pixels agree")
    order, why = suggested_orders([("sea", scenes[-1][1])])["sea"]
    assert order == likely
    assert "do not tell" in why
    red_first = known_orders(SENTINEL2_L2A.names)["red first"]
    stored = [SENTINEL2_L2A.names.index(band) for band in red_first]
    twelve = [(str(k), order_evidence(land(k).reshape(12, -1)[stored], SENTINEL2_L2A.names)) for k in range(4)]
    assert {order for order, _ in suggested_orders(twelve).values()} == {red_first}


def test_real_level_1c_in_eurosats_order_is_found_in_every_scene(shared_data):
    settings = {"landcover/images_l1c": {"band_names": LIKELY_ORDERS[13]}, "jp2_multires": {}}
    scenes = []
    for folder, names in settings.items():
        for path in find_scenes([shared_data / folder]):
            scene = open_scene(path, **names)
            dn, valid = read_window(scene, EUROSAT, 0, 0, min(224, scene.height), min(224, scene.width))
            scenes.append((str(path), dn[:, valid]))
    assert len(scenes) == 6
    wrong = [(path, order_evidence(values, LIKELY_ORDERS[13])) for path, values in scenes]
    (finding,) = merge(check_band_order(wrong))
    assert (finding.severity, finding.count) == ("error", 6)
    assert {order for order, _ in suggested_orders(wrong).values()} == {EUROSAT}
    assert check_band_order([(path, order_evidence(values, EUROSAT)) for path, values in scenes]) == []
