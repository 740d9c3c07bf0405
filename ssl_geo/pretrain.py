"""Pretrain a backbone on unlabelled imagery with DINO: ``python -m ssl_geo.pretrain --help``."""

from __future__ import annotations

from ssl_geo.config import PROGRAM, PretrainConfig, pretrain_config, resolve, to_dict, to_yaml
from ssl_geo.errors import UserError, one_line_errors

if __name__ == "__main__":  # settings first: --help answers before torch is imported
    SETTINGS = pretrain_config()

import dataclasses
import datetime
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import ssl_geo
from ssl_geo.backbones import create_backbone, describe_backbone, export_backbone, required_multiple
from ssl_geo.imagery.chips import ChipIndex, cached_index
from ssl_geo.imagery.datasets import ChipDataset, dominant_labels
from ssl_geo.imagery.quickcheck import check_index
from ssl_geo.imagery.sample import ensure_sample
from ssl_geo.imagery.sensors import DEFAULT_BANDS
from ssl_geo.methods.dino import DINO
from ssl_geo.training import distributed, runs, schedules
from ssl_geo.training.distributed import Ranks
from ssl_geo.training.health import Monitor
from ssl_geo.training.optimizers import adamw, clip_gradients, set_step_values
from ssl_geo.training.precision import choose_dtype
from ssl_geo.training.progress import Progress
from ssl_geo.training.sampling import StepBatches
from ssl_geo.views.multicrop import MultiCrop, default_recipes
from ssl_geo.views.photometry import standardize_chip

SAMPLE = Path("data/sample")
Views: TypeAlias = list[npt.NDArray[np.float32]]  # of one chip, each (C, h, w)
MONITORED = 512  # chips whose embeddings are watched


