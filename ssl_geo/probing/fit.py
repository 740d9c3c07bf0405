"""Train segmentation heads on stored features: all heads on all layers in one pass over the store."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ssl_geo.errors import tell
from ssl_geo.probing.metrics import IGNORED, collapse, confusion, miou
from ssl_geo.probing.report import Kind
from ssl_geo.probing.store import FeatureStore


@dataclass
class Fitted:
    """A head after training.

    Attributes:
        head: With the weights of its best epoch.
        layers: Layers that it reads, coarse to fine.
        best_epoch: Counted from 1; the one with the greatest validation mIoU; None without epochs.
        validation_miou: After each epoch.
        train_loss: Mean of each epoch.
        collapsed: What is wrong with it in a sentence, or None.
        retried: Whether these weights come from a second try.
        kind: How it was trained: a head by steps, the linear probe by L-BFGS.
    """

    head: nn.Module
    layers: list[str]
    best_epoch: int | None = None
    validation_miou: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    collapsed: str | None = None
    retried: bool = False
    kind: Kind = "head"


@dataclass(frozen=True)
class Recipe:
    """How heads are trained: AdamW without weight decay, linear warm-up, cosine to a thousandth of the peak.

    Attributes:
        epochs: Passes over the training chips.
        batch_size: Chips a step.
        lr: Peak learning rate.
        warmup: Share of the steps in which the learning rate rises.
        seed: Of the order of the chips.
    """

    epochs: int
    batch_size: int
    lr: float
    warmup: float
    seed: int


def class_weights(class_pixels: npt.NDArray[np.int64]) -> Tensor:
    """Inverse square root of each class's frequency (C,), with mean 1 over the pixels; 0 for classes without any.

    Args:
        class_pixels: (N, C) pixels of each chip and class.
    """
    counts = class_pixels.sum(axis=0).astype(np.float64)
    weights = np.where(counts > 0, 1 / np.sqrt(np.maximum(counts, 1)), 0)
    return torch.from_numpy((weights * counts.sum() / (weights * counts).sum()).astype(np.float32))


def train_heads(
    heads: Mapping[str, tuple[nn.Module, Sequence[str]]],
    store: FeatureStore,
    train: npt.NDArray[np.int64],
    validation: npt.NDArray[np.int64],
    num_classes: int,
    recipe: Recipe,
    *,
    weights: Tensor | None = None,
    device: torch.device | None = None,
    say: Callable[[str], None] = tell,
) -> dict[str, Fitted]:
    """Train all heads together, keep each one's best epoch on validation, and retry once those that collapsed.

    The heads share nothing but the batches: their losses are summed, so each gets the gradients it would get alone.

    Args:
        heads: By name, each with the layers it reads.
        store: Features and labels.
        train: Chips to train on.
        validation: Chips to choose the epoch by.
        num_classes: C.
        recipe: Of the training.
        weights: Per class, in the loss.
        device: Where to compute.
        say: Takes lines about retries.
    """
    fitted = {name: Fitted(head.to(device), list(layers)) for name, (head, layers) in heads.items()}
    first_weights = {name: copy.deepcopy(item.head.state_dict()) for name, item in fitted.items()}
    _train(fitted, store, train, validation, num_classes, recipe, weights, device)
    for name, item in fitted.items():
        if item.collapsed is None:
            continue
        say(f"{name}: {item.collapsed}; trained once more with a third of the learning rate and a longer warm-up")
        again = Fitted(item.head, item.layers, retried=True)
        again.head.load_state_dict(first_weights[name])
        gentle = Recipe(recipe.epochs, recipe.batch_size, recipe.lr / 3, 0.5, recipe.seed)
        _train({name: again}, store, train, validation, num_classes, gentle, weights, device)
        fitted[name] = again
    return fitted


def _train(
    fitted: Mapping[str, Fitted],
    store: FeatureStore,
    train: npt.NDArray[np.int64],
    validation: npt.NDArray[np.int64],
    num_classes: int,
    recipe: Recipe,
    weights: Tensor | None,
    device: torch.device | None,
) -> None:
    place = device or torch.device("cpu")
    layers = sorted({layer for item in fitted.values() for layer in item.layers})
    steps = recipe.epochs * math.ceil(len(train) / recipe.batch_size)
    parameters = [p for item in fitted.values() for p in item.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    factor, step = _warmup_cosine(steps, math.ceil(recipe.warmup * steps)), 0
    best: dict[str, dict[str, Any]] = {}
    generator = np.random.default_rng(recipe.seed)
    loss_weights = None if weights is None else weights.to(place)
    bar = tqdm(total=steps, unit="step", desc=f"{len(fitted)} heads", delay=2, dynamic_ncols=True)
    with bar:
        for epoch in range(1, recipe.epochs + 1):
            losses: dict[str, list[float]] = {name: [] for name in fitted}
            for item in fitted.values():
                item.head.train()
            for _, features, labels in store.batches(generator.permutation(train), recipe.batch_size, layers, place):
                bar.update()
                optimizer.param_groups[0]["lr"] = recipe.lr * factor(step)
                step += 1
                if bool((labels != IGNORED).any()):  # cross entropy over no pixel is NaN
                    terms = {}
                    for name, item in fitted.items():
                        logits = item.head([features[layer] for layer in item.layers], *labels.shape[-2:])
                        terms[name] = F.cross_entropy(logits, labels, loss_weights, ignore_index=IGNORED)
                    optimizer.zero_grad(set_to_none=True)
                    torch.autograd.backward(torch.stack(list(terms.values())).nansum())
                    optimizer.step()
                    for name, term in terms.items():
                        losses[name].append(float(term.detach()))
            for name, item in fitted.items():
                item.train_loss.append(float(np.mean(losses[name])) if losses[name] else 0.0)
            matrices = evaluate(fitted, store, validation, num_classes, recipe.batch_size, place)
            for name, item in fitted.items():
                reached = float(miou(matrices[name]))
                if not item.validation_miou or reached > max(item.validation_miou):
                    item.best_epoch = epoch
                    best[name] = copy.deepcopy(item.head.state_dict())
                item.validation_miou.append(reached)
    majority = int(np.bincount(store.labels[train].ravel(), minlength=256)[:num_classes].argmax())
    for name, item in fitted.items():
        item.head.load_state_dict(best[name])
    matrices = evaluate(fitted, store, validation, num_classes, recipe.batch_size, place)
    for name, item in fitted.items():
        item.collapsed = collapse(matrices[name], majority=majority, losses=item.train_loss)


def _warmup_cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """Factor of the learning rate at a step."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    return factor


