"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294), the paper on one page.

A student learns to answer, from any view of a chip, what its teacher answers from another, global view. The teacher
is the mean of the student over past steps. That both do not agree on one answer to everything is prevented by
centering (no prototype may dominate) and sharpening (the answer may not be even), section 3.1.

Where the paper leaves a choice, this follows the authors' code (facebookresearch/dino at 7c446df).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_geo.training import distributed

MANY_VIEWS = 128  # from which on prototypes in use are counted


class MultiCropWrapper(nn.Module):
    """Backbone and head over views of several sizes: one backbone pass for each size, one head pass for all.

    Args:
        backbone: (B, C, h, w) → (B, D); of a tuple the first element is taken (XCiT).
        head: (N, D) → (N, K).
        one_pass_per_view: Forward each view alone: less memory, more time. BatchNorm then has statistics of its own
            for each view instead of each size.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, one_pass_per_view: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.one_pass_per_view = one_pass_per_view

    def forward(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        """Forward the views of a batch.

        Args:
            views: One (B, C, h, w) or several, of any sizes in any order.

        Returns:
            (V·B, K), view after view in the order given, also where sizes alternate.
        """
        views = [views] if isinstance(views, Tensor) else views
        passes: dict[object, list[int]] = {}
        for position, view in enumerate(views):
            passes.setdefault(position if self.one_pass_per_view else view.shape[-2:], []).append(position)
        embeddings: dict[int, Tensor] = {}
        for positions in passes.values():
            output = self.backbone(torch.cat([views[p] for p in positions]))
            output = output[0] if isinstance(output, tuple) else output
            parts = torch.split(output, [len(views[p]) for p in positions])
            embeddings |= dict(zip(positions, parts, strict=True))
        logits: Tensor = self.head(torch.cat([embeddings[p] for p in range(len(views))]))
        return logits


class DINOHead(nn.Module):
    """Projection head: MLP with GELU, L2-normalized bottleneck, weight-normalized prototypes without bias.

    Section 3.1 and appendix C. Linear layers start from a normal of 0.02 truncated at ±2, biases from 0.

    Args:
        in_dim: Width D of the embedding.
        out_dim: Number K of prototypes.
        hidden_dim: Width between the layers.
        bottleneck_dim: Width before the prototypes.
        layers: Linear layers of the MLP, the bottleneck included.
        norm_last_layer: Keep the prototypes at length 1; else their lengths are trained (the authors do so for ViT-S).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers is {layers}; the head needs at least 1")
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        modules: list[nn.Module] = []
        for before, after in pairwise(widths):
            linear = nn.Linear(before, after)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            modules += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-1])
        self.last_layer = Prototypes(bottleneck_dim, out_dim, norm_last_layer)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map embeddings (N, D) to logits (N, K); with prototypes of length 1 they are cosines."""
        bottleneck = self.mlp(embeddings)
        half = bottleneck.dtype in (torch.float16, torch.bfloat16)
        logits: Tensor = self.last_layer(F.normalize(bottleneck, dim=-1, eps=1e-6 if half else 1e-12))
        return logits


class Prototypes(nn.Module):
    """Linear layer without bias whose rows have length `norm` and a trained direction.

    Salimans & Kingma 2016, arXiv 1602.07868. Written out, as `nn.utils.weight_norm` breaks deepcopy and its
    parametrization renames the keys of the state dict.

    Args:
        in_features: Width of the bottleneck.
        out_features: Number of prototypes.
        fixed_norm: Whether the lengths stay at 1.
    """

    def __init__(self, in_features: int, out_features: int, fixed_norm: bool) -> None:
        super().__init__()
        # The initial length of `weight` does not change the output but, under Adam, how fast directions turn:
        # the initialization of nn.Linear, as in the authors' code.
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.norm = nn.Parameter(torch.ones(out_features, 1), requires_grad=not fixed_norm)

    def forward(self, bottleneck: Tensor) -> Tensor:
        """(N, D) → (N, K)."""
        # norm · weight / ‖weight‖ and its gradient in one pass each; what nn.utils.weight_norm calls.
        return F.linear(bottleneck, torch._weight_norm(self.weight, self.norm, 0))


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's answer to a global view and the student's to every other view.

    Equation 3 of the paper, with the centering and sharpening of section 3.1, in float32 whatever autocast says
    (float64 stays so). For V views, the first two of them global, the mean over a batch of B and over 2·V - 2 pairs.
    Slow version::

        student = student_logits.chunk(V)
        teacher = teacher_logits.chunk(2)
        terms = []
        for i, t in enumerate(teacher):
            for j, s in enumerate(student):
                if i != j:
                    q = softmax((t - center) / teacher_temp)
                    terms.append(-(q * log_softmax(s / student_temp)).sum(-1).mean())
        loss = mean(terms)

    Args:
        out_dim: Number K of prototypes.
        student_temp: Temperature of the student's softmax.
        center_momentum: Of the center's exponential moving average.

    Attributes:
        center: (1, K) buffer, moving average of the mean raw teacher logits over all ranks (equation 4).
    """

    center: Tensor

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Compute the loss with the center as it is, and then move the center: one whole step in one call.

        Args:
            student_logits: (V·B, K), view after view, the global views first.
            teacher_logits: (2·B, K), of the global views.
            teacher_temp: Temperature of the teacher's softmax.

        Returns:
            Scalar; ln K where both answer evenly.

        Raises:
            ValueError: Shapes that do not belong together.
        """
        loss = self.cross_entropy(student_logits, teacher_logits, teacher_temp)
        self.update_center(_single(teacher_logits).mean(dim=0, keepdim=True))
        return loss

    def cross_entropy(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Compute the loss and leave the center alone; arguments as in `forward`."""
        return self.compare(student_logits, self.sharpen(teacher_logits, teacher_temp))

    @torch.no_grad()
    def sharpen(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Turn teacher logits into the probabilities that the student is to match: centered, sharpened, float32."""
        return F.softmax((_single(teacher_logits) - self.center) / teacher_temp, dim=-1)

    def compare(self, student_logits: Tensor, probabilities: Tensor) -> Tensor:
        """Average the cross-entropy over pairs and batch, one student view at a time (`_CrossEntropy`)."""
        batch, odd = divmod(len(probabilities), 2)
        views = len(student_logits) // max(batch, 1)
        if odd or views < 2 or student_logits.shape != (views * batch, probabilities.shape[1]):
            raise ValueError(
                f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(probabilities.shape)}: "
                "must be (V·B, K) and (2·B, K) with V of at least 2"
            )
        total: Tensor = _CrossEntropy.apply(student_logits, probabilities, self.student_temp)
        return total / (batch * (2 * views - 2))

    @torch.no_grad()
    def update_center(self, mean_logits: Tensor, finite: Tensor | None = None) -> None:
        """Move the center towards the mean raw teacher logits (1, K) of this rank's batch, averaged over ranks.

        Args:
            mean_logits: (1, K).
            finite: Boolean scalar; where it is False the center stays.
        """
        mean_logits = distributed.mean_over_ranks(mean_logits).to(self.center.dtype)
        moved = self.center.lerp(mean_logits, 1 - self.center_momentum)
        self.center.copy_(moved if finite is None else torch.where(finite, moved, self.center))


class _CrossEntropy(torch.autograd.Function):
    """Sum of -⟨q, log softmax(s / temp)⟩ over the pairs of unlike views and the batch; gradient for s alone.

    All pairs of one student view are a single product, with the sum of the teacher's probabilities in them, and their
    gradient is pairs · softmax(s / temp) - that sum. So nothing of all views is made but the gradient; beside it single
    (B, K) tensors, in float32 unless the logits are float64.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, probabilities: Tensor, temp: float) -> Tensor:
        ctx.save_for_backward(logits, probabilities)
        ctx.temp = temp
        total = probabilities.new_zeros(())
        for view, wanted, _ in _pairs(logits, probabilities):
            total -= F.log_softmax(_single(view) / temp, dim=-1).mul_(wanted).sum()
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, probabilities = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        scale = upstream / ctx.temp
        parts = gradient.chunk(2 * len(logits) // len(probabilities))
        for part, (view, wanted, pairs) in zip(parts, _pairs(logits, probabilities), strict=True):
            part.copy_(F.softmax(_single(view) / ctx.temp, dim=-1).mul_(pairs).sub_(wanted).mul_(scale))
        return gradient, None, None


def _pairs(logits: Tensor, probabilities: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Each student view's logits (B, K), the sum of the teacher's probabilities (B, K) over its pairs, their number."""
    first, second = probabilities.chunk(2)
    both = first + second
    for number, view in enumerate(logits.chunk(len(logits) // len(first))):
        yield view, (second, first, both)[min(number, 2)], 1 if number < 2 else 2


class DINO(nn.Module):
    """Student, teacher and loss.

    A step of training is::

        for micro-batch in batch:
            method.loss(views, step) / micro-batches, backward
        clip the gradients of method.student
        method.freeze_last_layer(step)
        optimizer step
        method.after_step(step)

    Dropout and drop path are off in the teacher; its BatchNorms stay in training mode and normalize with the batch at
    hand, as in the authors' code, where running statistics are not averaged from the student's either: they are those
    of the global views that the teacher saw, under its own weights, and are what the exported backbone uses.

    Args:
        backbone: (B, C, h, w) → (B, D); becomes the student's.
        embed_dim: D; default: what the backbone declares (timm's `head_hidden_size` or `num_features`).
        out_dim: Number K of prototypes.
        hidden_dim: Width of the head.
        bottleneck_dim: Width before the prototypes.
        norm_last_layer: Keep the prototypes at length 1.
        freeze_last_layer_steps: Steps at the start in which the prototypes stay as they are.
        teacher_momentum: Of the teacher's moving average, by step.
        teacher_temp: Temperature of the teacher's softmax, by step.
        student_temp: Temperature of the student's softmax.
        center_momentum: Of the center's moving average.
        one_pass_per_view: See `MultiCropWrapper`.

    Attributes:
        student: What is trained; always the bare module, whatever `distribute` wraps around it.
        teacher: Moving average of the student; without gradient.
        criterion: The loss, with the center.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        out_dim: int,
        teacher_momentum: Callable[[int], float],
        teacher_temp: Callable[[int], float],
        embed_dim: int | None = None,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        freeze_last_layer_steps: int = 0,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        one_pass_per_view: bool = False,
    ) -> None:
        super().__init__()
        width = embed_dim or getattr(backbone, "head_hidden_size", None) or getattr(backbone, "num_features", None)
        if not isinstance(width, int):
            raise TypeError("the backbone does not declare the width of its embedding: give embed_dim")
        head = DINOHead(width, out_dim, hidden_dim, bottleneck_dim, norm_last_layer=norm_last_layer)
        self.student = MultiCropWrapper(backbone, head, one_pass_per_view)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        assert not _storages(self.student) & _storages(self.teacher), "the teacher must not share memory"
        self.criterion = DINOLoss(out_dim, student_temp, center_momentum)
        self.freeze_last_layer_steps = freeze_last_layer_steps
        self.teacher_momentum = teacher_momentum
        self.teacher_temp = teacher_temp
        # What runs the student: a function and no submodule, so that a wrapper stays out of the state dict.
        self._run_student: Callable[[Sequence[Tensor]], Tensor] = self.student.__call__
        # Of each micro-batch since the last step: the sum of the raw teacher logits and their number of rows.
        self._pending: list[tuple[Tensor, int]] = []
        self._statistics_before: list[Tensor] = []
        self._health: dict[str, Tensor] = {}
        self.train()

    @property
    def backbone(self) -> nn.Module:
        """What is exported: the teacher's backbone (section 3.1: it is better than the student's all through)."""
        return self.teacher.backbone

    def train(self, mode: bool = True) -> DINO:
        """Set the mode; of the teacher only what keeps running statistics is ever in training mode."""
        super().train(mode)
        self.teacher.eval()
        for module in self.teacher.modules():
            module.training = mode and hasattr(module, "running_mean")
        return self

    def distribute(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Train on all ranks together: BatchNorm over all of them, everywhere the main rank's weights.

        Args:
            wrap: Puts a module that averages gradients around the student, or nothing.
        """
        for network in (self.student, self.teacher):
            distributed.sync_batchnorm(network)
            distributed.broadcast(network)
        self._run_student = wrap(self.student).__call__

    def loss(self, views: Sequence[Tensor], step: int) -> Tensor:
        """Compute the loss of a micro-batch.

        Args:
            views: Each (B, C, h, w), standardized, the two global ones first.
            step: Optimizer steps done so far.

        Returns:
            Scalar, with gradient for the student.
        """
        assert len(views) >= 2, "two global views and any number of others"
        if not self._pending:
            self._statistics_before = [buffer.clone() for buffer in self._running_statistics()]
        self.train(self.training)  # whoever looked at the backbone in eval mode may have left its BatchNorms so
        with torch.no_grad():
            teacher_logits = _single(self.teacher(views[:2]))
            self._pending.append((teacher_logits.sum(dim=0, keepdim=True), len(teacher_logits)))
            probabilities = self.criterion.sharpen(teacher_logits, self.teacher_temp(step))
            entropy = torch.special.entr(probabilities).sum(dim=-1).mean()
            used = torch.special.entr(probabilities.mean(dim=0)).sum().exp()
        loss = self.criterion.compare(self._run_student(views), probabilities)
        self._health = {"teacher_entropy": entropy, "kl": loss.detach() - entropy}
        if len(probabilities) >= MANY_VIEWS:
            self._health["prototypes_used"] = used
        return loss

    def freeze_last_layer(self, step: int) -> None:
        """Drop the gradients of the prototypes during the first steps; to be called after clipping.

        Dropped, not zeroed, so that AdamW neither decays the prototypes nor gathers moments for them.
        """
        if step < self.freeze_last_layer_steps:
            for parameter in self.student.head.get_submodule("last_layer").parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_step(self, step: int, finite: Tensor | None = None) -> None:
        """Move the center and then, by moving average, the teacher; to be called after the optimizer's step.

        The center is moved once, by the mean over all micro-batches and ranks.

        Args:
            step: Optimizer steps done before.
            finite: Boolean scalar on the device; where it is False the step is forgotten: center and teacher stay, and
                BatchNorm statistics go back to what they were (the optimizer's step is the caller's to skip). Nothing
                waits to see which it is.
        """
        sums, rows = zip(*self._pending, strict=True)
        self._pending.clear()
        self.criterion.update_center(torch.stack(sums).sum(dim=0) / sum(rows), finite)
        student: list[Tensor] = list(self.student.parameters())
        teacher: list[Tensor] = list(self.teacher.parameters())
        weight = 1 - self.teacher_momentum(step)
        if finite is None:
            torch._foreach_lerp_(teacher, student, weight)
            return
        torch._foreach_lerp_(teacher, student, [weight * finite] * len(student))
        for buffer, before in zip(self._running_statistics(), self._statistics_before, strict=True):
            torch.where(finite, buffer, before, out=buffer)

    def health(self) -> dict[str, Tensor]:
        """Measures of the last micro-batch on this rank, as scalars on the device: no wait for it.

        Returns:
            `teacher_entropy`: mean entropy of the teacher's answers, 0 to ln K; `kl`: mean divergence of the student's
            answers from them (the loss less the entropy); `ln_k`; `prototypes_used`: exponential of the entropy of the
            mean answer, 1 to K, of `MANY_VIEWS` or more, as fewer need few. Nothing before the first batch. Entropy
            at ln K or at 0 with a divergence of 0 is collapse (section 5.3, figure 7); ever fewer prototypes are the
            way to it.
        """
        if not self._health:
            return {}
        return {**self._health, "ln_k": torch.tensor(math.log(self.criterion.center.shape[1]))}

    def _running_statistics(self) -> list[Tensor]:
        names = ("running_mean", "running_var", "num_batches_tracked")
        return [
            buffer
            for network in (self.student, self.teacher)
            for name, buffer in network.named_buffers()
            if name.endswith(names)
        ]


def _single(tensor: Tensor) -> Tensor:
    """A tensor of half precision in single, others as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _storages(module: nn.Module) -> set[int]:
    """Addresses of all memory that a module's state lies in."""
    return {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
