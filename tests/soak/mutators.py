"""How `mutations.py` changes what a reader is given: bytes anywhere, or values of a file that stays well formed."""

import io
import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

CANARY = "http://127.0.0.1:9/"  # mutations.py sets it to the port that it listens on
Mutate = Callable[[bytes, random.Random], bytes]


def strange(draw: random.Random) -> Any:
    """A value that no file of ours holds where it stands: code, addresses, numbers beyond any use, other types."""
    call = {draw.choice(["class_path", "_target_", "py/object"]): draw.choice(["tripwire.Bomb", "os.system"])}
    number = draw.choice([-1, 0, 1, 255, 2**31, 2**63 - 1, 2**63, 2**70, -(2**70), 10**400, 1e308, -1e-300])
    other = draw.choice([None, True, "", "1", [], {}, [[]], math.inf, -math.inf, math.nan, "\x1b[2J", "x" * 10_000])
    address = draw.choice(
        [CANARY, f"/vsicurl/{CANARY}a.tif", "/etc/passwd", "../../etc/passwd", "a\0b", "tripwire.Bomb"]
    )
    return draw.choice([call, [call], number, number, other, other, address])


def changed_tree(tree: Any, draw: random.Random) -> Any:
    """The same nested values but for one to three, which are exchanged, gone, doubled, or nested in others."""
    for _ in range(draw.randint(1, 3)):
        tree = _changed_once(tree, draw)
    return tree


def _changed_once(tree: Any, draw: random.Random) -> Any:
    if draw.random() < 0.25 or not isinstance(tree, dict | list) or not tree:
        return draw.choice([strange(draw), [tree], {"x": tree}]) if not isinstance(tree, dict) else _entry(tree, draw)
    if isinstance(tree, dict):
        key = draw.choice(list(tree))
        return {**tree, key: _changed_once(tree[key], draw)}
    place = draw.randrange(len(tree))
    if draw.random() < 0.2:
        return draw.choice([tree[:place], tree[:place] + tree, tree[::-1]])
    return [*tree[:place], _changed_once(tree[place], draw), *tree[place + 1 :]]


def _entry(tree: dict[Any, Any], draw: random.Random) -> Any:
    kind = draw.randrange(4)
    if kind == 0 and tree:
        gone = draw.choice(list(tree))
        return {key: value for key, value in tree.items() if key != gone}
    if kind == 1:
        return {**tree, draw.choice(["class_path", "_target_", "x", "__class__"]): strange(draw)}
    if kind == 2 and tree:
        return {**tree, draw.choice(list(tree)): strange(draw)}
    return strange(draw)


def json_values(whole: bytes, draw: random.Random) -> bytes:
    """Values of a JSON file; now and then a text that is deep, or cut."""
    if draw.random() < 0.03:
        return draw.choice([b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"\xff", b""])
    return json.dumps(changed_tree(json.loads(whole), draw)).encode(errors="surrogatepass")


def yaml_values(whole: bytes, draw: random.Random) -> bytes:
    """Values of a YAML file; now and then anchors, tags and depth."""
    if draw.random() < 0.1:
        bombs = [
            "[" * 100_000,
            "- " * 50_000,
            "&a [*a]",
            "a: &a [x]\nb: [*a, *a]",
            "x: !!python/name:os.system",
            "!!set {a}",
        ]
        bombs += ["x: !!python/object/apply:os.mkdir [PWNED]", "a: 1\na: 2", "? [a]\n: 1", "\0", "a: " + "9" * 10_000]
        return draw.choice(bombs).encode()
    return yaml.dump(changed_tree(yaml.safe_load(whole), draw)).encode(errors="replace")


def checkpoint_values(whole: bytes, draw: random.Random) -> bytes:
    """Values and tensors of a checkpoint."""
    content = torch.load(io.BytesIO(whole), weights_only=True)
    if draw.random() < 0.5:
        part = draw.choice([content["method"], *content["optimizer"]["state"].values()])
        name = draw.choice(list(part))
        part[name] = _changed_tensor(part[name], draw)
    else:
        key = draw.choice(list(content))
        content[key] = changed_tree(content[key], draw)
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def _changed_tensor(tensor: torch.Tensor, draw: random.Random) -> Any:
    return draw.choice(
        [
            tensor.flatten()[:1],
            tensor.double(),
            tensor.to(torch.complex64),
            torch.cat([tensor.flatten()] * 3),
            tensor[None],
            torch.empty(0),
            torch.full_like(tensor.float(), math.nan),
            tensor.tolist(),
            strange(draw),
        ]
    )


def index_values(whole: bytes, draw: random.Random) -> bytes:
    """Metadata and columns of a chip index."""
    table = pq.read_table(io.BytesIO(whole))
    key, told = next(iter(table.schema.metadata.items()))
    if draw.random() < 0.5:
        told = json.dumps(changed_tree(json.loads(told), draw)).encode(errors="replace")
        table = table.replace_schema_metadata({key: told})
    else:
        name = draw.choice(table.column_names)
        place, count = table.column_names.index(name), len(table)
        columns = [
            pa.array([draw.choice([-1, -5, 2**31 - 1, 0])] * count, pa.int32()),
            pa.array([draw.choice([math.inf, math.nan, -1.0, 0.0, 1e308])] * count, pa.float64()),
            pa.array([draw.choice([CANARY, "/etc/passwd", "object", "uint16", "x" * 1000])] * count),
            pa.array([None] * count, pa.string()),
            pa.array(np.zeros(count, np.bool_)),
        ]
        changed = draw.choice([None, *columns])
        table = table.drop_columns([name]) if changed is None else table.set_column(place, name, changed)
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def file_bytes(whole: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut out, doubled or put in, one to eight times; mostly where headers are."""
    content = bytearray(whole)
    for _ in range(draw.randint(1, 8)):
        size = len(content)
        if not size:
            break
        reach = draw.choice([size, min(size, 512), min(size, 64)])
        place = draw.randrange(reach) if draw.random() < 0.7 else size - 1 - draw.randrange(reach)
        kind = draw.randrange(6)
        if kind <= 1:
            content[place] = draw.randrange(256)
        elif kind == 2:
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 3:
            width = draw.choice([2, 4, 8])
            content[place : place + width] = draw.choice([b"\0", b"\xff", b"\x7f"]) * width
        elif kind == 4:
            del content[place : place + draw.randint(1, 40)]
        else:
            content[place:place] = content[place : place + draw.randint(1, 40)]
    return bytes(content[: draw.randrange(len(content) + 1)] if draw.random() < 0.1 else content)


SIDE_FILES = [
    b'<VRTDataset rasterXSize="48" rasterYSize="48"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
    b"<SourceFilename>%s</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>",
    b'<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">%s</MDI></Metadata></PAMDataset>',
    b'<PAMDataset><Metadata domain="SUBDATASETS"><MDI key="SUBDATASET_1_NAME">%s</MDI></Metadata></PAMDataset>',
    b"<GDAL_WMS><Service name='TMS'><ServerUrl>%s</ServerUrl></Service></GDAL_WMS>",
    b"10\n0\n0\n-10\n%s\n0\n",
]


def side_file(whole: bytes, draw: random.Random) -> bytes:
    """Of a mask, metadata or a world file: bytes, or another format that points elsewhere."""
    if draw.random() < 0.5:
        return file_bytes(whole, draw)
    target = draw.choice([CANARY.encode(), b"/vsicurl/" + CANARY.encode(), b"/etc/passwd", b"scene.tif"])
    text = draw.choice(SIDE_FILES) % target
    return text if draw.random() < 0.5 else file_bytes(text, draw)
