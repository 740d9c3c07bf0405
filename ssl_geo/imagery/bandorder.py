"""Whether the bands of a stack can be in the order that its names say: the fingerprint of Sentinel-2 over land.

Two things are the same over nearly all land, whatever the season, the processing level and the units. Neighbouring
bands vary together (B08 and B8A most, visible and near infrared least, as only vegetation tells them apart), and
each band has its share of the variation (infrared more than red, red more than blue). Both are known from published
spectra (`ssl_geo.imagery.sample_spectra`): the covariance of random mixtures of materials, with Dirichlet weights,
is proportional to the covariance of the materials' spectra. To this a Level 1C product adds B10, which the water
vapour of the atmosphere leaves nearly constant and, where no cirrus is, nearly black: over land it lies far below all
other bands and varies many times less than any. Where a band does so, it is B10, whatever the distances say.

Under each order that archives are known to use, a scene has a distance from that fingerprint. Clouds, snow and open
sea fit no order and say nothing. Of 198 real scenes (L2A and L1C, crops, coast, a reservoir, deserts, snow) 74 fit one
within `FITS`, and in none of them an order other than the right one was nearer by `MARGIN`. Two bands that look
alike, B08 and B8A alone for example, cannot be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ssl_geo.imagery.findings import Finding, copied
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
# Of the range of the bands' medians, by which B10's lies below the next. Of 9 windows of real Level 1C over land and
# snow the least is 0.15; in water vapour or on the sea another band may come near, which then tells nothing.
_CIRRUS_LOW = 0.05
_ELSEWHERE = "no known order"

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
        cirrus: Position of the band that can only be B10, counted from 0; None where none stands out, or where no
            name says B10.
        cirrus_median: Its median, in the unit of the spectra; NaN without it.
    """

    bands: tuple[str, ...]
    distances: dict[str, float]
    orders: dict[str, tuple[str, ...]]
    cirrus: int | None = None
    cirrus_median: float = math.nan

    @property
    def misplaces_cirrus(self) -> bool:
        """Whether the names say another band where B10 is, which leaves no doubt that they are wrong."""
        return self.cirrus is not None and self.bands[self.cirrus] != "B10"

    @property
    def tells(self) -> bool:
        """Whether some order fits, or the named one cannot be."""
        return self.misplaces_cirrus or min(self.distances.values()) <= FITS

    @property
    def nearest(self) -> str:
        """The nearest order with B10 in place; the named one, if it is such, unless another is nearer by `MARGIN`."""
        possible = [name for name, order in self.orders.items() if self.cirrus is None or order[self.cirrus] == "B10"]
        best = min(possible, key=self.distances.__getitem__, default=_ELSEWHERE)
        if "as named" in possible and self.distances[best] >= self.distances["as named"] - MARGIN:
            return "as named"
        return best


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
    medians: npt.NDArray[np.float64] = np.median(values, axis=1)
    cirrus = _cirrus(medians, spread) if "B10" in bands else None
    return OrderEvidence(
        tuple(bands), distances, orders, cirrus, math.nan if cirrus is None else float(medians[cirrus])
    )


