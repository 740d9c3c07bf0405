"""Settings that would run code, and descriptions, indexes and checkpoints that were tampered with: one line each."""

import dataclasses
import json
import math
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from ssl_geo import config as settings_of
from ssl_geo.backbones import create_backbone, describe_backbone, export_backbone, load_backbone
from ssl_geo.config import PretrainConfig, to_dict
from ssl_geo.errors import UserError
from ssl_geo.imagery import index_schema
from ssl_geo.imagery.chips import ChipIndex, build_index
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.index_schema import METADATA_KEY
from ssl_geo.state import _refuse_other_moments
from ssl_geo.training.optimizers import adamw
from ssl_geo.weights import read_torch

COMMANDS = {
    "pretrain": settings_of.pretrain_config,
    "probe": settings_of.probe_config,
    "predict": settings_of.predict_config,
    "doctor": settings_of.doctor_config,
    "pack": settings_of.pack_config,
}
CONFIGS = {
    "pretrain": settings_of.PretrainConfig,
    "probe": settings_of.ProbeConfig,
    "predict": settings_of.PredictConfig,
    "doctor": settings_of.DoctorConfig,
    "pack": settings_of.PackConfig,
}
CALLS = [
    {"class_path": "os.mkdir", "init_args": {"path": "PWNED"}},
    {"class_path": "tripwire.Bomb"},
    {"_target_": "tripwire.Bomb"},
    {"py/object": "tripwire.Bomb"},
]
HIDDEN = [lambda call: call, lambda call: [call], lambda call: {"x": call}, lambda call: {"x": [1, {"y": call}]}]


@pytest.fixture
def tripwire(tmp_path, monkeypatch):
    """A working directory with a module that leaves a folder when it is imported."""
    (tmp_path / "tripwire.py").write_text("import os\nos.mkdir('PWNED')\nclass Bomb: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    assert not (tmp_path / "PWNED").exists()
    assert "tripwire" not in sys.modules


def refused(read, argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        read(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1
    return lines[0]


def names(kind, prefix: str = "") -> list[str]:
    """Every setting and group by dotted name."""
    found = []
    for field in dataclasses.fields(kind):
        found.append(f"{prefix}{field.name}")
        made = field.default_factory() if callable(field.default_factory) else None
        if dataclasses.is_dataclass(made):
            found += names(type(made), f"{prefix}{field.name}.")
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_no_setting_of_a_recipe_names_code(command, tripwire, capsys):
    """`class_path` in backbone.arguments once ran any function; in `data` it imported a module."""
    recipe = Path("recipe.yaml")
    for number, name in enumerate(names(CONFIGS[command])):
        call = HIDDEN[number % len(HIDDEN)](CALLS[number % len(CALLS)])
        *groups, last = name.split(".")
        content = {last: call}
        for group in reversed(groups):
            content = {group: content}
        recipe.write_text(yaml.safe_dump(content))
        refused(COMMANDS[command], ["--config", str(recipe)], capsys)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: next(iter(call)))
@pytest.mark.parametrize("hide", HIDDEN)
def test_no_argument_of_a_backbone_names_code(call, hide, tripwire, capsys):
    recipe, content = Path("recipe.yaml"), {"backbone": {"arguments": {"x": hide(call)}}}
    recipe.write_text(yaml.safe_dump(content))
    assert "names code" in refused(COMMANDS["pretrain"], ["--config", str(recipe)], capsys)
    run = Path("RUN")
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(PretrainConfig()) | content))
    assert "names code" in refused(COMMANDS["pretrain"], ["--resume", str(run)], capsys)
    option = json.dumps({"x": hide(call)})
    assert "names code" in refused(COMMANDS["pretrain"], ["--backbone.arguments", option], capsys)
    assert "names code" in refused(COMMANDS["pretrain"], ["--backbone.arguments.x", json.dumps(hide(call))], capsys)


