"""Pretrain a backbone on unlabelled imagery with DINO: ``python -m ssl_geo.pretrain --help``."""

from __future__ import annotations

from ssl_geo.config import PROGRAM, PretrainConfig, pretrain_config, to_dict, to_yaml
from ssl_geo.errors import UserError, one_line_errors, printable, tell

if __name__ == "__main__":  # settings first: --help answers before torch is imported
    SETTINGS = pretrain_config()

import dataclasses
import datetime
import os
import shlex
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from ssl_geo.backbones import export_backbone, is_transformer, outline, required_multiple
from ssl_geo.batches import Batches, ChipBatches, Chips, Keys, Season, ViewBatches
from ssl_geo.imagery.chips import ChipIndex, cached_index
from ssl_geo.imagery.datasets import dominant_labels
from ssl_geo.imagery.packed import PackedChips, open_chips, packed_folder, packed_index
from ssl_geo.imagery.quickcheck import check_index
from ssl_geo.imagery.sample import SAMPLE, ensure_sample
from ssl_geo.imagery.scenes import UnreadableError
from ssl_geo.imagery.seasons import OtherDates
from ssl_geo.imagery.sensors import DEFAULT_BANDS
from ssl_geo.presets import resolve
from ssl_geo.resuming import resume_changes
from ssl_geo.state import State
from ssl_geo.training import distributed, runs
from ssl_geo.training.distributed import Ranks
from ssl_geo.training.feeding import allow_open_files, feed
from ssl_geo.training.health import Monitor, has_diverged
from ssl_geo.training.lock import Lock
from ssl_geo.training.memory import keep_freed_memory, on_device
from ssl_geo.training.pace import data_pace
from ssl_geo.training.progress import Progress
from ssl_geo.training.sampling import StepBatches
from ssl_geo.training.step import train_step
from ssl_geo.views.batched import BatchedMultiCrop, ChipBatch
from ssl_geo.views.multicrop import MultiCrop, default_recipes
from ssl_geo.views.photometry import standardize_chip

MEASURED = 9  # chips that are read before the start, to foresee the pace
MONITORED = 512  # chips whose embeddings are watched


