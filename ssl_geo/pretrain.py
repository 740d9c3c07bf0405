"""Pretrain a backbone on unlabelled imagery with DINO: ``python -m ssl_geo.pretrain --help``."""

from __future__ import annotations

from ssl_geo.config import PROGRAM, PretrainConfig, pretrain_config, to_dict, to_yaml
from ssl_geo.errors import UserError, one_line_errors

if __name__ == "__main__":  # settings first: --help answers before torch is imported
    SETTINGS = pretrain_config()

import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import ssl_geo
from ssl_geo.backbones import (
    create_backbone,
    describe_backbone,
    drop_unused_tokens,
    export_backbone,
    load_backbone,
    required_multiple,
)
from ssl_geo.class_token import class_token_attention
from ssl_geo.imagery.chips import ChipIndex, cached_index
from ssl_geo.imagery.datasets import ChipDataset, dominant_labels
from ssl_geo.imagery.packed import PackedChips, open_chips, packed_folder, packed_index
from ssl_geo.imagery.places import lonlat_bounds
from ssl_geo.imagery.quickcheck import check_index
from ssl_geo.imagery.sample import ensure_sample
from ssl_geo.imagery.scenes import UnreadableError
from ssl_geo.imagery.sensors import DEFAULT_BANDS
from ssl_geo.methods.dino import DINO
from ssl_geo.presets import resolve
from ssl_geo.probing.features import FeatureExtractor, auto_layers
from ssl_geo.reporting.page import write_page
from ssl_geo.reporting.pretraining import RunMaterial, pretraining_page
from ssl_geo.resuming import resume_changes
from ssl_geo.training import distributed, runs, schedules
from ssl_geo.training.distributed import Ranks
from ssl_geo.training.feeding import feed
from ssl_geo.training.health import Monitor
from ssl_geo.training.memory import keep_freed_memory, on_device
from ssl_geo.training.optimizers import adamw, set_step_values
from ssl_geo.training.pace import data_pace
from ssl_geo.training.precision import choose_dtype
from ssl_geo.training.progress import Progress
from ssl_geo.training.sampling import StepBatches
from ssl_geo.training.step import Skips, compile_networks, train_step
from ssl_geo.views.batched import BatchedMultiCrop, ChipBatch, draw_table
from ssl_geo.views.multicrop import MultiCrop, default_recipes
from ssl_geo.views.photometry import standardize_chip

SAMPLE = Path("data/sample")
Chips: TypeAlias = ChipDataset | PackedChips
Keys: TypeAlias = Sequence[tuple[int, int]]  # (epoch, chip) of a batch: every draw is a function of them and the seed
MEASURED = 9  # chips that are read before the start, to foresee the pace
MONITORED = 512  # chips whose embeddings are watched
REPORTED, FEATURED, VIEWED, LOCATED = 96, 4, 3, 4000  # chips on the page: embedded, their features, views, places