def test_text_that_reads_like_code_stays_text(tripwire):
    found = COMMANDS["pretrain"](["--backbone.arguments.act_layer", "tripwire.Bomb", "--data", "tripwire.Bomb"])
    assert found.backbone.arguments == {"act_layer": "tripwire.Bomb"}
    assert found.data.paths == [str(tripwire / "tripwire.Bomb")]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--images", ""], "--images is empty"),
        (["--images", "a", ""], "--images is empty"),
        (["--labels="], "--labels is empty"),
        (["--config", "fifo"], "no regular file"),
        (["--out", "x" * 10_000], "no file can have this name"),
        (["--images", "a", "x\0y"], "no file can have this name"),
        (["--data.scale", "inf"], "--data.scale"),
        (["--lr", "nan"], "--lr"),
        (["--batch_size", str(2**70)], "--batch_size"),
        (["--ckpt", "a\x1b[31mb", "--lr", "\x1b[2J"], r"\x1b[2J"),
    ],
)
def test_odd_options_are_one_line(argv, said, tripwire, capsys):
    """An empty `--images` was the working directory; a FIFO was waited for; escapes reached the terminal."""
    (tripwire / "fifo").exists() or __import__("os").mkfifo(tripwire / "fifo")
    line = refused(COMMANDS["probe"], ["--ckpt", "RUN", *argv], capsys)
    assert said in line
    assert "\x1b" not in line


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    backbone = create_backbone("test_resnet", 3, [(32, 32)])
    facts = {"bands": ["B02", "B03", "B04"], "mean": [0.1] * 3, "std": [0.2] * 3, "chip_size": 32, "seed": 0}
    export_backbone(folder, backbone, describe_backbone(backbone, **facts))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": 3}, "architecture is 3"),
        ({"architecture": "hf-hub:evil/model"}, "not a model of timm"),
        ({"model_args": []}, "model_args"),
        ({"model_args": {"num_classes": 0, "in_chans": 2**70}}, "whole numbers"),
        ({"model_args": {"num_classes": 0, "in_chans": 10**9}}, "at most"),
        ({"model_args": {"layers": [10**6] * 4}}, "at most"),
        ({"model_args": {"x": {"y": [[10**6]]}}}, "at most"),
        ({"model_args": {"num_classes": 0, "in_chans": 3, "channels": [16_384] * 4}}, "do not fit each other"),
        ({"model_args": {"act_layer": {"class_path": "os.system"}}}, "names code"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "not to be set"),
        ({"mean": [0.1]}, "1 values for 3 bands"),
        ({"mean": ["0.1", "0.1", "0.1"]}, r"mean[0] is '0.1'"),
        ({"std": [math.inf] * 3}, "finite"),
        ({"std": [0.1, -1.0, 0.1]}, "greater than 0"),
        ({"bands": ["B02", "B02", "B03"]}, "twice"),
        ({"bands": "B02"}, "bands"),
        ({"chip_size": -1}, "chip_size"),
        ({"seed": "0"}, "seed"),
        ({"seed": -1}, "seed"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_a_tampered_backbone_json_is_one_line(exported, tmp_path, change, said):
    """A mean of one value for five bands once passed without a word."""
    (tmp_path / "backbone.safetensors").write_bytes((exported / "backbone.safetensors").read_bytes())
    content = json.loads((exported / "backbone.json").read_text()) | change
    (tmp_path / "backbone.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load_backbone(tmp_path)
    assert said in str(error.value)


@pytest.fixture(scope="module")
def index_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    dn = np.random.default_rng(0).integers(1, 5000, (3, 32, 32)).astype(np.uint16)
    grid = {"crs": "EPSG:32632", "transform": (10.0, 0.0, 6e5, 0.0, -10.0, 5.4e6)}
    write_geotiff(folder / "scene.tif", dn, **grid, nodata=0, descriptions=["B02", "B03", "B04"])
    index = build_index([folder / "scene.tif"], bands=["B02", "B03", "B04"], chip_size=16, progress=False)
    index.save(folder / "index.parquet")
    return folder / "index.parquet"


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("row", pa.array([-5, 0, 0, 0], pa.int32()), "the column row holds -5"),
        ("row", pa.array(["0"] * 4), "the column row holds string"),
        ("row", pa.array([None, 0, 0, 0], pa.int32()), "lacks 1 values"),
        ("left", pa.array([math.inf, 0, 0, 0], pa.float64()), "the column left"),
        ("scale", pa.array([math.nan] * 4, pa.float64()), "the column scale"),
        ("scale", pa.array([0.0] * 4, pa.float64()), "the column scale"),
        ("dtype", pa.array(["object"] * 4), "the column dtype holds 'object'"),
        ("valid_fraction", pa.array([7.0] * 4, pa.float32()), "the column valid_fraction"),
        ("scene", None, "lacks the column scene"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tampered_column_of_an_index_is_one_line(index_file, tmp_path, name, values, said):
    table = pq.read_table(index_file)
    table = table.drop_columns([name]) if values is None else with_column(table, name, values)
    pq.write_table(table, tmp_path / "index.parquet")
    with pytest.raises(UserError, match="do this") as error:
        ChipIndex.load(tmp_path / "index.parquet", mend="do this")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["statistics"].update(mean=[0.1]), "1 values for 3 bands"),
        (lambda m: m["statistics"].update(mean=["0.1"] * 3), "mean[0] is '0.1'"),
        (lambda m: m["statistics"].update(m2=[-1.0] * 3), "negative"),
        (lambda m: m["statistics"].update(count=2**70), "count"),
        (lambda m: m["settings"].update(chip_size="16"), "chip_size is '16'"),
        (lambda m: m["settings"].update(chip_size=2**40), "chip_size"),
        (lambda m: m["settings"].update(more=1), "has no more"),
        (lambda m: m["settings"].update(scale=math.inf), "scale"),
        (lambda m: m.pop("fingerprint"), "lacks fingerprint"),
        (lambda m: m.update(left_out=[{"reason": 1}]), "left_out"),
    ],
)
def test_tampered_metadata_of_an_index_are_one_line(index_file, tmp_path, change, said):
    table = pq.read_table(index_file)
    metadata = json.loads(table.schema.metadata[METADATA_KEY])
    change(metadata)
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)}), tmp_path / "index.parquet")
    with pytest.raises(UserError) as error:
        ChipIndex.load(tmp_path / "index.parquet", mend="do this")
    assert said in str(error.value)


