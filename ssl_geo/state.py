"""What a run learns and a checkpoint holds: built from the settings, saved, gone back to. Used by the entries alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer

import ssl_geo
from ssl_geo.backbones import create_backbone, describe_backbone, drop_unused_tokens
from ssl_geo.config import PretrainConfig, to_dict
from ssl_geo.errors import UserError
from ssl_geo.imagery.chips import ChipIndex
from ssl_geo.methods.dino import DINO
from ssl_geo.schema import conform
from ssl_geo.training import distributed, schedules
from ssl_geo.training.distributed import Ranks
from ssl_geo.training.optimizers import adamw, set_step_values
from ssl_geo.training.precision import choose_dtype, widen_narrow_inputs
from ssl_geo.training.step import Skips, compile_networks
from ssl_geo.views.multicrop import MultiCrop


class _Group(TypedDict):
    params: list[int]
    lr: float
    weight_decay: float


class _Optimizer(TypedDict):
    state: dict[int, dict[str, Tensor]]
    param_groups: list[_Group]


class _Checkpoint(TypedDict):
    """As docs/design.md has it."""

    format: Literal[1]
    step: int
    skipped: int
    method: dict[str, Tensor]
    optimizer: _Optimizer
    scaler: dict[str, float]
    backbone: object  # for others than a resumed run, as the rest
    backbone_description: object
    config: object
    versions: object


class State:
    """What a checkpoint holds: the method, its optimizer, and how far the run is."""

    def __init__(
        self,
        config: PretrainConfig,
        index: ChipIndex,
        crops: MultiCrop,
        ranks: Ranks,
        checkpoint: dict[str, Any] | None = None,
    ) -> None:
        """Build it at step 0, or go back to where a checkpoint was.

        Raises:
            UserError: The checkpoint is of another backbone or head, or of a longer run.
        """
        dino, optim = config.dino, config.optim
        assert config.steps is not None  # all of these were filled in by resolve
        assert dino.out_dim is not None
        assert dino.teacher_momentum is not None
        assert dino.teacher_temp is not None
        assert dino.warmup_teacher_temp is not None
        assert dino.freeze_last_layer_steps is not None
        assert optim.lr is not None
        assert optim.warmup_steps is not None
        self.config, self.index, self.crops, self.device = config, index, crops, ranks.device
        self.step, self.steps, self.skips = 0, config.steps, Skips(ranks.device)
        self.dtype = choose_dtype(optim.precision, ranks.device)
        self._lr = partial(
            schedules.warmup_cosine,
            steps=config.steps,
            warmup_steps=optim.warmup_steps,
            peak=optim.lr * optim.batch_size / 256,
            end=optim.min_lr,
        )
        self._weight_decay = partial(
            schedules.cosine, steps=config.steps, start=optim.weight_decay[0], end=optim.weight_decay[1]
        )
        torch.manual_seed(config.seed)
        backbone = create_backbone(
            config.backbone.name,
            len(index.bands),
            [recipe.size for recipe in crops.recipes],
            weights=config.backbone.weights if checkpoint is None else None,
            bands=index.bands,
            checkpointing=config.backbone.checkpointing,
            **config.backbone.arguments,
        )
        drop_unused_tokens(backbone)
        self.method = DINO(
            backbone,
            out_dim=dino.out_dim,
            hidden_dim=dino.hidden_dim,
            bottleneck_dim=dino.bottleneck_dim,
            norm_last_layer=dino.norm_last_layer,
            freeze_last_layer_steps=dino.freeze_last_layer_steps,
            teacher_momentum=partial(schedules.cosine, steps=config.steps, start=dino.teacher_momentum, end=1.0),
            teacher_temp=partial(
                schedules.linear,
                steps=dino.warmup_teacher_temp_steps,
                start=dino.warmup_teacher_temp,
                end=dino.teacher_temp,
            ),
            student_temp=dino.student_temp,
            center_momentum=dino.center_momentum,
            one_pass_per_view=dino.one_pass_per_view,
        )
        self.method.to(ranks.device).to(memory_format=torch.channels_last)
        if ranks.device.type == "cpu" and self.dtype == torch.bfloat16:
            widen_narrow_inputs(self.method.student)
        if optim.compile:
            compile_networks([self.method.student.backbone, self.method.teacher.backbone], ranks.device)
        self.method.distribute(partial(distributed.wrap, ranks=ranks))
        self.optimizer = adamw(self.method.student)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.dtype == torch.float16)
        self._gsd = index.gsd
        if checkpoint is not None:
            self._load(checkpoint)

    def set_step_values(self, step: int) -> tuple[float, float]:
        """Give the optimizer the learning rate and weight decay of a step, and return them."""
        lr, weight_decay = self._lr(step), self._weight_decay(step)
        set_step_values(self.optimizer, lr=lr, weight_decay=weight_decay)
        return lr, weight_decay

    def description(self) -> dict[str, Any]:
        """What using the backbone needs (docs/design.md, checkpoint)."""
        return describe_backbone(
            self.method.backbone,
            bands=list(self.index.bands),
            mean=self.crops.mean.tolist(),
            std=self.crops.std.tolist(),
            scale=self.index.scale,
            offset=self.index.offset,
            chip_size=self.index.chip_size,
            gsd=self._gsd,
            method="dino",
            seed=self.config.seed,
            step=self.step,
        )

    def checkpoint(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "format": 1,
            "step": self.step,
            "skipped": self.skips.total,
            "backbone": self.method.backbone.state_dict(),
            "backbone_description": self.description(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": to_dict(self.config),
            "versions": {"ssl_geo": ssl_geo.__version__, "torch": str(torch.__version__)},
        }

    def _load(self, checkpoint: dict[str, Any]) -> None:
        conform(checkpoint, _Checkpoint, "the checkpoint")
        if min(checkpoint["step"], checkpoint["skipped"]) < 0:
            raise UserError("the checkpoint tells a negative number of steps; resume from the one before")
        _refuse_other_tensors(self.method.state_dict(), checkpoint["method"])
        own, given = (
            [len(group["params"]) for group in optimizer["param_groups"]]
            for optimizer in (self.optimizer.state_dict(), checkpoint["optimizer"])
        )
        if own != given:
            raise UserError(
                f"the checkpoint does not fit the settings: {given} tensors are trained with and without weight decay "
                f"where {own} are wanted; leave out what changes --dino.norm_last_layer, or start anew with --out"
            )
        if checkpoint["step"] > self.steps:
            raise UserError(f"--steps {self.steps} is less than the {checkpoint['step']} that the run has done")
        _refuse_other_moments(self.optimizer, checkpoint["optimizer"])
        self.method.load_state_dict(checkpoint["method"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.step = checkpoint["step"]
        self.skips = Skips(self.device, checkpoint["skipped"])


def _refuse_other_tensors(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Refuse a checkpoint whose tensors have other names or shapes than those of the run."""
    differ = [name for name in own.keys() | given.keys() if _shape(own, name) != _shape(given, name)]
    if differ:
        name = min(differ)
        raise UserError(
            f"the checkpoint does not fit the settings: {len(differ)} tensors differ, {name} is {_shape(given, name)} "
            f"where {_shape(own, name)} is wanted; leave out what changes --backbone, --dino or the size of views, or "
            "start anew with --out"
        )


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    if name not in tensors:
        return "missing"
    return f"{tuple(tensors[name].shape)} {str(tensors[name].dtype).removeprefix('torch.')}"


