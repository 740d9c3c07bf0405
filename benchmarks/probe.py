"""Probing several heads from one pass of the backbone, against training each head with passes of its own.

    python benchmarks/probe.py [--chips 48] [--epochs 3]

Both train a linear head on each of four layers and a conv_block head on all of them, on the same chips, with the same
steps. Ours runs the frozen backbone once over the chips and trains all heads together from the stored features; the
peer, as most probing scripts do, runs the backbone at every step of every head.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from paired import compare, finish, numbers

from ssl_geo.backbones import create_backbone
from ssl_geo.probing.features import FeatureExtractor, auto_layers
from ssl_geo.probing.fit import Recipe, train_heads
from ssl_geo.probing.heads import build_head
from ssl_geo.probing.store import extract

BANDS, SIDE, CLASSES, BATCH = 10, 64, 9, 16


def build_heads(extractor: FeatureExtractor) -> dict[str, tuple[torch.nn.Module, list[str]]]:
    """A linear head on each layer, a conv_block on all."""
    torch.manual_seed(0)
    heads = {
        f"linear @ {name}": (build_head("linear", [channels], CLASSES, reduction=[reduction]), [name])
        for name, channels, reduction in zip(extractor.names, extractor.channels, extractor.reduction, strict=True)
    }
    conv_block = build_head("conv_block", extractor.channels, CLASSES, reduction=extractor.reduction)
    return {**heads, "conv_block": (conv_block, extractor.names)}


def main() -> None:
    """Time both and print the figures."""
    given = numbers(__doc__, chips=48, epochs=3, rounds=3)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(given.chips, BANDS, SIDE, SIDE)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (given.chips, SIDE, SIDE)).astype(np.uint8)
    backbone = create_backbone("vit_small_patch16_224", BANDS, [(SIDE, SIDE)], patch_size=8).eval()
    extractor = FeatureExtractor(backbone, auto_layers(backbone), input_size=SIDE)
    everything = np.arange(given.chips)
    steps = given.epochs * -(-given.chips // BATCH)

    def ours(number: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = extract(
                extractor, lambda n: (images[n], labels[n]), given.chips, Path(folder), memory=2**30, batch_size=BATCH
            )
            recipe = Recipe(given.epochs, BATCH, 1e-3, 0.1, number)
            train_heads(build_heads(extractor), store, everything, everything[:8], CLASSES, recipe, say=lambda _: None)

    def peer(number: int) -> None:
        for head, layers in build_heads(extractor).values():
            optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.0)
            for _ in range(given.epochs):
                for part in np.split(np.random.default_rng(number).permutation(everything), steps // given.epochs):
                    with torch.no_grad():
                        features = extractor(torch.from_numpy(images[part]))
                    logits = head([features[layer] for layer in layers], SIDE, SIDE)
                    optimizer.zero_grad()
                    F.cross_entropy(logits, torch.from_numpy(labels[part]).long()).backward()
                    optimizer.step()

    pair = compare(ours, peer, given.rounds, warm=1)
    finish(
        "probe",
        pair.ratio,
        None,
        seconds=round(pair.ours, 2),
        seconds_peer=round(pair.peer, 2),
        heads=5,
        epochs=given.epochs,
        chips=given.chips,
        backbone="ViT-S/8, 64 px",
    )


if __name__ == "__main__":
    main()
