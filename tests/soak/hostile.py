"""Scan a folder of hostile rasters under strace: nothing outside it is opened, no address, nothing for writing.

    python tests/soak/hostile.py FOLDER            # doctor, index, labels, pretrain, probe, predict; needs strace

Ends with code 1 where something was. A server on 127.0.0.1, which the rasters name, must see no connection.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import rasterio

from ssl_geo.imagery.geotiff import write_geotiff

BANDS = ["B02", "B03", "B04"]
SIZE = 64
BEGIN = "/hostile-begin"  # a file that is not there; opening it marks where imports have ended
GRID = {"crs": "EPSG:32632", "transform": (10.0, 0.0, 6e5, 0.0, -10.0, 5.4e6)}
MASK = """<VRTDataset rasterXSize="{size}" rasterYSize="{size}"><Metadata><MDI key="INTERNAL_MASK_FLAGS_1">2</MDI>
</Metadata><VRTRasterBand dataType="Byte" band="1"{kind}>{source}</VRTRasterBand></VRTDataset>"""
RAW = """<SourceFilename relativetoVRT="0">{path}</SourceFilename><ImageOffset>0</ImageOffset>
<PixelOffset>1</PixelOffset><LineOffset>{size}</LineOffset>"""
SIMPLE = '<SimpleSource><SourceFilename relativeToVRT="0">{path}</SourceFilename></SimpleSource>'
PAM = """<PAMDataset>{more}<Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{path}</MDI></Metadata>
<PAMRasterBand band="1"><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{path}</MDI></Metadata></PAMRasterBand>
<Subdataset name="x"><PAMDataset><SRS>{path}</SRS></PAMDataset></Subdataset></PAMDataset>"""


@contextmanager
def canary() -> Iterator[tuple[int, list[object]]]:
    """A server on 127.0.0.1: its port, and who has connected."""
    met: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, address = server.accept()
                except OSError:  # closed
                    return
                met.append(address)
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        yield server.getsockname()[1], met
        server.shutdown(socket.SHUT_RDWR)


def write(path: Path, seed: int = 0) -> None:
    """A small stack that is harmless in itself."""
    dn = np.random.default_rng(seed).integers(1, 5000, (3, SIZE, SIZE)).astype(np.uint16)
    write_geotiff(path, dn, **GRID, nodata=0, descriptions=BANDS)


def masks(port: int, outside: Path) -> dict[str, str]:
    """Masks that are VRTs."""
    address = f"/vsicurl/http://127.0.0.1:{port}/a.tif"
    return {
        "raw": MASK.format(size=SIZE, kind=' subClass="VRTRawRasterBand"', source=RAW.format(path=outside, size=SIZE)),
        "web": MASK.format(size=SIZE, kind="", source=SIMPLE.format(path=address)),
        "wms": f"<GDAL_WMS><Service name='TMS'><ServerUrl>http://127.0.0.1:{port}/${{z}}</ServerUrl></Service></GDAL_WMS>",
    }


def make(folder: Path, port: int, outside: Path) -> None:
    """Rasters that name `outside` or the port in every way that GDAL knows of, with one good scene among them."""
    folder.mkdir(parents=True)
    address = f"/vsicurl/http://127.0.0.1:{port}/a.tif"
    write(folder / "good.tif")
    for number, (name, text) in enumerate(masks(port, outside).items()):
        for suffix in (".msk", ".ovr", ".aux.xml"):
            path = folder / f"{name}{suffix.replace('.', '_')}.tif"
            write(path, number)
            path.with_name(path.name + suffix).write_text(text)
        (folder / f"{name}.tif").write_text(text)
        write(folder / f"{name}_old.tif", number)
        (folder / f"{name}_old.aux").write_text(text)
    for name, path in (("file", outside), ("web", address), ("http", address.removeprefix("/vsicurl/"))):
        write(folder / f"pam_{name}.tif")
        (folder / f"pam_{name}.tif.aux.xml").write_text(PAM.format(path=path, more=f"<SRS>{path}</SRS>"))
        write(folder / f"inside_{name}.tif")
        with rasterio.open(folder / f"inside_{name}.tif", "r+") as dataset:
            dataset.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(path))
        if path != outside:  # GDAL opens what a link that leads nowhere holds
            (folder / f"link_{name}.tif").symlink_to(path)
            (folder / f"bands_{name}_B02.tif").symlink_to(path)
            write_geotiff(folder / f"bands_{name}_B03.tif", np.ones((1, SIZE, SIZE), np.uint16), **GRID)
    for suffix in (".tif.msk", ".tif.aux.xml", ".tfw", ".wld", ".tif.ovr", ".hdr", ".tab", ".IMD"):
        write(folder / f"linked{suffix.replace('.', '_')}.tif")
        (folder / f"linked{suffix.replace('.', '_')}{suffix}").symlink_to(outside)
        write(folder / f"pipe{suffix.replace('.', '_')}.tif")
        os.mkfifo(folder / f"pipe{suffix.replace('.', '_')}{suffix}")
    os.mkfifo(folder / "pipe.tif")
    profile = {
        "driver": "JP2OpenJPEG",
        "width": SIZE,
        "height": SIZE,
        "count": 1,
        "dtype": "uint16",
        "crs": "EPSG:32632",
    }
    with rasterio.open(
        folder / "jp_B04.jp2", "w", **profile, transform=rasterio.Affine(10, 0, 6e5, 0, -10, 5.4e6), GeoJP2="NO"
    ) as dataset:
        dataset.write(np.full((1, SIZE, SIZE), 900, np.uint16))
    urn, url = b"urn:ogc:def:crs:EPSG::32632", f"http://127.0.0.1:{port}/".encode()
    content = (folder / "jp_B04.jp2").read_bytes()
    if urn not in content:
        raise RuntimeError("no GMLJP2 was written")
    (folder / "jp_B04.jp2").write_bytes(content.replace(urn, url.ljust(len(urn), b"x")))
    (folder / "jp_B04.j2w").write_text("10\n0\n0\n-10\n600005\n5399995\n")  # so that GDAL looks around
    (folder / "jp_B04.xml").symlink_to(outside)
    (folder / "METADATA.DIM").symlink_to(outside)
    os.mkfifo(folder / "jp_B04.IMD")


def scan(folder: Path) -> None:
    """What every command does first: doctor, an index, labels."""
    from ssl_geo.config import doctor_config
    from ssl_geo.doctor import main as doctor
    from ssl_geo.errors import UserError
    from ssl_geo.imagery.chips import build_index
    from ssl_geo.imagery.rasters import read_labels, read_legend

    trace_mark()
    doctor(doctor_config([str(folder), "--out", str(folder.parent / "out")]))
    build_index([folder], bands=BANDS, chip_size=32, max_unreadable=0.9, allow_mixed=True, progress=False)
    for file in sorted(folder.glob("*.tif")):
        for read in (read_labels, read_legend):
            try:
                read(file)
            except UserError as error:
                print(error)


def train(folder: Path) -> None:
    """Pretrain, probe the labels that go with it, and map every file with the head."""
    from ssl_geo.config import predict_config, pretrain_config, probe_config
    from ssl_geo.errors import UserError
    from ssl_geo.predict import main as predict
    from ssl_geo.pretrain import main as pretrain
    from ssl_geo.probe import main as probe

    trace_mark()
    out = folder.parent / "out"
    settings = ["--data.bands", *BANDS, "--data.chip_size", "32", "--data.max_unreadable", "0.9", "--data.cache", out]
    small = [
        "--steps",
        "2",
        "--optim.batch_size",
        "4",
        "--dino.out_dim",
        "16",
        "--data.workers",
        "1",
        "--out",
        out / "run",
    ]
    pretrain(
        pretrain_config(
            ["--data", str(folder), *map(str, [*settings, "--data.allow_mixed", "true", *small, "--out", out / "run"])]
        )
    )
    labels = out / "labels"
    labels.mkdir()
    images = out / "images"
    images.mkdir()
    for number in range(6):
        write_at(images / f"{number}.tif", labels / f"{number}.tif", number)
    given = ["--ckpt", out / "run", "--images", images, "--labels", labels, "--out", out / "probe", "--cache", out]
    given += [
        "--heads",
        "linear",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--chip_size",
        "32",
        "--results",
        out / "results.jsonl",
    ]
    probe(probe_config(list(map(str, given))))
    for number, file in enumerate(sorted(file for file in folder.iterdir() if file.suffix in (".tif", ".jp2"))):
        arguments = ["--head", out / "probe" / "best_head", "--scene", file, "--out", out / f"map{number}.tif"]
        try:
            predict(predict_config(list(map(str, arguments))))
        except UserError as error:
            print(error)


def write_at(image: Path, labels: Path, number: int) -> None:
    """A scene and its labels, at a place of their own."""
    grid = {"crs": "EPSG:32632", "transform": (10.0, 0.0, 6e5 + 5000 * number, 0.0, -10.0, 5.4e6)}
    ids = np.random.default_rng(number).integers(1, 3, (1, SIZE, SIZE)).astype(np.uint8)
    write_geotiff(image, np.repeat(ids.astype(np.uint16) * 900, 3, axis=0), **grid, descriptions=BANDS)
    write_geotiff(labels, ids, **grid)


def trace_mark() -> None:
    """Leave a mark in the trace."""
    with suppress(FileNotFoundError):
        os.close(os.open(BEGIN, os.O_RDONLY))


def traced(what: str, folder: Path, trace: Path) -> subprocess.CompletedProcess[str]:
    """Run `scan` or `train` in a process of its own under strace."""
    command = ["strace", "-f", "-qq", "-s", "4096", "-e", "trace=open,openat,connect", "-o", str(trace)]
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    own = {"HOME": str(home), "MPLCONFIGDIR": str(home), "TMPDIR": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, sys.executable, __file__, "--child", what, str(folder)],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=600,
    )


def broken(trace: Path, folder: Path) -> list[str]:
    """The lines of a trace that break the promise."""
    _, begin, after = trace.read_text(errors="replace").partition(f'"{BEGIN}"')
    if not begin:
        return ["nothing was traced"]
    libraries = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(Path(rasterio.__file__).parent)}
    libraries |= {os.path.realpath(path) for path in libraries}
    allowed = (*libraries, "/usr/", "/lib", "/dev/", "/proc/", "/sys/", "/etc/ld.so", "/etc/localtime")
    own = tuple(f"{folder.parent}/{name}" for name in ("out", "home"))
    code = str(Path(__file__).parents[2])
    found = []
    begun: dict[str, str] = {}
    for line in after.splitlines():
        process = line.split()[0]
        if line.endswith("<unfinished ...>"):
            begun[process] = line
            continue
        if " resumed>" in line:
            line = begun.pop(process, "") + line
        if "connect(" in line and "AF_UNIX" not in line:
            found.append(line)
        if (match := re.search(r'open(?:at)?\(.*?"((?:[^"\\]|\\.)*)", (\S+)', line)) is None:
            continue
        path, flags = match.groups()
        if " = -1 " in line:  # there is no such file
            continue
        if path.startswith(f"{folder}/") or path == str(folder):
            leads_out = not os.path.realpath(path).startswith(f"{os.path.realpath(folder)}")
            if leads_out or re.search("O_RDWR|O_WRONLY|O_CREAT|O_TRUNC", flags):
                found.append(line)
        elif path.startswith("/") and not path.startswith((*allowed, *own, code)):
            found.append(line)
    return found


def main() -> int:
    """Make the folder, run everything over it, and say what was opened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", choices=["scan", "train"])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    if given.child is not None:
        (scan if given.child == "scan" else train)(given.folder)
        return 0
    folder = given.folder.absolute()
    folder.mkdir(parents=True)
    outside = folder / "outside.tif"
    write(outside)
    bad = 0
    with canary() as (port, met):
        make(folder / "imagery", port, outside)
        for what in ("scan", "train"):
            ended = traced(what, folder / "imagery", folder / f"{what}.trace")
            lines = broken(folder / f"{what}.trace", folder / "imagery")
            bad += len(lines) + len(met) + abs(ended.returncode)
            print(ended.stderr, *lines, sep="\n")
            print(f"{what}: exit {ended.returncode}, {len(lines)} openings outside, {len(met)} connections", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