def test_an_index_that_is_a_pipe_is_refused(tmp_path):
    """Reading it hung where no signal was heard."""
    os.mkfifo(tmp_path / "index.parquet")
    with pytest.raises(UserError, match="no regular file"):
        ChipIndex.load(tmp_path / "index.parquet")


def test_an_index_that_claims_more_chips_than_its_size_holds_is_refused(index_file, monkeypatch):
    monkeypatch.setattr(index_schema, "_ROWS_A_BYTE", 0)
    with pytest.raises(UserError, match="claims 4 chips, more than its size can hold"):
        ChipIndex.load(index_file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o["state"][0].update(exp_avg=torch.zeros(1)), "exp_avg of parameter 0"),
        (lambda o: o["state"][0].update(exp_avg_sq=o["state"][0]["exp_avg_sq"].double()), "float64"),
        (lambda o: o["state"][0].update(step=torch.zeros(5)), "step of parameter 0"),
        (lambda o: o["state"][0].pop("exp_avg"), "exp_avg of parameter 0 is missing"),
        (lambda o: o["state"].update({99: o["state"][0]}), "no parameter"),
        (lambda o: o["param_groups"][0].update(betas=(2.0, 3.0)), "another betas"),
        (lambda o: o["param_groups"][0].update(params=[0, 0]), "another params"),
        (lambda o: o["param_groups"][0].pop("betas"), "another betas"),
        (lambda o: o["param_groups"][0].update(eps=torch.ones(2)), "another eps"),
    ],
)
def test_moments_of_another_shape_are_refused(change, said):
    """They once ended in heap corruption: the fused update writes as far as the parameter reaches."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = adamw(module)
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    given = optimizer.state_dict()
    _refuse_other_moments(optimizer, given)
    change(given)
    with pytest.raises(UserError, match=said):
        _refuse_other_moments(optimizer, given)


@pytest.mark.parametrize(
    ("name", "key", "tensor", "said"),
    [
        ("resnet10t", "conv1.0.weight", torch.zeros(()), "conv1.0.weight is"),
        ("resnet10t", "conv1.0.weight", torch.zeros(1).expand(10**6, 3, 10**5, 10**3), "more values than"),
        ("vit_tiny_patch16_224", "pos_embed", torch.zeros(()), "cannot convert"),
        ("vit_tiny_patch16_224", "pos_embed", torch.zeros(1, 1, 192), "cannot convert"),
        ("vit_tiny_patch16_224", "patch_embed.proj.weight", torch.zeros(192, 3), "cannot convert"),
    ],
)
def test_tampered_weights_to_start_from_are_one_line(tmp_path, name, key, tensor, said):
    """They once ended in a traceback of timm's conversion, or claimed 400 TB."""
    tensors = create_backbone(name, 3, [(32, 32)]).state_dict()
    torch.save({**tensors, key: tensor}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=said):
        create_backbone(name, 4, [(32, 32)], weights=tmp_path / "w.pth", bands=["B02", "B03", "B04", "B08"])


def test_a_network_larger_than_the_memory_is_refused_before_it_is_made():
    """Each argument lies within its bound, all of them together ask for terabytes."""
    with pytest.raises(UserError, match="GB large"):
        create_backbone("vit_tiny_patch16_224", 4, [(32, 32)], embed_dim=16384, depth=256, num_heads=16)


def test_a_checkpoint_of_compressed_records_is_refused(tmp_path):
    """Gigabytes of zeros take a few kilobytes; torch stores its records as they are."""
    torch.save({"step": 1}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for record in whole.infolist():
            bomb.writestr(record.filename, whole.read(record), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        read_torch(tmp_path / "bomb.pt")