@torch.no_grad()
def predict(
    fitted: Mapping[str, Fitted],
    store: FeatureStore,
    chips: npt.NDArray[np.int64],
    batch_size: int,
    device: torch.device | None = None,
) -> Iterator[tuple[str, npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.float32]]]:
    """Yield (head, chip numbers, classes (B, H, W), confidence (B, H, W)) batch by batch, every head on each batch."""
    layers = sorted({layer for item in fitted.values() for layer in item.layers})
    for item in fitted.values():
        item.head.eval()
    for part, features, labels in store.batches(chips, batch_size, layers, device or torch.device("cpu")):
        for name, item in fitted.items():
            logits = item.head([features[layer] for layer in item.layers], *labels.shape[-2:])
            confidence, classes = logits.softmax(dim=1).max(dim=1)
            yield name, part, classes.to(torch.uint8).cpu().numpy(), confidence.cpu().numpy()


def evaluate(
    fitted: Mapping[str, Fitted],
    store: FeatureStore,
    chips: npt.NDArray[np.int64],
    num_classes: int,
    batch_size: int,
    device: torch.device | None = None,
) -> dict[str, npt.NDArray[np.int64]]:
    """Confusion matrix of each head over some chips."""
    matrices = {name: np.zeros((num_classes, num_classes), np.int64) for name in fitted}
    for name, part, classes, _ in predict(fitted, store, chips, batch_size, device):
        matrices[name] += confusion(store.labels[part], classes, num_classes)
    return matrices