def _cirrus(medians: npt.NDArray[np.float64], spread: npt.NDArray[np.float64]) -> int | None:
    """Position of the band that lies far below all others and varies many times less than any, if one does."""
    lowest = int(medians.argmin())
    low = medians - medians[lowest]
    is_far_below = np.delete(low, lowest).min() >= _CIRRUS_LOW * low.max() > 0
    is_quiet = _CIRRUS_QUIET * spread[lowest] <= np.delete(spread, lowest).min()
    return lowest if is_far_below and is_quiet else None


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

    Scenes that have B10 under another name need no majority: there is no doubt.

    Returns:
        Its name (``no known order`` where none has B10 in its place) and the positions of the scenes that say so; None
        where the named order stands.
    """
    misplaced = [k for k, scene in enumerate(evidence) if scene.misplaces_cirrus]
    telling = misplaced or [k for k, scene in enumerate(evidence) if scene.tells]
    votes: dict[str, list[int]] = {}
    for k in telling:
        votes.setdefault(evidence[k].nearest, []).append(k)
    winner = max(votes, key=lambda name: len(votes[name]), default="as named")
    if winner == "as named" or len(votes[winner]) < _MAJORITY * len(telling):
        return None
    return winner, votes[winner]


def check_band_order(
    scenes: Sequence[tuple[str, OrderEvidence]], *, described: Container[str] = frozenset()
) -> list[Finding]:
    """Scenes whose bands fit land under another order than the one that their names say.

    At least three quarters of the scenes that show enough land (`FITS`) must say the same: a warning. A scene that has
    B10 under another name is an error by itself (`OrderEvidence.misplaces_cirrus`).

    Args:
        scenes: Paths and evidence.
        described: Paths of those whose files name their bands themselves, so that no setting can.
    """
    findings = []
    for bands, group in _by_bands(scenes).items():
        suspicion = suspicious_order([evidence for _, evidence in group])
        if suspicion is None:
            continue
        name, positions = suspicion
        examples = [group[k] for k in positions]
        if examples[0][1].misplaces_cirrus:
            findings += [_misplaced(path, evidence, name, path in described) for path, evidence in examples]
            continue
        path, example = examples[0]
        order = " ".join(example.orders[name])
        fix, command = _renaming(path, order, path in described)
        findings.append(
            Finding(
                "band order",
                "warning",
                tuple(path for path, _ in examples),
                f"read as {' '.join(bands)}; in {len(positions)} of {sum(e.tells for _, e in group)} scenes with "
                f"enough land they vary together as {order} ({name}): distance {example.distances[name]:.3f} against "
                f"{example.distances['as named']:.3f}",
                "bands that vary together as over land",
                fix,
                len(positions),
                command=command,
            )
        )
    return findings


def _misplaced(path: str, evidence: OrderEvidence, name: str, is_described: bool) -> Finding:
    """A scene that has B10 under another name."""
    where, fix, command = "where no known order has it", "look up the order at the source", ""
    if name != _ELSEWHERE:
        order = " ".join(evidence.orders[name])
        where = f"where it is in the order {order} ({name})"
        fix, command = _renaming(path, order, is_described)
    found = f"read as {' '.join(evidence.bands)}; {_cirrus_found(evidence)}, {where}"
    return Finding("band order", "error", (path,), found, "B10 where the names say it", fix, command=command)


def _renaming(path: str, order: str, is_described: bool) -> tuple[str, str]:
    """What to do for bands that are in another order than named, and the command line where no setting does it."""
    fix = "look up the order at the source; if it is so, "
    if is_described:
        return f"{fix}write it into copies of the files", with_descriptions(path, order)
    return f"{fix}--data.band_names {order} (of files that name their bands: a copy that is right)", ""


def suggested_orders(scenes: Sequence[tuple[str, OrderEvidence]]) -> dict[str, tuple[tuple[str, ...], str]]:
    """The order to propose for stacks that name no band, by their pixels.

    Args:
        scenes: Paths and evidence, the likely order (`ssl_geo.imagery.sensors.LIKELY_ORDERS`) taken for the names.

    Returns:
        By path: the bands in the order proposed, and what speaks for it.
    """
    suggested = {}
    for bands, group in _by_bands(scenes).items():
        suspicion = suspicious_order([evidence for _, evidence in group])
        name, positions = suspicion or ("as named", [])
        stands = [k for k, (_, evidence) in enumerate(group) if k not in positions and _supports(evidence)]
        for k, (path, evidence) in enumerate(group):
            if k in positions and evidence.misplaces_cirrus and name == _ELSEWHERE:
                suggested[path] = (
                    bands,
                    f"the likely order is wrong, look it up: {_cirrus_found(evidence)}",
                )
            elif k in positions or (positions and name != _ELSEWHERE and not stands):
                why = _cirrus_found(evidence) if evidence.misplaces_cirrus else "so the bands of most vary together"
                suggested[path] = evidence.orders[name], f"by the pixels {name}: {why}"
            elif k in stands:
                suggested[path] = bands, "the likely order, and the pixels agree"
            else:
                suggested[path] = bands, "the likely order; its pixels do not tell"
    return suggested


def with_descriptions(file: str, order: str) -> str:
    """The command line that writes a copy of a stack with the bands' names in it."""
    script = f"import rasterio; f = rasterio.open('OUT.tif', 'r+'); f.descriptions = '{order}'.split(); f.close()"
    return f'{copied(file)} && python -c "{script}"'


def _by_bands(
    scenes: Sequence[tuple[str, OrderEvidence]],
) -> dict[tuple[str, ...], list[tuple[str, OrderEvidence]]]:
    groups: dict[tuple[str, ...], list[tuple[str, OrderEvidence]]] = {}
    for path, evidence in scenes:
        groups.setdefault(evidence.bands, []).append((path, evidence))
    return groups


def _supports(evidence: OrderEvidence) -> bool:
    """Whether a scene's pixels speak for the order that its names say."""
    if evidence.cirrus is not None:
        return not evidence.misplaces_cirrus
    return evidence.tells and evidence.nearest == "as named"


def _cirrus_found(evidence: OrderEvidence) -> str:
    position = evidence.cirrus or 0
    return (
        f"band {position + 1} of {len(evidence.bands)} ({evidence.bands[position]} in that order) lies far below all "
        f"others, at a median of {evidence.cirrus_median:g}, and hardly varies, as B10 alone does"
    )
