"""The feature store: one backbone pass serves every head, layer, seed and epoch, and the next run.

STORE/<key>/layer-<i>.npy   (N, D, h, w) float16, or float32 where float16 would overflow
STORE/<key>/labels.npy      (N, H, W) uint8, 255 = ignored
STORE/<key>/store.json      how many chips are done of how many, names of layers, dtype
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from ssl_geo.documents import read_json
from ssl_geo.errors import UserError, tell
from ssl_geo.files import written_whole
from ssl_geo.probing.features import Extractor
from ssl_geo.schema import conform


class _State(TypedDict, total=False):
    """What store.json says."""

    done: int
    chips: int
    dtype: Literal["float16", "float32"]
    names: list[str]


FLOAT16_MAX = float(np.finfo(np.float16).max)

# (standardized image (C, H, W) float32, labels (H, W) uint8) of a chip by its number
ReadChip = Callable[[int], tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]]


@dataclass(frozen=True)
class FeatureStore:
    """Features and labels of N chips.

    Attributes:
        layers: (N, D, h, w) by layer name, memory-mapped or in memory.
        labels: (N, H, W) uint8, 255 = ignored.
        passes: Chips that went through the backbone to make it; 0 where all was there already.
    """

    layers: Mapping[str, npt.NDArray[np.floating]]
    labels: npt.NDArray[np.uint8]
    passes: int

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, chips: npt.NDArray[np.int64], batch_size: int, layers: Sequence[str], device: torch.device
    ) -> Iterator[tuple[npt.NDArray[np.int64], dict[str, Tensor], Tensor]]:
        """Yield (chip numbers, float32 features by layer, int64 labels) in the order of `chips`."""
        for start in range(0, len(chips), batch_size):
            part = chips[start : start + batch_size]
            features = {name: torch.from_numpy(self.layers[name][part]).to(device).float() for name in layers}
            yield part, features, torch.from_numpy(self.labels[part]).to(device).long()


def store_key(parts: Mapping[str, Any]) -> str:
    """Name of a store: a digest of all that decides what is in it (checkpoint, layers, standardizing, data)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def predicted_bytes(extractor: Extractor, chips: int, size: tuple[int, int]) -> int:
    """Size of a store in bytes, before anything is computed."""
    places = [-(-size[0] // r) * -(-size[1] // r) for r in extractor.reduction]
    features = sum(2 * d * p for d, p in zip(extractor.channels, places, strict=True))
    return chips * (features + size[0] * size[1])


def stored_chips(folder: Path) -> int:
    """How many chips an earlier run has left in a store."""
    return int(_read_state(folder).get("done", 0))


def extract(
    extractor: Extractor,
    read_chip: ReadChip,
    chips: int,
    folder: Path,
    *,
    memory: int,
    batch_size: int = 32,
    device: torch.device | None = None,
    say: Callable[[str], None] = tell,
) -> FeatureStore:
    """Run the frozen backbone once over all chips, or read what an earlier run left; goes on where that stopped.

    Args:
        extractor: Of the layers wanted; its model is put into eval mode.
        read_chip: Gives a chip's standardized image and labels.
        chips: N.
        folder: STORE/<key>, made here.
        memory: Stores up to so many bytes are read into memory, larger ones stay memory-mapped.
        batch_size: Chips a pass.
        device: Where the backbone computes.
        say: Takes lines about what was there already, about features beyond float16, and about another probe that
            computes the same features, which is waited for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); name another --cache") from error
    with nullcontext() if stored_chips(folder) == chips else _alone(folder, say):
        passes = _complete(extractor, read_chip, chips, folder, batch_size, device, say)
        size = sum(path.stat().st_size for path in folder.glob("*.npy"))
        mode: Literal["r"] | None = None if size <= memory else "r"
        layers = enumerate(extractor.names)
        arrays = {name: open_stored(folder / f"layer-{number}.npy", mode) for number, name in layers}
        return FeatureStore(arrays, open_stored(folder / "labels.npy"), passes)


@contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes out of a store; they wait. A file system without locks is said and gone on with."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process computes these features, waiting for it: {folder}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            say(f"{folder} cannot be locked ({error.strerror}): let no other probe write there meanwhile")
        yield
    finally:
        os.close(descriptor)


def _complete(
    extractor: Extractor,
    read_chip: ReadChip,
    chips: int,
    folder: Path,
    batch_size: int,
    device: torch.device | None,
    say: Callable[[str], None],
) -> int:
    """Compute what a store lacks; how many chips went through the backbone for it."""
    extractor.model.eval()
    state = _read_state(folder)
    done = stored_chips(folder)
    if state.get("chips", chips) != chips:
        raise UserError(f"{folder} holds {state['chips']} chips, not {chips}: delete it, it is computed anew")
    passes = chips - done
    dtype = np.dtype(state.get("dtype", "float16"))
    while done < chips:
        finished = _fill(extractor, read_chip, chips, folder, done, dtype, batch_size, device)
        if finished:
            break
        say("features beyond float16's range: kept as float32 instead")
        done, passes, dtype = 0, chips, np.dtype(np.float32)
    if not passes:
        say(f"features of {chips} chips were there already: {folder}")
    return passes


def open_stored(path: Path, mode: Literal["r", "r+"] | None = None) -> npt.NDArray[Any]:
    """Open an array of a store, mapped where a mode is given; nothing is unpickled.

    Raises:
        UserError: It is damaged.
    """
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode=mode, allow_pickle=False)
    except Exception as error:  # NumPy hands a header's text to Python's parser, which has errors of its own
        raise UserError(f"{path} is damaged ({error}): delete {path.parent}, it is computed anew") from error
    return array


@torch.no_grad()
def _fill(
    extractor: Extractor,
    read_chip: ReadChip,
    chips: int,
    folder: Path,
    done: int,
    dtype: np.dtype[Any],
    batch_size: int,
    device: torch.device | None,
) -> bool:
    """Write the chips from `done` on; False where a feature does not fit the dtype."""
    arrays: list[npt.NDArray[Any]] = []
    bar = tqdm(total=chips, initial=done, unit="chip", desc="features", delay=2, dynamic_ncols=True)
    with bar:
        for start in range(done, chips, batch_size):
            pairs = [read_chip(number) for number in range(start, min(start + batch_size, chips))]
            images = torch.from_numpy(np.stack([image for image, _ in pairs])).to(device)
            labels = np.stack([label for _, label in pairs])
            features = [feature.float().cpu().numpy() for feature in extractor.as_list(images)]
            if not arrays:
                arrays = _open(folder, chips, [*features, labels], done, dtype)
            for array, values in zip(arrays, [*features, labels], strict=True):
                if array.dtype.kind == "f":
                    greatest = np.abs(values).max()
                    if not np.isfinite(greatest):
                        raise UserError(
                            f"features of chips {start} to {start + len(pairs) - 1} hold NaN or infinity: the backbone "
                            "diverged; probe another checkpoint, --ckpt"
                        )
                    if array.dtype == np.float16 and greatest > FLOAT16_MAX:
                        return False
                array[start : start + len(pairs)] = values
            finished = start + len(pairs)
            if finished == chips or (start // batch_size) % 16 == 15:
                for array in arrays:
                    if isinstance(array, np.memmap):
                        array.flush()
                _write_state(folder, {"done": finished, "chips": chips, "dtype": str(dtype), "names": extractor.names})
            bar.update(len(pairs))
    return True


def _open(
    folder: Path, chips: int, batch: Sequence[npt.NDArray[Any]], done: int, dtype: np.dtype[Any]
) -> list[npt.NDArray[Any]]:
    """Memory-map one file a layer and one for the labels, which come last in `batch`."""
    paths = [folder / f"layer-{number}.npy" for number in range(len(batch) - 1)] + [folder / "labels.npy"]
    if done:
        stored = [open_stored(path, "r+") for path in paths]
        if any(array.dtype != dtype for array in stored[:-1]):
            raise UserError(f"{folder} was written over by two probes at once: delete it, it is computed anew")
        return stored
    dtypes = [dtype] * (len(batch) - 1) + [np.dtype(np.uint8)]
    arrays: list[npt.NDArray[Any]] = []
    try:
        _write_state(folder, {"done": 0, "dtype": str(dtype)})  # before what an earlier pass left is written over
        for path, kind, values in zip(paths, dtypes, batch, strict=True):
            array = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=(chips, *values.shape[1:]))
            with path.open(
                "rb+"
            ) as file:  # where room lacks in the middle of a map, the process is killed: take it now
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            arrays.append(array)
    except OSError as error:
        for path in paths:
            path.unlink(missing_ok=True)
        raise UserError(
            f"features cannot be stored in {folder} ({error.strerror}): make room, or name another disk with --cache"
        ) from error
    return arrays


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / "store.json"
    if not path.is_file():
        return {}
    fix = f"delete {folder}, it is computed again"
    try:
        state: dict[str, Any] = conform(read_json(path, fix=fix), _State, str(path))
    except UserError as error:
        raise UserError(f"{error}: {fix}") from error
    return state


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    with written_whole(folder / "store.json") as partial:
        partial.write_text(json.dumps(state))