def main(config: PretrainConfig) -> int:
    """Pretrain, or go on with a run, until it is done or told to stop; returns the exit code."""
    with Lock() as lock:
        with runs.Interruption() as interruption:
            try:
                with interruption.at_once():
                    run = prepare(config, lock)
            except runs.Stopped:
                folder = Path(config.resume or config.out or "")
                again = (
                    f"resume with {runs.resume_option(folder)}" if runs.is_run(folder) else "run the same command again"
                )
                tell(f"{interruption.name}: stopped before the first step; {again}")
                return runs.INTERRUPTED
            train(config, run, interruption)
        distributed.shutdown()
        state = run.state
        if state.step < state.steps:
            why = interruption.name or "another process has ended"
            run.say(f"{why}: saved at step {state.step} of {state.steps}; resume with {runs.resume_option(run.folder)}")
            return runs.INTERRUPTED
        kept = run.folder / "backbone.safetensors"
        run.say(f"backbone of step {state.step}: {kept} (plain timm loads it, see backbone.json)")
        if run.ranks.main:
            report(config, run)
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
        numbers: The chips that the views of an (epoch, chip) show: itself, and another date of it where one was drawn.
        monitor: Watches the embeddings, on the main rank.
        data_limit: What limits the loader, where that is known.
        say: Prints a line, on the main rank.
    """

    ranks: Ranks
    folder: Path
    state: State
    chips: Chips
    order: StepBatches
    batches: Generator[list[Tensor], None, None]
    again: Callable[[Keys], list[Tensor]]
    numbers: Callable[[tuple[int, int]], list[int]]
    monitor: Monitor | None
    data_limit: str
    say: Callable[[str], None]


def prepare(config: PretrainConfig, lock: Lock) -> Run:
    """From scenes to batches of views: scene → chip → views; and student and teacher, in their run folder, locked."""
    ranks = distributed.setup(config.device)
    say = tell if ranks.main else (lambda *_: None)
    if config.resume and ranks.main:
        lock.take(Path(config.resume), say)

    with ranks.main_first():
        index = chip_index(config)
    looked_at = config.resume or packed_folder(config.data.paths)  # before this run
    checked = check_index(index, seed=config.seed) if ranks.main and not looked_at else []
    network = outline(config.backbone.name, **config.backbone.arguments)
    patch_size = required_multiple(network)
    chosen = resolve(config, len(index), ranks.world, transformer=is_transformer(network))
    for line in [*index.report(), *checked, *chosen]:
        say(line)
    season = other_dates(config, index, say)
    mean, std = standardization(config, index)
    if config.views.backend == "auto":
        config.views.backend = "torch" if ranks.device.type == "cuda" else "opencv"
    recipes = {name: v for name, v in dataclasses.asdict(config.views).items() if name not in ("backend", "season")}
    global_views, local_views = default_recipes(index.chip_size, patch_size, **recipes)
    crops = MultiCrop(mean, std, global_views=global_views, local_views=local_views)
    batched = config.views.backend == "torch"
    workers = default_workers(ranks.on_this_machine) if config.data.workers is None else config.data.workers
    allow_open_files(workers=workers, tensors=len(ChipBatch._fields) if batched else len(crops.recipes))
    changes = resume_changes(to_dict(config), to_dict(PretrainConfig())) if config.resume else []
    config.data.chip_size = index.chip_size
    chips, side = open_chips(index, config.data.paths), index.chip_size // patch_size * patch_size
    monitor = make_monitor(config, index, chips, crops, side, say) if ranks.main else None  # labels may be wrong

    if config.out is None:
        config.out = f"runs/pretrain-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder, checkpoint = Path(config.resume or config.out), None
    if config.resume:
        with ranks.main_first():  # which sets a torn checkpoint aside
            checkpoint = runs.last_checkpoint(folder, say)
    state = State(config, index, crops, ranks, checkpoint)
    if config.resume:
        if checkpoint is not None and ranks.main:  # what was to be written with it may be missing
            export_backbone(folder, state.method.backbone, state.description())
        before = "" if checkpoint else ", it has no checkpoint yet:"
        say(f"going on with {folder}{before} from step {state.step} of {state.steps}")
        for line in changes:
            say(f"changed, so that the result will be another: {line}")
    settings = to_yaml(dataclasses.replace(config, resume=None, resume_changed=False))
    if ranks.main and not config.resume:
        runs.begin(folder, lock, index.save, settings)
        runs.keep_warnings(folder, checked)
    elif ranks.main and changes:
        runs.write_settings(folder, settings)

    order = StepBatches(
        chips=len(index),
        batch_size=config.optim.batch_size,
        start=state.step,
        stop=state.steps,
        seed=config.seed,
        rank=ranks.rank,
        world=ranks.world,
    )
    dataset: Batches[Any] = (ChipBatches if batched else ViewBatches)(chips, crops, config.seed, season)
    views_of: Callable[[Any], list[Tensor]] = BatchedMultiCrop(crops, ranks.device) if batched else list
    batches = feed(
        dataset,
        order,
        workers=workers,
        pinned=ranks.device.type == "cuda",
        say=lambda line: tqdm.write(printable(line)),
    )
    if ranks.device.type == "cpu":
        keep_freed_memory()
    dtype = str(state.dtype).removeprefix("torch.")
    say(f"{folder}: {config.backbone.name} on {ranks.device} in {dtype}, views by {config.views.backend}")
    data_limit = ""
    if ranks.main and state.step < state.steps:
        few, packed = next(iter(order))[:MEASURED], isinstance(chips, PackedChips)
        pace = data_pace(dataset.read, lambda key: dataset[[key]], few, workers=workers, packed=packed)
        say(pace.line)
        data_limit = pace.limit
    views, again = (views_of(batch) for batch in batches), lambda keys: views_of(dataset[keys])
    return Run(ranks, folder, state, chips, order, views, again, dataset.numbers, monitor, data_limit, say)


def train(config: PretrainConfig, run: Run, interruption: runs.Interruption) -> None:
    """The loop, Algorithm 1 of arXiv 2104.14294: until the last step, or until a signal ends it early."""
    optim, log = config.optim, config.log
    ranks, state, method, monitor = run.ranks, run.state, run.state.method, run.monitor

    saved: int | None = None

    def save() -> None:
        nonlocal saved
        if ranks.main and saved != state.step:
            runs.save_checkpoint(run.folder, state.step, state.checkpoint(), log.keep)
            export_backbone(run.folder, method.backbone, state.description())
            saved = state.step

    def save_what_is_begun() -> None:
        if state.step < state.steps:
            save()

    with (
        Progress(
            run.folder,
            start=state.step,
            steps=state.steps,
            batch_size=optim.batch_size,
            main=ranks.main,
            data_limit=run.data_limit,
        ) as progress,
        closing(run.batches),  # or the exit would wait for ever for loader processes that an error left behind
    ):
        batches: Iterable[list[Tensor]] = on_device(progress.timed(run.batches), ranks.device)
        # Several leave together: told to stop after a step, or before it where one of them has no batch.
        batches = (
            interruption.until_told(batches)
            if ranks.world == 1
            else distributed.together(batches, before_leaving=save_what_is_begun)
        )
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
                    mind_skips(config, run, progress.say)
                if logged or (monitor and watched):
                    measures: dict[str, float | Tensor] = {
                        "lr": lr,
                        "weight_decay": weight_decay,
                        "skipped": state.skips.total,
                        **method.health(),
                    }
                    seen = monitor.measure(method.backbone) if monitor and watched else None
                    progress.record(state.step, loss, measures | (seen or {}))
                    if seen and has_diverged(seen):  # before it is saved over what is good
                        raise UserError(
                            f"step {state.step}: the run has diverged, embeddings are not finite; the checkpoints "
                            f"before are intact. Start again with a lower --optim.lr than {optim.lr:g}, or with "
                            "--optim.precision fp32"
                        )
                if last or interrupted or state.step % log.checkpoint_every == 0:
                    save()
                if last or interrupted:
                    return
        except UnreadableError as error:  # between two steps: nothing is lost, and nobody learns from another chip
            save()
            raise UserError(
                f"{error}; saved at step {state.step} of {state.steps}: fix the file, then "
                f"{runs.resume_option(run.folder)}"
            ) from error
        save_what_is_begun()  # told to stop while it waited for a batch


def mind_skips(config: PretrainConfig, run: Run, say: Callable[[str], None]) -> None:
    """Say which steps were skipped since the last look, keep their views; give up where none is finite any more."""
    state = run.state
    columns = {name: state.index.table[name] for name in ("scene", "row", "col")}

    def named(chip: int) -> dict[str, Any]:
        return {name: column[chip].as_py() for name, column in columns.items()}

    steps = [state.step - back for back in state.skips.last()]
    for step in steps:  # a batch is a function of its step: made anew, none is held in memory in case
        keys = next(iter(dataclasses.replace(run.order, start=step)))
        chips = []
        for chip, *others in map(run.numbers, keys):
            chips.append(named(chip))
            if others:
                chips[-1]["another date"] = named(*others)
        kept = runs.keep_skipped(run.folder, step, run.ranks.rank, run.again(keys), chips)
    if steps:
        say(f"step {state.step}: {len(steps)} not finite, skipped ({state.skips.total} so far), see {kept}")
    if state.skips.in_a_row > config.optim.max_skipped:
        raise UserError(
            f"{state.skips.in_a_row} steps in a row were not finite (--optim.max_skipped); start anew "
            f"with a lower --optim.lr than {config.optim.lr}, or with --optim.precision fp32"
        )


def chip_index(config: PretrainConfig) -> ChipIndex:
    """The chips of the run: RUN/index.parquet when resuming, else packed, or built from the imagery or the sample."""
    data = config.data
    if config.resume:
        anew = f"start anew with --out, from its backbone with --backbone.weights {shlex.quote(str(config.resume))}"
        return ChipIndex.load(Path(config.resume) / "index.parquet", mend=anew)
    if folder := packed_folder(data.paths):
        settings = data.index_settings() | {"chip_size": data.chip_size}
        return packed_index(folder, bands=data.bands, **settings)
    if not data.paths:
        ensure_sample()
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
    both, magnitude = [], np.abs(index.statistics.mean) + index.statistics.std
    for name, own in (("mean", index.statistics.mean), ("std", index.statistics.std)):
        given: list[float] | None = getattr(config.data, name)
        if given is not None and len(given) != len(index.bands):
            raise UserError(
                f"--data.{name} has {len(given)} values, the backbone takes {len(index.bands)} bands: give one for "
                f"each of {' '.join(index.bands)}"
            )
        both.append(np.array(own if given is None else given, dtype=np.float32))
        for band, value, usual in zip(index.bands, both[-1], magnitude, strict=True):
            if given is not None and (abs(value) > 100 * usual or (name == "std" and value <= 0)):
                raise UserError(
                    f"--data.{name} is {value:g} for {band}, whose own is {usual:.2g}: give positive reflectance, "
                    "DN times its scale"
                )
    return both


def other_dates(config: PretrainConfig, index: ChipIndex, say: Callable[[str], None]) -> Season | None:
    """What every second view may show at another date; None where --views.season is 0."""
    probability = config.views.season
    if not 0 <= probability <= 1:
        raise UserError(f"--views.season is {probability}: give a probability from 0 to 1")
    if probability == 0:
        return None
    dates = OtherDates(index)
    if not dates.count:
        raise UserError(
            f"--views.season {probability}, but none of the {len(index):,} chips has another date: {dates.why_none()}; "
            "give --views.season 0"
        )
    say(dates.report())
    return Season(dates, probability)


def make_monitor(
    config: PretrainConfig, index: ChipIndex, chips: Chips, crops: MultiCrop, side: int, say: Callable[[str], None]
) -> Monitor:
    """A fixed random draw of chips, standardized, with their most frequent label where there are labels.

    Args:
        config: Of the run.
        index: The chips.
        chips: As stored.
        crops: Knows how chips are standardized.
        side: Pixels of a chip that are watched, what the patches of a ViT cover.
        say: Takes a line.
    """
    rng = np.random.default_rng(config.seed)
    positions = rng.choice(len(index), min(MONITORED, len(index)), replace=False)
    labels = None
    if config.data.labels:
        labels = dominant_labels(index, positions, Path(config.data.labels), say)
        if len(set(index.scene_numbers(positions[labels >= 0]))) < 2:
            say(f"no kNN score is watched: it wants chips of two scenes with labels in {config.data.labels}")
            labels = None
        else:
            positions, labels = positions[labels >= 0], labels[labels >= 0]
    watched = [chips[int(p)] for p in positions]
    images = [standardize_chip(chip.reflectance(), chip.valid, crops.mean, crops.std) for chip in watched]
    scenes = index.scene_numbers(positions)
    return Monitor(
        torch.from_numpy(np.stack(images)[..., :side, :side]),
        None if labels is None else torch.from_numpy(labels),
        torch.from_numpy(scenes.astype(np.int64)),
    )


def report(config: PretrainConfig, run: Run) -> None:
    """Write RUN/report.html; the run is whole by now, and what fails here is said and costs the page alone."""
    try:  # what draws takes seconds to import: not before the first step
        from ssl_geo.material import run_material
        from ssl_geo.reporting.page import write_page
        from ssl_geo.reporting.pretraining import pretraining_page

        material = run_material(config, run.state, run.chips, run.again, run.folder)
        tell(f"report: {write_page(run.folder / 'report.html', pretraining_page(material))}")
    except Exception as error:
        tell(f"{run.folder} is complete but for report.html, which failed with {type(error).__name__}: {error}")


def default_workers(ranks: int) -> int:
    """Loader processes of each of the ranks of this machine: one less than the cores it has, at most 8."""
    return min(8, max(0, len(os.sched_getaffinity(0)) // ranks - 1))


if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        raise SystemExit(main(SETTINGS))
