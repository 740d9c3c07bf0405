"""The linear probe without a training loop: logistic regression by L-BFGS.

It standardizes the features and takes an L2 penalty on the weights (not on the bias), chosen on validation. The
features stay as they are stored (float16, memory-mapped): they are read in chunks, and the standardizing is folded into
the weights at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor

from ssl_geo.errors import UserError
from ssl_geo.probing.metrics import IGNORED, Floats, as_tensor, confusion, miou, refuse_other_labels

# Strong to weak: each start is the solution before it. λ of mean loss + λ/2 ‖W‖² on standardized features.
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
CHUNK = 4096  # rows read at once: 6 MB of float32 at 384 features
MEMORY = 2**30  # bytes of standardized features kept
NEVER = -1e4  # bias of a class that training does not hold
MAX_ITERATIONS = 300  # of L-BFGS for each penalty
TOLERANCE = 3e-4  # of the gradient's components; 1e-4 took 1.8 times as long on land cover, mIoU within 0.002
CHOOSING = 1e-3  # likewise where penalties are compared: half the time, mIoU within 0.002 down to a penalty of 0.001

Features = npt.NDArray[np.floating] | Tensor
Labels = npt.NDArray[np.integer] | Tensor


@dataclass(frozen=True)
class LinearProbe:
    """Logits = features @ weight.T + bias, of raw features.

    Attributes:
        weight: (C, D) float32.
        bias: (C,) float32; -10⁴ for a class without a training pixel, which is therefore never predicted.
        penalty: λ that it was fitted with.
        converged: Whether the optimizer ended before its limit of iterations.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    converged: bool

    def logits(self, features: Features) -> Tensor:
        """(N, D) features of any float type -> (N, C) float32 on the features' device."""
        device = features.device if isinstance(features, Tensor) else torch.device("cpu")
        weight, bias = self.weight.to(device), self.bias.to(device)
        logits = torch.empty(len(features), len(bias), device=device)
        for number, chunk in enumerate(_chunks(features)):
            torch.addmm(bias, chunk, weight.T, out=logits[number * CHUNK : (number + 1) * CHUNK])
        return logits

    def predict(self, features: Features) -> Tensor:
        """(N, D) features -> (N,) int64 class ids."""
        return self.logits(features).argmax(1)


