"""Write the chips of an archive once, to be read without decoding: ``python -m ssl_geo.pack --help``."""

from __future__ import annotations

from ssl_geo.config import PACK_PROGRAM, PackConfig, pack_config
from ssl_geo.errors import UserError, interrupt_on_termination, one_line_errors, tell

if __name__ == "__main__":
    SETTINGS = pack_config()

import os
from pathlib import Path

from ssl_geo.imagery.chips import cached_index
from ssl_geo.imagery.packed import packed_folder, verify
from ssl_geo.imagery.packing import pack
from ssl_geo.imagery.sensors import DEFAULT_BANDS

INTERRUPTED = 75  # told to stop; the same command goes on (EX_TEMPFAIL of sysexits.h)


def main(config: PackConfig) -> int:
    """Pack, or verify what was packed: scene → chip → shard."""
    if config.workers is not None and config.workers < 1:
        raise UserError(f"--workers is {config.workers}; it must be at least 1")
    workers = config.workers or min(8, len(os.sched_getaffinity(0)))
    data = config.data
    if config.verify is not None:
        tell(verify(Path(config.verify), workers=workers))
        return 0
    if not data.paths or config.out is None:
        raise UserError("name the imagery with --data DIR ... and the folder to make with --out FOLDER")
    if packed_folder(data.paths) is not None:
        raise UserError(f"--data {data.paths[0]} is packed already; name the imagery")
    if config.shard_mb < 1:
        raise UserError(f"--shard_mb is {config.shard_mb}; it must be at least 1")
    interrupt_on_termination()
    try:
        index = cached_index(
            Path(data.cache).expanduser(),
            data.paths,
            bands=data.bands or DEFAULT_BANDS,
            seed=config.seed,
            **data.index_settings(),
        )
        for line in index.report():
            tell(line)
        for line in pack(index, Path(config.out), shard_bytes=config.shard_mb * 1_000_000, workers=workers):
            tell(line)
    except KeyboardInterrupt:
        tell("stopped; finished shards are kept, the same command goes on")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    with one_line_errors(PACK_PROGRAM):
        raise SystemExit(main(SETTINGS))
