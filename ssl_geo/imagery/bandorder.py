"""Whether the bands of a stack can be in the order that its names say: the fingerprint of Sentinel-2 over land.

Two things are the same over nearly all land, whatever the season, the processing level and the units. Neighbouring
bands vary together (B08 and B8A most, visible and near infrared least, as only vegetation tells them apart), and
each band has its share of the variation (infrared more than red, red more than blue). Both are known from published
spectra (`ssl_geo.imagery.sample_spectra`): the covariance of random mixtures of materials, with Dirichlet weights,
is proportional to the covariance of the materials' spectra. To this a Level 1C product adds B10, which the water
vapour of the atmosphere leaves nearly constant.

Under each order that archives are known to use, a scene has a distance from that fingerprint. Clouds, snow and open
sea fit no order and say nothing. Of 198 real scenes (L2A and L1C, crops, coast, a reservoir, deserts, snow) 74 fit one
within `FITS`, and in none of them an order other than the right one was nearer by `MARGIN`. Two bands that look
alike, B08 and B8A alone for example, cannot be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ssl_geo.imagery.findings import Finding
from ssl_geo.imagery.sample_spectra import BANDS, MATERIALS
from ssl_geo.imagery.sensors import SENTINEL2_L1C

FITS = 0.15
"""Distance up to which a scene shows enough land to tell."""
MARGIN = 0.005
"""By how much another order must be nearer."""
_MAJORITY = 0.75  # share of the scenes that can tell which must agree
_MIN_SPECTRA = 256  # valid pixels from which on correlations are taken
_SPREAD_WEIGHT = 0.3  # of the squared log standard deviations against the squared correlations
_CIRRUS_QUIET = 4.0  # B10 varies so many times less than any other band, or the order is wrong
_CIRRUS_WEIGHT = 0.5

_SPECTRA = np.array(list(MATERIALS.values()))
_POSITION = {band.name: k for k, band in enumerate(BANDS)}
_CORRELATION = np.corrcoef(_SPECTRA.T)
_LOG_SPREAD = np.log(_SPECTRA.std(axis=0))


@dataclass(frozen=True, slots=True)
class OrderEvidence:
    """How far a scene is from the fingerprint under each order.

    Attributes:
        bands: The order that the scene's names say.
        distances: By name of the order; ``as named`` among them.
        orders: The bands in each order.
    """

    bands: tuple[str, ...]
    distances: dict[str, float]
    orders: dict[str, tuple[str, ...]]

    @property
    def tells(self) -> bool:
        """Whether some order fits."""
        return min(self.distances.values()) <= FITS

    @property
    def nearest(self) -> str:
        """The nearest order; the named one unless another is nearer by `MARGIN`."""
        best = min(self.distances, key=self.distances.__getitem__)
        return best if self.distances[best] < self.distances["as named"] - MARGIN else "as named"


def known_orders(bands: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Orders in which archives store these bands.

    By wavelength (products, BigEarthNet), B8A last (EuroSAT), by resolution (10, 20, 60 m), each with red
    first as in true colour, descending, and B11 before B08 (a pretraining script whose order was copied).
    """
    waves = tuple(band for band in SENTINEL2_L1C.names if band in bands)
    grouped = tuple(sorted(waves, key=lambda band: SENTINEL2_L1C[band].gsd_m))
    orders = {
        "as named": tuple(bands),
        "by wavelength": waves,
        "B8A last": tuple(sorted(waves, key=lambda band: band == "B8A")),
        "by resolution": grouped,
        "red first": _red_first(waves),
        "by resolution, red first": _red_first(grouped),
        "descending": waves[::-1],
    }
    if {"B08", "B11"} <= set(waves):
        rest = [band for band in waves if band != "B11"]
        rest.insert(rest.index("B08"), "B11")
        orders["B11 before B08"] = tuple(rest)
    unique = {order: name for name, order in reversed(orders.items())}
    return {name: order for name, order in orders.items() if unique[order] == name}


def _red_first(bands: tuple[str, ...]) -> tuple[str, ...]:
    swap = {"B02": "B04", "B04": "B02"} if {"B02", "B04"} <= set(bands) else {}
    return tuple(swap.get(band, band) for band in bands)


