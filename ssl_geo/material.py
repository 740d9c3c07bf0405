"""What the page of a run shows, gathered from its chips, its backbone and its log. Used by the entries alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_geo.backbones import load_backbone, required_multiple
from ssl_geo.batches import Chips, Keys
from ssl_geo.class_token import class_token_attention
from ssl_geo.config import PretrainConfig
from ssl_geo.imagery.places import lonlat_bounds
from ssl_geo.probing.features import FeatureExtractor, auto_layers
from ssl_geo.reporting.pretraining import RunMaterial
from ssl_geo.state import State
from ssl_geo.training.runs import kept_warnings
from ssl_geo.views.photometry import standardize_chip

REPORTED, FEATURED, VIEWED, LOCATED = 96, 4, 3, 4000  # chips on the page: embedded, their features, views, places


@torch.no_grad()
def run_material(
    config: PretrainConfig, state: State, chips: Chips, views_of: Callable[[Keys], list[Tensor]], run: Path
) -> RunMaterial:
    """What the page shows: chips evenly drawn from the index, their first views, what the backbone makes of them.

    Args:
        config: Of the run.
        state: At its end.
        chips: As stored.
        views_of: Makes the views (B, C, h, w) of a list of (epoch, chip) as the run does.
        run: Its folder.
    """
    index, crops, backbone = state.index, state.crops, load_backbone(run).to(state.device)
    numbers = np.unique(np.linspace(0, len(index) - 1, REPORTED).astype(int))
    numbers = np.random.default_rng(config.seed).permutation(numbers)
    read = [chips[int(number)] for number in numbers]
    images = [chip.reflectance() for chip in read]
    standardized = [standardize_chip(i, c.valid, crops.mean, crops.std) for i, c in zip(images, read, strict=True)]
    batch = torch.from_numpy(np.stack(standardized)).to(state.device)
    side = chips.chip_size // (multiple := required_multiple(backbone))
    batch = batch[..., : side * multiple, : side * multiple]  # what the patches of a ViT cover
    extractor = FeatureExtractor(backbone, auto_layers(backbone)[::-1], input_size=side * multiple)
    attention = class_token_attention(backbone, batch[:FEATURED])
    located = np.unique(np.linspace(0, len(index) - 1, LOCATED).astype(int))
    return RunMaterial(
        name=run.name,
        backbone=config.backbone.name,
        steps=state.step,
        log=[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()],
        settings=(run / "config.yaml").read_text(),
        bands=index.bands,
        mean=crops.mean,
        std=crops.std,
        images=[image[:, : side * multiple, : side * multiple] for image in images],
        valid=[chip.valid[: side * multiple, : side * multiple] for chip in read],
        views=[[view[0].cpu().numpy() for view in views_of([(0, int(number))])] for number in numbers[:VIEWED]],
        layers={name: maps.float().cpu().numpy() for name, maps in extractor(batch[:FEATURED]).items()},
        attention=None if attention is None else attention.float().cpu().numpy(),
        embeddings=torch.cat([backbone(part) for part in torch.split(batch, 64)]).float().cpu().numpy(),
        chips=len(index),
        chip_size=index.chip_size,
        said=index.report(),
        warnings=kept_warnings(run),
        scenes=len(np.unique(index.scene_numbers(np.arange(len(index))))),
        dates={line["values"].as_py(): line["counts"].as_py() for line in index.table["date"].value_counts()},
        bounds=lonlat_bounds(index, located),
    )