def fit_linear(
    features: Features,
    labels: Labels,
    num_classes: int,
    penalty: float,
    *,
    class_weights: Floats | None = None,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> LinearProbe:
    """Multinomial logistic regression by L-BFGS (Liu & Nocedal 1989), the same minimum as scikit-learn's.

    Minimizes Σ w_y · cross entropy / Σ w_y + λ/2 ‖W‖² (scikit-learn's C = 1 / (λ N)).

    Args:
        features: (N, D), one row a pixel or token; numpy (memory-mapped, float16) or a tensor on any device.
        labels: (N,) class ids, `IGNORED` where there is none.
        num_classes: Number of classes C.
        penalty: λ.
        class_weights: (C,) w, all 1 by default.
        max_iterations: Of L-BFGS.
        tolerance: Greatest component of the gradient at which it ends.

    Returns:
        The probe.

    Raises:
        UserError: No labelled pixel, or features that are not finite.
    """
    training = _Training(features, labels, num_classes, class_weights)
    return next(_path(training, num_classes, [penalty], max_iterations, tolerance))


def choose_penalty(
    folds: Sequence[tuple[Features, Labels, Features, Labels]],
    num_classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    class_weights: Floats | None = None,
    tolerance: float = CHOOSING,
) -> dict[float, float]:
    """Validate penalties from strong to weak, each fit started at the one before it, until the mIoU falls.

    The counts of all folds are pooled before the mIoU is taken, so that a class needs to occur in one of them only.

    Args:
        folds: Features (N, D) and labels (N,) to fit on, features (M, D) and labels (M,) to validate on, of each.
        num_classes: Number of classes C.
        penalties: λ to try, as far as they help.
        class_weights: (C,) in the loss.
        tolerance: As of `fit_linear`.

    Returns:
        mIoU by penalty, from strong to weak as far as they were tried; the best is `strongest_of_best` of them.

    Raises:
        UserError: No labelled pixel to fit or to validate on, or features that are not finite.
    """
    if not all(bool((labels != IGNORED).any()) for _, _, _, labels in folds):
        raise UserError("no valid pixel in val to choose a penalty by: change --split.block or --split.fractions")
    order = sorted(penalties, reverse=True)
    trainings = [_Training(features, labels, num_classes, class_weights) for features, labels, _, _ in folds]
    paths = [_path(training, num_classes, order, MAX_ITERATIONS, tolerance) for training in trainings]
    tried: dict[float, float] = {}
    for penalty, probes in zip(order, zip(*paths, strict=True), strict=False):
        counts = [
            confusion(as_tensor(labels).cpu(), probe.predict(features).cpu(), num_classes)
            for probe, (_, _, features, labels) in zip(probes, folds, strict=True)
        ]
        reached = float(miou(np.sum(counts, axis=0)))
        falling = reached < max(tried.values(), default=0.0)
        tried[penalty] = reached
        if falling:  # weaker penalties fit the training rows ever closer, at the greatest cost
            break
    return tried


def strongest_of_best(tried: dict[float, float]) -> float:
    """The penalty with the highest mIoU; of equals the strongest."""
    return max(sorted(tried, reverse=True), key=lambda penalty: tried[penalty])


# --- shared ----------------------------------------------------------------------------------------------------------


def _path(
    training: _Training, num_classes: int, penalties: Sequence[float], max_iterations: int, tolerance: float
) -> Iterator[LinearProbe]:
    """The probes of penalties, each started at the solution before it."""
    classes, width = len(training.present), training.width
    values, vectors = torch.linalg.eigh(training.covariance())

    def objective(flat: Floats, penalty: float, scale: Tensor) -> tuple[float, Floats]:
        solution = torch.from_numpy(flat).view(classes, width + 1).to(scale.device)
        weight, bias = (solution[:, :width] * scale) @ vectors.T, solution[:, width]
        loss, slope = training.cross_entropy(weight, bias)
        loss += penalty / 2 * weight.square().sum().item()
        slope[:, :width] += penalty * weight
        slope[:, :width] = (slope[:, :width] @ vectors) * scale
        return loss, slope.cpu().numpy().ravel()

    weight, bias = torch.zeros_like(values).repeat(classes, 1), values.new_zeros(classes, 1)
    for penalty in penalties:
        if not (math.isfinite(penalty) and penalty > 0):
            raise ValueError(f"penalty {penalty}: a number greater than 0 is needed")
        # Variables in which the curvature is about 1 in every direction: that of cross entropy is at most half the
        # features' covariance (Böhning 1992), about 1 / classes of it where nothing is known yet.
        scale = (values.clamp(min=0) / classes + penalty).rsqrt()
        result = minimize(
            objective,
            torch.cat([weight @ vectors / scale, bias], 1).cpu().numpy().ravel(),
            args=(penalty, scale),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": max_iterations, "gtol": tolerance, "ftol": 1e-9, "maxcor": 20},
        )
        solution = torch.from_numpy(result.x).view(classes, width + 1).to(values.device)
        weight, bias = (solution[:, :width] * scale) @ vectors.T, solution[:, width:]
        # Of standardized features -> of raw ones; classes that training does not hold are never predicted.
        raw = weight / training.deviation
        full, offset = raw.new_zeros(num_classes, width), raw.new_full((num_classes,), NEVER)
        full[training.present] = raw
        offset[training.present] = bias[:, 0] - raw @ training.mean
        # Status 1 is the limit; 2, no lower value along the line, is the end of float32's precision.
        yield LinearProbe(full.float(), offset.float(), penalty, result.status != 1)


def _chunks(features: Features) -> Iterator[Tensor]:
    """Rows of the features as float32 tensors, CHUNK at a time."""
    for begin in range(0, len(features), CHUNK):
        yield as_tensor(features[begin : begin + CHUNK]).float()


class _Training:
    """Labelled rows, standardized: in memory as float32 where they fit MEMORY, else anew from the store each time.

    Attributes:
        present: (P,) the classes that occur.
        mean: (D,) of the features, float64.
        deviation: (D,) standard deviation, 1 for a constant feature.
        width: Number of features D.
    """

    def __init__(
        self,
        features: Features,
        labels: Labels,
        num_classes: int,
        class_weights: Floats | None,
    ) -> None:
        target = as_tensor(labels).long()
        if len(target) != len(features):
            raise ValueError(f"{len(features)} rows of features, {len(target)} labels")
        chosen = torch.nonzero(target != IGNORED)[:, 0]
        if not len(chosen):
            raise UserError("no valid pixel in train: change --split.block or --split.fractions")
        if len(chosen) < len(target):
            features = features[chosen if isinstance(features, Tensor) else chosen.cpu().numpy()]
            target = target[chosen]
        device = features.device if isinstance(features, Tensor) else target.device
        target = target.to(device)
        refuse_other_labels(target, num_classes)
        counts = torch.bincount(target, minlength=num_classes)
        self.present = torch.nonzero(counts)[:, 0]
        self._target = (torch.cumsum(counts > 0, 0) - 1)[target]
        of_class = np.ones(num_classes) if class_weights is None else np.asarray(class_weights, dtype=np.float64)
        weights = torch.from_numpy(of_class).to(device)[target]
        self._weights = (weights / weights.sum()).float()
        self._features = features
        self.width = int(features.shape[1])
        self.mean, self.deviation = self._standard()
        fits = features.shape[0] * self.width * 4 <= MEMORY
        self._kept = list(self._standardized()) if fits else None

    def _standard(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each feature, in two passes."""
        total = torch.stack([chunk.sum(0, dtype=torch.float64) for chunk in _chunks(self._features)]).sum(0)
        mean = total / len(self._features)
        if not bool(mean.isfinite().all()):
            raise UserError("features hold NaN or infinity: the backbone diverged; probe another checkpoint, --ckpt")
        spread = [(chunk - mean.float()).square().sum(0, dtype=torch.float64) for chunk in _chunks(self._features)]
        deviation = (torch.stack(spread).sum(0) / len(self._features)).sqrt()
        # A spread that is only the rounding of the mean is none.
        return mean, torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.ones_like(deviation))

    def _standardized(self) -> Iterator[Tensor]:
        mean, deviation = self.mean.float(), self.deviation.float()
        for chunk in _chunks(self._features):
            yield (chunk - mean) / deviation

    def _rows(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of standardized features (float32), positions in `present`, and weights that sum to 1 over all."""
        rows = self._standardized() if self._kept is None else self._kept
        for number, row in enumerate(rows):
            here = slice(number * CHUNK, (number + 1) * CHUNK)
            yield row, self._target[here], self._weights[here]

    def covariance(self) -> Tensor:
        """Weighted covariance (D, D) of the standardized features, float64."""
        gram, centre = self.mean.new_zeros(self.width, self.width), self.mean.new_zeros(self.width)
        for row, _, weight in self._rows():
            weighted = (row * weight[:, None]).T
            gram += weighted @ row
            centre += weighted.sum(1, dtype=torch.float64)
        return gram - centre[:, None] * centre

    def cross_entropy(self, weight: Tensor, bias: Tensor) -> tuple[float, Tensor]:
        """Weighted mean cross entropy of weight (P, D) and bias (P,), and its gradient (P, D + 1); float64."""
        loss, slope = self.mean.new_zeros(()), self.mean.new_zeros(len(bias), self.width + 1)
        weight, bias = weight.float(), bias.float()
        for row, truth, row_weight in self._rows():
            log_probability = torch.addmm(bias, row, weight.T).log_softmax(1)
            own = log_probability.gather(1, truth[:, None])
            loss -= (own[:, 0] * row_weight).sum(dtype=torch.float64)
            # The gradient with respect to the logits: probability less one-hot.
            error = log_probability.exp_()
            error.scatter_add_(1, truth[:, None], torch.full_like(own, -1))
            error *= row_weight[:, None]
            slope[:, :-1] += error.T @ row
            slope[:, -1] += error.sum(0, dtype=torch.float64)
        return loss.item(), slope
