"""Is something being learned? Measures of the representation while it trains, and a plain warning when it collapses."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_PROTOTYPES = 12  # for 128 views and more; healthy runs on small archives use 18 and more (docs/learning.md)


def embedding_health(embeddings: Tensor) -> dict[str, float]:
    """Spread of the embeddings of many different chips.

    `embedding_std` is the mean over dimensions of the standard deviation of the L2-normalized embeddings, times √D:
    1 for embeddings spread evenly over the sphere, 0 for a point (Chen & He 2021, arXiv 2011.10566, section 4.1).
    `effective_rank` is the exponential of the entropy of the normalized singular values of the centered embeddings
    (Roy & Vetterli 2007; as a measure of learned features RankMe, Garrido et al. 2023, arXiv 2210.02885).
    Both are NaN where an embedding is not finite, or so large that float32 does not hold the sum of all.

    Args:
        embeddings: (N, D), one row a chip.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    spread = unit.std(dim=0).mean() * math.sqrt(unit.shape[1])
    centered = embeddings.float() - embeddings.float().mean(dim=0)
    if not bool(centered.isfinite().all()):
        return {"embedding_std": math.nan, "effective_rank": math.nan}
    values = torch.linalg.svdvals(centered)
    share = values / values.sum().clamp_min(1e-12)
    entropy = -(share * torch.log(share.clamp_min(1e-12))).sum()
    rank = torch.exp(entropy) if values.sum() > 1e-9 else torch.zeros(())
    return {"embedding_std": spread.item(), "effective_rank": rank.item()}


def knn_accuracy(embeddings: Tensor, labels: Tensor, groups: Tensor, neighbours: int = 10) -> float:
    """Share of chips whose most similar chips of *other* scenes vote for their class (cosine similarity).

    Args:
        embeddings: (N, D), of two scenes or more.
        labels: (N,) class of each chip.
        groups: (N,) scene of each chip; a chip's own scene never votes, neighbouring chips are too alike.
        neighbours: Number of votes, weighted by similarity as in DINO's kNN (temperature 0.07).
    """
    unit = F.normalize(embeddings.float(), dim=1)
    similarity = unit @ unit.T
    similarity[groups[:, None] == groups[None, :]] = -math.inf
    votes, nearest = similarity.topk(min(neighbours, len(labels)), dim=1)
    weights = torch.exp(votes / 0.07)
    scores = torch.zeros(len(labels), int(labels.max()) + 1).scatter_add_(1, labels[nearest], weights)
    return float((scores.argmax(dim=1) == labels).float().mean())


def collapse_warning(measures: Mapping[str, float]) -> str | None:
    """Say in one sentence that the representation has collapsed, or None.

    Args:
        measures: `teacher_entropy`, `ln_k`, `prototypes_used`, `embedding_std`, `effective_rank` where known.
    """
    entropy, ln_k = measures.get("teacher_entropy", math.nan), measures.get("ln_k", math.nan)
    if entropy > 0.99 * ln_k:
        return f"the teacher answers evenly over all prototypes (entropy {entropy:.3f} of ln K = {ln_k:.3f})"
    if entropy < 0.01 * ln_k:
        return f"the teacher answers with single prototypes (entropy {entropy:.3f} of ln K = {ln_k:.3f})"
    used = measures.get("prototypes_used", math.inf)
    if used < FEW_PROTOTYPES:
        return f"the teacher answers all views with {used:.0f} of {math.exp(ln_k):,.0f} prototypes: is it centered?"
    if measures.get("embedding_std", 1.0) < 0.02:
        return f"all chips have nearly the same embedding (spread {measures['embedding_std']:.3f} of 1)"
    if measures.get("effective_rank", math.inf) < 2:
        return f"embeddings lie on a line (effective rank {measures['effective_rank']:.1f})"
    return None


def has_diverged(measures: Mapping[str, float]) -> bool:
    """Whether the embeddings that were measured are not finite: skipping steps does not help any more."""
    return math.isnan(measures["effective_rank"])


class Monitor:
    """A fixed set of chips whose embeddings are measured as the backbone trains.

    Args:
        images: (N, C, H, W) standardized chips.
        labels: (N,) class of each chip, or None where there are no labels.
        scenes: (N,) scene of each chip.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, scenes: Tensor) -> None:
        self.images, self.labels, self.scenes = images, labels, scenes

    @torch.no_grad()
    def measure(self, backbone: nn.Module, batch: int = 64) -> dict[str, float]:
        """Embed the chips in eval mode and measure; the backbone's mode and statistics stay as they were."""
        device = next(backbone.parameters()).device
        training = backbone.training
        backbone.eval()
        embeddings = torch.cat([backbone(part.to(device)).cpu() for part in torch.split(self.images, batch)])
        backbone.train(training)
        measures = embedding_health(embeddings)
        if self.labels is not None and not has_diverged(measures):
            measures["knn_accuracy"] = knn_accuracy(embeddings, self.labels, self.scenes)
        return measures