def main(config: PretrainConfig) -> int:
    """Pretrain, or go on with a run: scene → chip → views → student and teacher → loss → run folder."""
    ranks = distributed.setup(config.device)
    say = print if ranks.main else (lambda *_: None)

    with ranks.main_first():
        index = chip_index(config)
    checked = check_index(index, seed=config.seed) if ranks.main and not config.resume else []
    for line in [*index.report(), *checked, *resolve(config, len(index), ranks.world)]:
        say(line)
    mean = np.array(config.data.mean or index.statistics.mean, dtype=np.float32)
    std = np.array(config.data.std or index.statistics.std, dtype=np.float32)
    patch_size = required_multiple(config.backbone.name, **config.backbone.arguments)
    global_views, local_views = default_recipes(config.data.chip_size, patch_size, **dataclasses.asdict(config.views))
    crops = MultiCrop(mean, std, global_views=global_views, local_views=local_views)
    state = State(config, index, crops, ranks)

    run = Path(config.resume or config.out or f"runs/pretrain-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    if config.resume:
        state.load(runs.load_checkpoint(run))
        say(f"going on with {run} from step {state.step} of {state.steps}")
    elif ranks.main:
        runs.claim(run)
        runs.write_atomically(run / "config.yaml", to_yaml(config).encode())
        index.save(run / "index.parquet")

    chips = ChipDataset(index)
    order = StepBatches(
        chips=len(index),
        batch_size=config.optim.batch_size,
        start=state.step,
        stop=state.steps,
        seed=config.seed,
        rank=ranks.rank,
        world=ranks.world,
    )
    loader = DataLoader(
        ViewsDataset(chips, crops, config.seed),
        batch_sampler=order,
        num_workers=default_workers(ranks.world) if config.data.workers is None else config.data.workers,
        collate_fn=collate,
        pin_memory=ranks.device.type == "cuda",
    )
    monitor = make_monitor(config, index, chips, crops) if ranks.main else None
    say(f"{run}: {config.backbone.name} on {ranks.device} in {str(state.dtype).removeprefix('torch.')}")
    with runs.Interruption() as interruption:
        train(config, ranks, state, loader, monitor, run, interruption)
    distributed.shutdown()
    if state.step < state.steps:
        say(f"{interruption.name}: saved at step {state.step} of {state.steps}; go on with --resume {run}")
        return runs.INTERRUPTED
    say(f"backbone of step {state.step}: {run / 'backbone.safetensors'} (plain timm loads it, see backbone.json)")
    return 0


def train(
    config: PretrainConfig,
    ranks: Ranks,
    state: State,
    batches: Iterable[list[Tensor]],
    monitor: Monitor | None,
    run: Path,
    interruption: runs.Interruption,
) -> None:
    """The loop, Algorithm 1 of arXiv 2104.14294: until the last step, or until a signal ends it early."""
    optim, log, method = config.optim, config.log, state.method
    with Progress(run, start=state.step, steps=state.steps, batch_size=optim.batch_size, main=ranks.main) as progress:
        for views in progress.timed(batches):
            step = state.step
            # What is random in a step (drop path) is a function of seed, step and rank: no random state to save.
            torch.manual_seed((config.seed * state.steps + step) * ranks.world + ranks.rank)
            lr, weight_decay = state.set_step_values(step)

            state.optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=ranks.device)
            for part in zip(*(view.chunk(optim.accumulate) for view in views), strict=True):
                with torch.autocast(ranks.device.type, state.dtype, enabled=state.dtype != torch.float32):
                    term = method.loss(
                        [view.to(ranks.device, non_blocking=True, memory_format=torch.channels_last) for view in part],
                        step,
                    )
                torch.autograd.backward(state.scaler.scale(term / optim.accumulate))
                loss += term.detach() / optim.accumulate
            loss = distributed.mean_over_ranks(loss)
            state.scaler.unscale_(state.optimizer)
            norm = clip_gradients(method.student.parameters(), optim.clip)

            if torch.isfinite(norm + loss):
                method.freeze_last_layer(step)
                state.scaler.step(state.optimizer)
                method.after_step(step)
                state.skipped_in_a_row = 0
            else:
                method.discard_step()
                state.skipped += 1
                state.skipped_in_a_row += 1
                progress.say(f"step {step}: not finite, skipped ({state.skipped} so far)")
                if state.skipped_in_a_row > optim.max_skipped:
                    raise UserError(
                        f"{state.skipped_in_a_row} steps in a row were not finite (--optim.max_skipped); start anew "
                        f"with a lower --optim.lr than {optim.lr}, or with --optim.precision fp32"
                    )
            state.scaler.update()
            state.step += 1

            progress.advance()
            last, interrupted = state.step == state.steps, distributed.any_rank(interruption.name is not None)
            watched = monitor is not None and (last or state.step % log.health_every == 0)
            if last or watched or state.step % log.every == 0:
                measures: dict[str, float | Tensor] = {
                    "lr": lr,
                    "weight_decay": weight_decay,
                    "skipped": state.skipped,
                    **method.health(),
                }
                if monitor is not None and watched:
                    measures |= monitor.measure(method.backbone)
                progress.record(state.step, loss, measures)
            if last or interrupted or state.step % log.checkpoint_every == 0:
                if ranks.main:
                    runs.save_checkpoint(run, state.step, state.checkpoint(), log.keep)
                    export_backbone(run, method.backbone, state.description())
                if interrupted:
                    break