def main(config: PretrainConfig) -> int:
    """Pretrain, or go on with a run, until it is done or told to stop; returns the exit code."""
    with runs.Interruption() as interruption:
        try:
            with interruption.at_once():
                run = prepare(config)
        except runs.Stopped:
            folder = Path(config.resume or config.out or "")
            again = f"go on with --resume {folder}" if runs.is_run(folder) else "run the same command again"
            print(f"{interruption.name}: stopped before the first step; {again}")
            return runs.INTERRUPTED
        train(config, run, interruption)
    distributed.shutdown()
    state = run.state
    if state.step < state.steps:
        run.say(f"{interruption.name}: saved at step {state.step} of {state.steps}; go on with --resume {run.folder}")
        return runs.INTERRUPTED
    run.say(
        f"backbone of step {state.step}: {run.folder / 'backbone.safetensors'} (plain timm loads it, see backbone.json)"
    )
    if run.ranks.main:
        report(config, state, run.chips, run.folder)
    return 0


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with.

    Attributes:
        ranks: Who trains.
        folder: Where it is written.
        state: What a checkpoint holds.
        chips: As stored.
        order: Which chips each step sees.
        batches: Views of the steps that are left, (B, C, h, w) each.
        again: Makes the views of a list of (epoch, chip) anew.
        monitor: Watches the embeddings, on the main rank.
        say: Prints a line, on the main rank.
    """

    ranks: Ranks
    folder: Path
    state: State
    chips: Chips
    order: StepBatches
    batches: Iterable[list[Tensor]]
    again: Callable[[Keys], list[Tensor]]
    monitor: Monitor | None
    say: Callable[[str], None]


def prepare(config: PretrainConfig) -> Run:
    """From scenes to batches of views: scene → chip → views; and student and teacher, in their run folder."""
    ranks = distributed.setup(config.device)
    say = print if ranks.main else (lambda *_: None)

    with ranks.main_first():
        index = chip_index(config)
    looked_at = config.resume or packed_folder(config.data.paths)  # before this run
    checked = check_index(index, seed=config.seed) if ranks.main and not looked_at else []
    for line in [*index.report(), *checked, *resolve(config, len(index), ranks.world)]:
        say(line)
    mean, std = standardization(config, index)
    patch_size = required_multiple(config.backbone.name, **config.backbone.arguments)
    recipes = dataclasses.asdict(config.views)
    if recipes.pop("backend") == "auto":
        config.views.backend = "torch" if ranks.device.type == "cuda" else "opencv"
    global_views, local_views = default_recipes(index.chip_size, patch_size, **recipes)
    crops = MultiCrop(mean, std, global_views=global_views, local_views=local_views)
    changes = resume_changes(to_dict(config), to_dict(PretrainConfig())) if config.resume else []
    state = State(config, index, crops, ranks)

    if config.out is None:
        config.out = f"runs/pretrain-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(config.resume or config.out)
    if config.resume:
        with ranks.main_first():  # which sets a torn checkpoint aside
            checkpoint = runs.last_checkpoint(folder, say)
        if checkpoint is not None:
            state.load(checkpoint)
        before = "" if checkpoint else ", it has no checkpoint yet:"
        say(f"going on with {folder}{before} from step {state.step} of {state.steps}")
        for line in changes:
            say(f"changed, so that the result will be another: {line}")
    settings = to_yaml(dataclasses.replace(config, resume=None, resume_changed=False))
    if ranks.main and not config.resume:
        runs.begin(folder, index.save, settings)
    elif ranks.main and changes:
        runs.write_settings(folder, settings)

    chips = open_chips(index, config.data.paths)
    order = StepBatches(
        chips=len(index),
        batch_size=config.optim.batch_size,
        start=state.step,
        stop=state.steps,
        seed=config.seed,
        rank=ranks.rank,
        world=ranks.world,
    )
    batched = config.views.backend == "torch"
    dataset: Dataset[Any] = (ChipBatches if batched else ViewBatches)(chips, crops, config.seed)
    views_of: Callable[[Any], list[Tensor]] = BatchedMultiCrop(crops, ranks.device) if batched else list
    workers = default_workers(ranks.world) if config.data.workers is None else config.data.workers
    batches = feed(dataset, order, workers=workers, pinned=ranks.device.type == "cuda", say=tqdm.write)
    monitor = make_monitor(config, index, chips, crops) if ranks.main else None
    if ranks.device.type == "cpu":
        keep_freed_memory()
    dtype = str(state.dtype).removeprefix("torch.")
    say(f"{folder}: {config.backbone.name} on {ranks.device} in {dtype}, views by {config.views.backend}")
    if ranks.main and state.step < state.steps:
        few, packed = next(iter(order))[:MEASURED], isinstance(chips, PackedChips)
        say(data_pace(lambda key: chips[key[1]], lambda key: dataset[[key]], few, workers=workers, packed=packed))
    batches, again = map(views_of, batches), lambda keys: views_of(dataset[keys])
    return Run(ranks, folder, state, chips, order, batches, again, monitor, say)


def train(config: PretrainConfig, run: Run, interruption: runs.Interruption) -> None:
    """The loop, Algorithm 1 of arXiv 2104.14294: until the last step, or until a signal ends it early."""
    optim, log = config.optim, config.log
    ranks, state, method, monitor = run.ranks, run.state, run.state.method, run.monitor

    def save() -> None:
        if ranks.main:
            runs.save_checkpoint(run.folder, state.step, state.checkpoint(), log.keep)
            export_backbone(run.folder, method.backbone, state.description())

    with Progress(
        run.folder, start=state.step, steps=state.steps, batch_size=optim.batch_size, main=ranks.main
    ) as progress:
        batches: Iterable[list[Tensor]] = on_device(progress.timed(run.batches), ranks.device)
        if ranks.world == 1:  # several leave together, after a step
            batches = interruption.until_told(batches)
        try:
            for views in batches:
                step = state.step
                # What is random in a step (drop path) is a function of seed, step and rank: no random state to save.
                torch.manual_seed((config.seed * state.steps + step) * ranks.world + ranks.rank)
                lr, weight_decay = state.set_step_values(step)
                loss, finite = train_step(
                    method,
                    state.optimizer,
                    state.scaler,
                    views,
                    step,
                    dtype=state.dtype,
                    accumulate=optim.accumulate,
                    clip=optim.clip,
                )
                state.skips.note(finite)
                state.step += 1

                progress.advance()
                last, interrupted = state.step == state.steps, distributed.any_rank(interruption.name is not None)
                logged, watched = last or state.step % log.every == 0, last or state.step % log.health_every == 0
                if logged or interrupted:  # only here, for logs and checkpoints, does the loop wait for the device
                    state.mind_skips(run, progress.say)
                if logged or (monitor and watched):
                    measures: dict[str, float | Tensor] = {
                        "lr": lr,
                        "weight_decay": weight_decay,
                        "skipped": state.skips.total,
                        **method.health(),
                    }
                    if monitor and watched:
                        measures |= monitor.measure(method.backbone)
                    progress.record(state.step, loss, measures)
                if last or interrupted or state.step % log.checkpoint_every == 0:
                    save()
                if last or interrupted:
                    return
        except UnreadableError as error:  # between two steps: nothing is lost, and nobody learns from another chip
            save()
            raise UserError(
                f"{error}; saved at step {state.step} of {state.steps}: mend the file, then --resume {run.folder}"
            ) from error
        if state.step < state.steps:  # told to stop while it waited for a batch
            save()


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
            weights=config.backbone.weights,
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
        if optim.compile:
            compile_networks([self.method.student.backbone, self.method.teacher.backbone], ranks.device)
        self.method.distribute(partial(distributed.wrap, ranks=ranks))
        self.optimizer = adamw(self.method.student)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.dtype == torch.float16)

    def set_step_values(self, step: int) -> tuple[float, float]:
        """Give the optimizer the learning rate and weight decay of a step, and return them."""
        lr, weight_decay = self._lr(step), self._weight_decay(step)
        set_step_values(self.optimizer, lr=lr, weight_decay=weight_decay)
        return lr, weight_decay

    def mind_skips(self, run: Run, say: Callable[[str], None]) -> None:
        """Say which steps were skipped since the last look, keep their views; give up where none is finite any more."""
        steps = [self.step - back for back in self.skips.last()]
        for step in steps:  # a batch is a function of its step: made anew, none is held in memory in case
            keys = next(iter(dataclasses.replace(run.order, start=step)))
            columns = {name: self.index.table[name] for name in ("scene", "row", "col")}
            chips = [{name: column[chip].as_py() for name, column in columns.items()} for _, chip in keys]
            kept = runs.keep_skipped(run.folder, step, run.ranks.rank, run.again(keys), chips)
        if steps:
            say(f"step {self.step}: {len(steps)} not finite, skipped ({self.skips.total} so far), see {kept}")
        if self.skips.in_a_row > self.config.optim.max_skipped:
            raise UserError(
                f"{self.skips.in_a_row} steps in a row were not finite (--optim.max_skipped); start anew "
                f"with a lower --optim.lr than {self.config.optim.lr}, or with --optim.precision fp32"
            )

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
            "skipped": self.skips.total,
            "backbone": self.method.backbone.state_dict(),
            "backbone_description": self.description(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": to_dict(self.config),
            "versions": {"ssl_geo": ssl_geo.__version__, "torch": str(torch.__version__)},
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Go back to where a checkpoint was.

        Raises:
            UserError: It is of another backbone or head, or of a longer run.
        """
        refuse_other_tensors(self.method.state_dict(), checkpoint["method"])
        if checkpoint["step"] > self.steps:
            raise UserError(f"--steps {self.steps} is less than the {checkpoint['step']} that the run has done")
        self.method.load_state_dict(checkpoint["method"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.step = checkpoint["step"]
        self.skips = Skips(self.device, checkpoint["skipped"])


def refuse_other_tensors(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Refuse a checkpoint whose tensors have other names or shapes than those of the run."""
    differ = [name for name in own.keys() | given.keys() if _shape(own, name) != _shape(given, name)]
    if differ:
        name = min(differ)
        raise UserError(
            f"the checkpoint does not fit the settings: {len(differ)} tensors differ, {name} is {_shape(given, name)} "
            f"where {_shape(own, name)} is wanted; leave out what changes --backbone, --dino or the size of views, or "
            "start anew with --out"
        )


def _shape(tensors: dict[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "missing"


class ViewBatches(Dataset[list[Tensor]]):
    """Batches of views, each written once: where the training step takes it, in a tensor (B, C, h, w) a view."""

    def __init__(self, chips: Chips, crops: MultiCrop, seed: int) -> None:
        self.chips, self.crops, self.seed = chips, crops, seed

    def __getitem__(self, keys: Keys) -> list[Tensor]:
        batch = [torch.empty((len(keys), *recipe.size, self.crops.mean.size)) for recipe in self.crops.recipes]
        memory = [views.numpy() for views in batch]
        for i, (epoch, position) in enumerate(keys):
            chip, out = self.chips[position], [views[i] for views in memory]
            self.crops(
                chip.dn, chip.valid, chip.scale, chip.offset, seed=self.seed, epoch=epoch, chip=position, out=out
            )
        return [views.permute(0, 3, 1, 2) for views in batch]


class ChipBatches(Dataset[ChipBatch]):
    """Batches of chips as stored, with the draws of their views, which the device makes of them."""

    def __init__(self, chips: Chips, crops: MultiCrop, seed: int) -> None:
        self.chips, self.crops, self.seed = chips, crops, seed

    def __getitem__(self, keys: Keys) -> ChipBatch:
        chips = [self.chips[position] for _, position in keys]
        kinds = {chip.dn.dtype for chip in chips}
        kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        draws = [
            self.crops.draw(*chip.valid.shape, seed=self.seed, epoch=epoch, chip=position)
            for chip, (epoch, position) in zip(chips, keys, strict=True)
        ]
        return ChipBatch(
            torch.from_numpy(np.stack([chip.dn for chip in chips], dtype=kind, casting="same_kind")),
            torch.from_numpy(np.stack([chip.valid for chip in chips])),
            torch.tensor([chip.scale for chip in chips]),
            torch.tensor([chip.offset for chip in chips]),
            torch.from_numpy(np.stack([draw_table(views) for views in draws])),
        )


def chip_index(config: PretrainConfig) -> ChipIndex:
    """The chips of the run: RUN/index.parquet when resuming, else packed, or built from the imagery or the sample."""
    data = config.data
    if config.resume:
        return ChipIndex.load(Path(config.resume) / "index.parquet")
    if folder := packed_folder(data.paths):
        return packed_index(folder, bands=data.bands, **data.index_settings())
    if not data.paths:
        ensure_sample(SAMPLE)
    data.labels = data.labels or (None if data.paths else str((SAMPLE / "labels").absolute()))
    return cached_index(
        Path(data.cache).expanduser(),
        [Path(p) for p in data.paths] or [SAMPLE / "images"],
        bands=data.bands or DEFAULT_BANDS,
        seed=config.seed,
        **data.index_settings(),
    )


def standardization(config: PretrainConfig, index: ChipIndex) -> list[npt.NDArray[np.float32]]:
    """Mean and standard deviation (C,) in reflectance: the settings', else those of the chips."""
    both = []
    for name, own in (("mean", index.statistics.mean), ("std", index.statistics.std)):
        given: list[float] | None = getattr(config.data, name)
        if given is not None and len(given) != len(index.bands):
            raise UserError(
                f"--data.{name} has {len(given)} values, the backbone takes {len(index.bands)} bands: give one for "
                f"each of {' '.join(index.bands)}"
            )
        both.append(np.array(own if given is None else given, dtype=np.float32))
    return both


def make_monitor(config: PretrainConfig, index: ChipIndex, chips: Chips, crops: MultiCrop) -> Monitor:
    """A fixed random draw of chips, standardized whole, with their most frequent label where there are labels."""
    rng = np.random.default_rng(config.seed)
    positions = rng.choice(len(index), min(MONITORED, len(index)), replace=False)
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


def report(config: PretrainConfig, state: State, chips: Chips, run: Path) -> None:
    """Write RUN/report.html; the run is whole by now, and what fails here is said and costs the page alone."""
    try:
        print(f"report: {write_page(run / 'report.html', pretraining_page(run_material(config, state, chips, run)))}")
    except Exception as error:
        print(f"{run} is complete but for report.html, which failed with {type(error).__name__}: {error}")


@torch.no_grad()
def run_material(config: PretrainConfig, state: State, chips: Chips, run: Path) -> RunMaterial:
    """What the page shows: chips evenly drawn from the index, their first views, what the backbone makes of them."""
    index, crops, backbone = state.index, state.crops, load_backbone(run).to(state.device)
    numbers = np.unique(np.linspace(0, len(index) - 1, REPORTED).astype(int))
    numbers = np.random.default_rng(config.seed).permutation(numbers)
    read = [chips[int(number)] for number in numbers]
    images = [chip.reflectance() for chip in read]
    standardized = [standardize_chip(i, c.valid, crops.mean, crops.std) for i, c in zip(images, read, strict=True)]
    batch = torch.from_numpy(np.stack(standardized)).to(state.device)
    side = chips.chip_size // (multiple := required_multiple(config.backbone.name, **config.backbone.arguments))
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
        views=[
            crops(chip.dn, chip.valid, chip.scale, chip.offset, seed=config.seed, epoch=0, chip=int(number))
            for chip, number in zip(read[:VIEWED], numbers, strict=False)
        ],
        layers={name: maps.float().cpu().numpy() for name, maps in extractor(batch[:FEATURED]).items()},
        attention=None if attention is None else attention.float().cpu().numpy(),
        embeddings=torch.cat([backbone(part) for part in torch.split(batch, 64)]).float().cpu().numpy(),
        chips=len(index),
        chip_size=index.chip_size,
        said=index.report(),
        scenes=len(np.unique(index.scene_numbers(np.arange(len(index))))),
        dates={line["values"].as_py(): line["counts"].as_py() for line in index.table["date"].value_counts()},
        bounds=lonlat_bounds(index, located),
    )


def default_workers(world: int) -> int:
    """Loader processes of a rank: one less than the cores it has, at most 8."""
    return min(8, max(0, len(os.sched_getaffinity(0)) // world - 1))


if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        raise SystemExit(main(SETTINGS))
