"""RUN/report.html: what a run was fed, how it went, and what its backbone sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_geo import figures
from ssl_geo.reporting.page import Page, Picture, Section, Table

CLUSTERS = 6
QUERIES = 3  # chips whose nearest neighbours are shown
NEIGHBOURS = 5
_DATES = 12  # lines of the table of dates
Images = Sequence[npt.NDArray[np.float32]]


@dataclass(frozen=True)
class RunMaterial:
    """What the page of a run is made of.

    Attributes:
        name: Of the run.
        backbone: What was trained, in words.
        steps: Updates done.
        log: Lines of RUN/log.jsonl.
        settings: Text of RUN/config.yaml.
        bands: Names of the channels.
        mean: (C,) reflectance that chips are standardized with.
        std: (C,) likewise.
        images: (C, H, W) reflectance of some chips.
        valid: (H, W) each.
        views: Of the first of them, standardized (C, h, w) each, the global ones first.
        layers: Features (M, D, h, w) of the first M of them, by layer.
        attention: (M, heads, h, w) of the class token, or None.
        embeddings: (N, D) of all of them.
        chips: Chips in the index.
        chip_size: In pixels.
        said: Lines about the index.
        warnings: Lines that were printed of the imagery when the run began.
        scenes: Scenes that chips are from.
        dates: Chips by date of acquisition, None where it is not known.
        bounds: (N, 4) left, bottom, right, top in degrees, or None without georeferencing.
    """

    name: str
    backbone: str
    steps: int
    log: Sequence[Mapping[str, float | None]]
    settings: str
    bands: Sequence[str]
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    images: Images
    valid: Sequence[npt.NDArray[np.bool_]]
    views: Sequence[Images]
    layers: Mapping[str, npt.NDArray[np.float32]]
    attention: npt.NDArray[np.float32] | None
    embeddings: npt.NDArray[np.float32]
    chips: int
    chip_size: int
    said: Sequence[str]
    warnings: Sequence[str]
    scenes: int
    dates: Mapping[Any, int]
    bounds: npt.NDArray[np.float64] | None


def pretraining_page(run: RunMaterial) -> Page:
    """The page of a run."""
    last = run.log[-1] if run.log else {}
    facts = [(f"{run.steps:,}", "steps"), (f"{run.chips:,}", f"chips of {run.chip_size}×{run.chip_size} pixels")]
    facts += [(f"{run.scenes:,}", "scenes"), (str(len(run.bands)), "bands")]
    for key, form, what in (
        ("loss", ".3f", "loss at the end"),
        ("effective_rank", ".1f", "effective rank of the embeddings"),
        ("knn_accuracy", ".1%", "of chips find their kind among other scenes"),
        ("samples_per_s", ",.0f", "chips a second"),
    ):
        if (value := last.get(key)) is not None:
            facts.append((f"{value:{form}}", what))
    if skipped := last.get("skipped"):
        facts.append((f"{skipped:,.0f}", "steps that were not finite and changed nothing"))
    shown = [
        figures.composite(image, run.bands, valid=valid) for image, valid in zip(run.images, run.valid, strict=True)
    ]
    return Page(
        title=f"Pretraining run {run.name}",
        lead=f"{run.backbone}, pretrained with DINO on {run.chips:,} chips without a label.",
        facts=facts,
        warnings=run.warnings,
        sections=[_curves(run), _fed(run), _features(run, shown), _neighbours(run, shown), _data(run), _settings(run)],
        foot="Written by python -m ssl_geo.pretrain; the curves' numbers are in log.jsonl beside this page.",
    )


def _curves(run: RunMaterial) -> Section:
    captions = {
        "loss": "Teacher's entropy plus what the student lacks to it. At ln K nothing has been learnt yet.",
        "entropy of the teacher": "Near ln K it answers evenly, near 0 with single prototypes: both are collapse.",
        "prototypes in use": "By the teacher, for all views of a step. A dozen or fewer: is it centered?",
        "effective rank": "Directions that the embeddings use; a collapsed run falls towards 1.",
        "share of time waiting for data": "Above a tenth, more workers or packed chips make the run faster.",
    }
    drawn = figures.training_curves(run.log)
    return Section("How it went", pictures=[Picture(drawn[title], captions.get(title, "")) for title in drawn])


def _fed(run: RunMaterial) -> Section:
    sheets = [
        figures.view_sheet(views, run.bands, run.mean, run.std, chip=(image, valid))
        for views, image, valid in zip(run.views, run.images, run.valid, strict=False)
    ]
    before = np.concatenate([image[:, valid] for image, valid in zip(run.images, run.valid, strict=True)], axis=1)
    after = (before - run.mean[:, None]) / run.std[:, None]
    spread = figures.statistics_chart(before[:, None], after[:, None], run.bands)
    return Section(
        "Views that were fed",
        "The same draws as in the first epoch. Of one chip the teacher sees the global views, the student all; both "
        "must give one answer.",
        [
            *(Picture(sheet, wide=True) for sheet in sheets),
            Picture(
                spread,
                "Reflectance of the chips shown here, and what the network gets: 5 to 95 % thin, quartiles thick, "
                "median a dot. After standardizing every band should lie around 0.",
                wide=True,
            ),
        ],
    )


def _features(run: RunMaterial, shown: Images) -> Section:
    layer = figures.readable_layer(run.layers)
    features, count = run.layers[layer], len(run.layers[layer])
    height, width = features.shape[2:]
    asked = [figures.central_place(valid, (height, width)) for valid in run.valid[:count]]
    pictures = [
        Picture(
            figures.pca_sheet(shown[:count], dict(run.layers)),
            "The three main components of each layer's features as red, green and blue, from the first layer to the "
            "last; within a column equal colours are equal features, in all chips.",
            wide=True,
        ),
        Picture(
            figures.similarity_sheet(shown[:count], features, asked),
            f"Cosine similarity to the ringed place, by {layer}: red is alike, white unrelated, blue opposed.",
            wide=True,
        ),
        Picture(
            figures.segment_sheet(shown[:count], features, min(CLUSTERS, count * height * width)),
            f"k-means on the features of {layer}: groups that no label was needed for, the same in all chips.",
            wide=True,
        ),
    ]
    if run.attention is not None:
        pictures.append(
            Picture(
                figures.attention_sheet(shown[:count], run.attention),
                "Where the class token looks in the last block, from dark (not at all) to bright.",
                wide=True,
            )
        )
    grids = ", ".join(f"{name} {maps.shape[2]}×{maps.shape[3]}" for name, maps in run.layers.items())
    return Section("What the backbone sees", f"The teacher's features, in places a chip: {grids}.", pictures)


def _neighbours(run: RunMaterial, shown: Images) -> Section:
    queries = np.linspace(0, len(shown) - 1, min(QUERIES, len(shown))).astype(int).tolist()
    sheet = figures.nearest_sheet(shown, run.embeddings, queries, NEIGHBOURS)
    return Section(
        "Chips alike",
        pictures=[
            Picture(sheet, f"Nearest of {len(shown)} chips by the cosine similarity of their embeddings.", wide=True)
        ],
    )


def _data(run: RunMaterial) -> Section:
    pictures = []
    if run.bounds is not None:
        drawn = figures.footprints_map(run.bounds)
        pictures.append(Picture(drawn, "Where the chips lie; small ones are drawn larger than they are."))
    bands = [[band, f"{mean:.4f}", f"{std:.4f}"] for band, mean, std in zip(run.bands, run.mean, run.std, strict=True)]
    dates = sorted(run.dates.items(), key=lambda item: str(item[0]))
    rows = [["not known" if day is None else str(day)[:10], f"{count:,}"] for day, count in dates]
    if len(rows) > _DATES:
        months = Counter[str]()
        for day, count in dates:
            months["not known" if day is None else str(day)[:7]] += count
        rows = [[month, f"{count:,}"] for month, count in months.items()]
    return Section(
        "What data went in",
        pictures=pictures,
        tables=[Table(["band", "mean reflectance", "standard deviation"], bands), Table(["date", "chips"], rows)],
        lines=run.said,
    )


def _settings(run: RunMaterial) -> Section:
    return Section("Settings", folded=[("config.yaml", run.settings)])