class State:
    """What a checkpoint holds: the method, its optimizer, and how far the run is."""

    def __init__(self, config: PretrainConfig, index: ChipIndex, crops: MultiCrop, ranks: Ranks) -> None:
        dino, optim = config.dino, config.optim
        assert config.steps is not None  # all of these were filled in by resolve
        assert dino.out_dim is not None
        assert dino.teacher_momentum is not None
        assert dino.teacher_temp is not None
        assert dino.warmup_teacher_temp is not None
        assert dino.freeze_last_layer_steps is not None
        assert optim.lr is not None
        assert optim.warmup_steps is not None
        self.config, self.index, self.crops = config, index, crops
        self.step, self.steps, self.skipped, self.skipped_in_a_row = 0, config.steps, 0, 0
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
            weights=config.backbone.weights,
            bands=index.bands,
            **config.backbone.arguments,
        )
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
        self.method.distribute(partial(distributed.wrap, ranks=ranks))
        self.optimizer = adamw(self.method.student)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.dtype == torch.float16)

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
            gsd=10.0,
            method="dino",
            step=self.step,
        )

    def checkpoint(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "format": 1,
            "step": self.step,
            "skipped": self.skipped,
            "backbone": self.method.backbone.state_dict(),
            "backbone_description": self.description(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": to_dict(self.config),
            "versions": {"ssl_geo": ssl_geo.__version__, "torch": str(torch.__version__)},
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Go back to where a checkpoint was."""
        self.method.load_state_dict(checkpoint["method"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.skipped = checkpoint["step"], checkpoint["skipped"]


class ViewsDataset(Dataset[Views]):
    """Chips as views; a key is (epoch, chip), so that every draw is a function of it and the seed."""

    def __init__(self, chips: ChipDataset, crops: MultiCrop, seed: int) -> None:
        self.chips, self.crops, self.seed = chips, crops, seed

    def __getitem__(self, key: tuple[int, int]) -> Views:
        epoch, position = key
        chip = self.chips[position]
        return self.crops(chip.reflectance(), chip.valid, seed=self.seed, epoch=epoch, chip=position)


def collate(samples: list[Views]) -> list[Tensor]:
    """Stack the samples view by view: a list of (B, C, h, w)."""
    return [torch.from_numpy(np.stack(views)) for views in zip(*samples, strict=True)]


def chip_index(config: PretrainConfig) -> ChipIndex:
    """The chips of the run: RUN/index.parquet when resuming, else built from the imagery, or from the sample."""
    data = config.data
    if config.resume:
        return ChipIndex.load(Path(config.resume) / "index.parquet")
    if not data.paths:
        ensure_sample(SAMPLE)
    data.labels = data.labels or (None if data.paths else str(SAMPLE / "labels"))
    paths = [Path(p) for p in data.paths] or [SAMPLE / "images"]
    return cached_index(
        Path(data.cache).expanduser(),
        paths,
        bands=data.bands or DEFAULT_BANDS,
        chip_size=data.chip_size,
        band_names=data.band_names,
        level=data.level,
        scale=data.scale,
        offset=data.offset,
        nodata=data.nodata,
        min_valid=data.min_valid,
        allow_mixed=data.allow_mixed,
        max_unreadable=data.max_unreadable,
        statistics_chips=data.statistics_chips,
        seed=config.seed,
    )


def make_monitor(config: PretrainConfig, index: ChipIndex, chips: ChipDataset, crops: MultiCrop) -> Monitor:
    """A fixed random draw of chips, standardized whole, with their most frequent label where there are labels."""
    positions = np.random.default_rng(config.seed).permutation(len(index))[:MONITORED]
    labels = None
    if config.data.labels:
        labels = dominant_labels(index, positions, Path(config.data.labels))
        positions, labels = positions[labels >= 0], labels[labels >= 0]
    watched = [chips[int(p)] for p in positions]
    images = [standardize_chip(chip.reflectance(), chip.valid, crops.mean, crops.std) for chip in watched]
    scenes = index.scene_numbers(positions)
    return Monitor(
        torch.from_numpy(np.stack(images)),
        None if labels is None else torch.from_numpy(labels),
        torch.from_numpy(scenes.astype(np.int64)),
    )


def default_workers(world: int) -> int:
    """Loader processes of a rank: one less than the cores it has, at most 8."""
    return min(8, max(0, len(os.sched_getaffinity(0)) // world - 1))


if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        raise SystemExit(main(SETTINGS))