def order_evidence(spectra: npt.NDArray[np.generic], bands: Sequence[str]) -> OrderEvidence | None:
    """Compare a scene's bands with the fingerprint under each known order.

    Args:
        spectra: (C, N) valid pixels, in any unit that all bands share.
        bands: The names that they have.

    Returns:
        The distances, or None where there is nothing to compare: fewer than four Sentinel-2 bands, too few
        pixels, or a constant band.
    """
    if len(bands) < 4 or not set(bands) <= set(SENTINEL2_L1C.names) or spectra.shape[1] < _MIN_SPECTRA:
        return None
    values = spectra.astype(np.float64)
    spread = values.std(axis=1)
    if not (np.isfinite(spread).all() and (spread > 0).all()):
        return None
    correlation: npt.NDArray[np.float64] = np.asarray(np.corrcoef(values))
    orders = known_orders(bands)
    distances = {name: _distance(correlation, np.log(spread), order) for name, order in orders.items()}
    return OrderEvidence(tuple(bands), distances, orders)


def _distance(correlation: npt.NDArray[np.float64], log_spread: npt.NDArray[np.float64], order: Sequence[str]) -> float:
    """Mean squared difference of correlations and, weighted, of log standard deviations up to a common factor."""
    own = [k for k, band in enumerate(order) if band in _POSITION]
    reference = [_POSITION[order[k]] for k in own]
    pairs = np.triu_indices(len(own), 1)
    apart = (correlation[np.ix_(own, own)] - _CORRELATION[np.ix_(reference, reference)])[pairs]
    spread = log_spread[own] - _LOG_SPREAD[reference]
    spread = np.clip(spread - np.median(spread), -2, 2)
    distance = float((apart**2).mean() + _SPREAD_WEIGHT * (spread**2).mean())
    if "B10" in order:
        cirrus = order.index("B10")
        quiet = log_spread[cirrus] + np.log(_CIRRUS_QUIET) <= np.delete(log_spread, cirrus).min()
        distance += 0.0 if quiet else _CIRRUS_WEIGHT
    return distance


def suspicious_order(evidence: Sequence[OrderEvidence]) -> tuple[str, list[int]] | None:
    """The order that the scenes of one archive are more likely in, all of the same named bands.

    Returns:
        Its name and the positions of the scenes that say so; None where the named order stands.
    """
    telling = [k for k, scene in enumerate(evidence) if scene.tells]
    votes: dict[str, list[int]] = {}
    for k in telling:
        votes.setdefault(evidence[k].nearest, []).append(k)
    winner = max(votes, key=lambda name: len(votes[name]), default="as named")
    if winner == "as named" or len(votes[winner]) < _MAJORITY * len(telling):
        return None
    return winner, votes[winner]


def check_band_order(scenes: Sequence[tuple[str, OrderEvidence]]) -> list[Finding]:
    """Scenes whose bands fit land under another order than the one that their names say.

    At least three quarters of the scenes that show enough land (`FITS`) must say the same.

    Args:
        scenes: Paths and evidence.
    """
    groups: dict[tuple[str, ...], list[tuple[str, OrderEvidence]]] = {}
    for path, evidence in scenes:
        groups.setdefault(evidence.bands, []).append((path, evidence))
    findings = []
    for bands, group in groups.items():
        suspicion = suspicious_order([evidence for _, evidence in group])
        if suspicion is None:
            continue
        name, positions = suspicion
        example = group[positions[0]][1]
        order = " ".join(example.orders[name])
        findings.append(
            Finding(
                "band order",
                "warning",
                tuple(group[k][0] for k in positions),
                f"read as {' '.join(bands)}; in {len(positions)} of {sum(e.tells for _, e in group)} scenes with "
                f"enough land they vary together as {order} ({name}): distance {example.distances[name]:.3f} against "
                f"{example.distances['as named']:.3f}",
                "bands that vary together as over land",
                f"look up the order at the source; if it is so, --data.band_names {order} (and mend the descriptions)",
                len(positions),
            )
        )
    return findings
