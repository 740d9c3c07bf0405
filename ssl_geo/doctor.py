"""Look through an archive before a long run: ``python -m ssl_geo.doctor PATH [PATH ...] [--labels PATH ...]``."""

from __future__ import annotations

from ssl_geo.config import DOCTOR_PROGRAM, DoctorConfig, doctor_config, to_dict
from ssl_geo.errors import UserError, one_line_errors, tell

if __name__ == "__main__":
    SETTINGS = doctor_config()

import dataclasses
import tempfile
from pathlib import Path

import ssl_geo
from ssl_geo.files import written_whole
from ssl_geo.imagery.diagnosis import diagnose
from ssl_geo.imagery.diagnosis_report import as_html, as_json, as_text
from ssl_geo.imagery.findings import exit_code
from ssl_geo.imagery.sample import SAMPLE, ensure_sample


def main(config: DoctorConfig) -> int:
    """Look, print the table, write it if asked to; the exit code says the worst: 0 clean, 1 warnings, 2 errors."""
    if config.workers is not None and config.workers < 1:
        raise UserError(f"--workers is {config.workers}; it must be at least 1")
    paths, labels = list(map(Path, config.paths)), list(map(Path, config.labels))
    if not paths:
        ensure_sample()
        paths, labels = [SAMPLE / "images"], labels or [SAMPLE / "labels"]
    out = None if config.out is None else Path(config.out)
    if out is not None:  # before the long look, not after it
        try:
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error.strerror}); name a folder that can") from error
    diagnosis = diagnose(
        paths,
        labels,
        classes=config.classes,
        ignore=config.ignore,
        splits=None if config.split is None else Path(config.split),
        quick=config.quick,
        workers=config.workers,
        **dataclasses.asdict(config.data),
    )
    print(as_text(diagnosis))
    if out is not None:
        for name, write in (("doctor.json", as_json), ("doctor.html", as_html)):
            content = write(diagnosis, to_dict(config), ssl_geo.__version__)
            try:
                with written_whole(out / name) as partial:
                    partial.write_text(content, encoding="utf-8", errors="backslashreplace")  # names in no encoding
            except OSError as error:
                raise UserError(f"{out / name} could not be written ({error.strerror}); make room") from error
        tell(f"written: {out / 'doctor.json'}, {out / 'doctor.html'}")
    return exit_code(diagnosis.findings)


if __name__ == "__main__":
    with one_line_errors(DOCTOR_PROGRAM):
        raise SystemExit(main(SETTINGS))