def _refuse_other_moments(optimizer: Optimizer, given: dict[str, Any]) -> None:
    """Refuse moments of other shapes or types than the parameters': the fused update writes as far as it is told.

    `Optimizer.load_state_dict` compares the number of parameters alone.
    """
    own = optimizer.state_dict()["param_groups"]
    for group, told in zip(own, given["param_groups"], strict=True):
        # `set_step_values` gives the other two before each step; what a version of torch did not know has its default.
        fixed = (group.keys() & told.keys() | {"betas", "eps"}) - {"lr", "weight_decay"}
        if differ := sorted(n for n in fixed if isinstance(told.get(n), Tensor) or told.get(n) != group[n]):
            raise UserError(f"the checkpoint's optimizer has another {differ[0]}; resume from the one before")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in given["state"].items():
        if not 0 <= number < len(parameters):
            raise UserError("the checkpoint's optimizer has moments of no parameter; resume from the one before")
        like = parameters[number].detach()
        wanted = {"step": torch.empty(()), "exp_avg": like, "exp_avg_sq": like}
        for name in wanted.keys() | moments.keys():
            if _shape(moments, name) != _shape(wanted, name):
                raise UserError(
                    f"the checkpoint's optimizer does not fit: {name} of parameter {number} is {_shape(moments, name)} "
                    f"where {_shape(wanted, name)} is wanted; resume from the checkpoint before"
                )
