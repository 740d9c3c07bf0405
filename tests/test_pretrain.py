"""The command as a user runs it, on a small world of GeoTIFFs and on real imagery where it is at hand."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from safetensors import safe_open

import ssl_geo.pretrain
from ssl_geo import load_backbone
from ssl_geo.config import pack_config, pretrain_config
from ssl_geo.errors import UserError
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.pack import main as pack
from ssl_geo.pretrain import default_workers, main, mind_skips, prepare
from ssl_geo.training import distributed, runs
from ssl_geo.training.lock import Lock

TINY = [
    *("--data.chip_size", "32", "--views.local_count", "2", "--optim.batch_size", "4"),
    *("--dino.out_dim", "64", "--dino.hidden_dim", "32", "--dino.bottleneck_dim", "16"),
    *("--optim.precision", "fp32", "--log.every", "1", "--data.workers", "0"),
]
VIT = [
    *("--backbone.name", "vit_tiny_patch16_224"),
    *("--backbone.arguments", "{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3, drop_path_rate: 0.1}"),
]


@pytest.fixture(scope="session")
def imagery(tmp_path_factory) -> Path:
    """Three stacked scenes of five bands with texture, in UTM."""
    folder = tmp_path_factory.mktemp("imagery")
    for number in range(3):
        noise = np.random.default_rng(number).gamma(4, 300, (5, 100, 90))
        dn = (noise * np.linspace(0.5, 1.5, 5)[:, None, None] + 200 * number).astype(np.uint16) + 1
        write_geotiff(
            folder / f"S2A_MSIL2A_2018061{number}T103021_N0208_R108_T32UPU.tif",
            dn,
            crs="EPSG:32632",
            transform=(10.0, 0.0, 6e5 + 1000 * number, 0.0, -10.0, 5.4e6),
            nodata=0,
            descriptions=["B02", "B03", "B04", "B08", "B11"],
        )
    return folder


@pytest.fixture
def arguments(imagery, tmp_path):
    return [
        *("--data", str(imagery), "--data.bands", "B02", "B03", "B04", "B08", "B11"),
        *("--data.cache", str(tmp_path / "cache")),
        *TINY,
    ]


def pretrain(out: Path, arguments: list[str], *more: str) -> list[dict]:
    """Run in this process and return the log."""
    assert main(pretrain_config([*arguments, "--out", str(out), *more])) == 0
    return read_log(out)


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(log: list[dict]) -> list[float]:
    return [line["loss"] for line in log]


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        same_tensors(a[k], b[k]) if isinstance(a[k], dict) else (not torch.is_tensor(a[k]) or torch.equal(a[k], b[k]))
        for k in a
    )


def test_a_run_leaves_what_the_readme_says(tmp_path, arguments, seen_page):
    log = pretrain(tmp_path / "run", arguments, *VIT, "--steps", "4")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert {"loss", "lr", "samples_per_s", "data_wait", "teacher_entropy", "ln_k"} <= log[0].keys()
    assert {"embedding_std", "effective_rank"} <= log[-1].keys()
    assert all(np.isfinite(losses(log)))
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        *("config.yaml", "index.parquet", "log.jsonl", "tensorboard", "checkpoints"),
        *("backbone.safetensors", "backbone.json", "report.html"),
    }
    checkpoint = torch.load(runs.checkpoints(tmp_path / "run")[-1], weights_only=True)
    assert checkpoint["step"] == 4
    assert checkpoint["backbone_description"]["bands"] == ["B02", "B03", "B04", "B08", "B11"]
    assert checkpoint["config"]["steps"] == 4
    page = seen_page((tmp_path / "run" / "report.html").read_text())
    assert page.fetched == []
    sections = ("How it went", "Views that were fed", "What the backbone sees", "Chips alike", "What data went in")
    assert page.headings == [*sections, "Settings"]
    for words in ("ln K", "Reflectance", "main components", "Cosine", "k-means", "class token", "Nearest", "chips lie"):
        assert any(words in caption for caption in page.captions), words


def test_what_is_warned_at_the_start_stands_in_the_report(tmp_path, imagery, capsys):
    """The console warned of clipped values, and nothing that the run left did."""
    shutil.copytree(imagery, tmp_path / "clipped")
    for path in (tmp_path / "clipped").iterdir():
        with rasterio.open(path, "r+") as dataset:
            dataset.write((dataset.read().astype(np.int32) * 4).clip(1, 6000).astype(np.uint16))
    where = ["--data", str(tmp_path / "clipped"), "--data.bands", "B02", "B03", "B04", "B08", "B11"]
    run = tmp_path / "run"
    pretrain(run, [*where, "--data.cache", str(tmp_path / "cache"), *TINY], "--steps", "1")
    assert "warning: clipped values" in capsys.readouterr().out
    assert "clipped values" in (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert main(pretrain_config(["--resume", str(run)])) == 0  # and in that of another day
    assert "clipped values" in (run / "report.html").read_text()


def test_plain_timm_in_a_fresh_interpreter_gives_the_same_embedding(tmp_path, arguments):
    run = tmp_path / "run"
    pretrain(run, arguments, *VIT, "--steps", "2")
    torch.manual_seed(0)
    images = torch.randn(2, 5, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    code = f"""
import json, sys, timm, torch
from safetensors.torch import load_file
sys.modules["ssl_geo"] = None
j = json.load(open("{run}/backbone.json"))
net = timm.create_model(j["architecture"], **j["model_args"]).eval()
net.load_state_dict(load_file("{run}/backbone.safetensors"))
with torch.no_grad():
    torch.save(net(torch.load("{tmp_path}/images.pt", weights_only=True)), "{tmp_path}/embedding.pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    with torch.no_grad():
        ours = load_backbone(run)(images)
    torch.testing.assert_close(torch.load(tmp_path / "embedding.pt", weights_only=True), ours)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # torch advises against 4 workers on 2 cores
def test_the_number_of_workers_changes_nothing(tmp_path, arguments):
    logs = [
        losses(pretrain(tmp_path / f"w{n}", arguments, *VIT, "--steps", "3", "--data.workers", str(n)))
        for n in (0, 1, 4)
    ]
    assert logs[0] == logs[1] == logs[2]


def test_views_made_on_the_device_give_the_losses_of_those_made_by_the_loader(tmp_path, arguments, imagery):
    settings = [*arguments, *VIT, "--steps", "4", "--log.checkpoint_every", "2", "--log.keep", "9"]
    opencv = losses(pretrain(tmp_path / "opencv", settings))
    torch_ = losses(pretrain(tmp_path / "torch", settings, "--views.backend", "torch"))
    assert torch_ != opencv
    assert torch_ == pytest.approx(opencv, abs=0.02)
    assert losses(pretrain(tmp_path / "workers", settings, "--views.backend", "torch", "--data.workers", "1")) == torch_
    runs.checkpoints(tmp_path / "torch")[-1].unlink()
    assert main(pretrain_config(["--resume", str(tmp_path / "torch")])) == 0
    assert losses(read_log(tmp_path / "torch")) == torch_


def test_a_run_writes_down_what_makes_its_views_and_keeps_to_it(tmp_path, arguments, capsys):
    pretrain(tmp_path / "run", arguments, "--steps", "1")
    assert "backend: opencv" in (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(SystemExit):
        pretrain_config(["--resume", str(tmp_path / "run"), "--views.backend", "torch"])
    assert "views.backend opencv -> torch" in capsys.readouterr().err


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, arguments):
    whole = pretrain(tmp_path / "whole", arguments, *VIT, "--steps", "6")
    settings = [*arguments, *VIT, "--steps", "6", "--log.checkpoint_every", "2", "--log.keep", "9"]
    pretrain(tmp_path / "part", settings)
    for late in runs.checkpoints(tmp_path / "part")[1:]:  # as if killed between steps 2 and 4
        late.unlink()
    assert main(pretrain_config(["--resume", str(tmp_path / "part")])) == 0
    assert losses(read_log(tmp_path / "part")) == losses(whole)
    a, b = runs.last_checkpoint(tmp_path / "whole"), runs.last_checkpoint(tmp_path / "part")
    assert same_tensors(a["method"], b["method"])
    assert same_tensors(a["optimizer"]["state"], b["optimizer"]["state"])


def test_resuming_with_other_settings_is_refused_by_name(tmp_path, arguments, capsys):
    pretrain(tmp_path / "run", arguments, "--steps", "1")
    with pytest.raises(SystemExit) as end:
        pretrain_config(["--resume", str(tmp_path / "run"), "--optim.clip", "1"])
    assert end.value.code == 2
    assert "optim.clip 3.0 -> 1.0" in capsys.readouterr().err


def test_told_to_a_resumed_run_goes_on_with_other_settings_and_says_which(tmp_path, arguments, capsys):
    run = tmp_path / "run"
    pretrain(run, arguments, *VIT, "--steps", "4", "--log.checkpoint_every", "2", "--log.keep", "9")
    runs.checkpoints(run)[-1].unlink()
    changed = ["--resume", str(run), "--resume_changed", "--optim.clip", "1"]
    assert main(pretrain_config(changed)) == 0
    assert "changed, so that the result will be another: optim.clip 3.0 -> 1.0" in capsys.readouterr().out
    assert [line["step"] for line in read_log(run)] == [1, 2, 3, 4]
    pretrain_config(["--resume", str(run), "--optim.clip", "1"])  # the run's own by now
    with pytest.raises(SystemExit):
        pretrain_config(["--resume", str(run), "--optim.clip", "3"])
    assert "resume_changed: false" in (run / "config.yaml").read_text()


def test_a_change_that_cannot_work_is_one_line(tmp_path, arguments, capsys):
    run = tmp_path / "run"
    pretrain(run, arguments, *VIT, "--steps", "2")
    before = (run / "config.yaml").read_bytes()
    told = ["--resume", str(run), "--resume_changed"]
    for wrong in (["--backbone.name", "resnet18", "--backbone.arguments", "{}"], ["--dino.out_dim", "32"]):
        with pytest.raises(UserError, match=r"^the checkpoint does not fit the settings: \d+ tensors differ, [^\n]*$"):
            main(pretrain_config([*told, *wrong]))
    with pytest.raises(UserError, match="--steps 1 is less than the 2 that the run has done"):
        main(pretrain_config([*told, "--steps", "1", "--optim.warmup_steps", "0"]))
    with pytest.raises(SystemExit):
        pretrain_config([*told, "--data.bands", "B02"])
    assert "keeps to its chips, data.bands cannot change" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before
    (run / "index.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"index.parquet cannot be read as a chip index [^\n]*: start anew with --out"):
        main(pretrain_config(["--resume", str(run)]))


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, arguments, capsys):
    run, settings = tmp_path / "run", [*arguments, *VIT, "--steps", "2"]
    whole = losses(pretrain(run, settings))
    runs.checkpoints(run)[-1].unlink()
    capsys.readouterr()
    assert main(pretrain_config(["--resume", str(run)])) == 0
    assert f"going on with {run}, it has no checkpoint yet: from step 0 of 2" in capsys.readouterr().out
    assert losses(read_log(run)) == whole


def test_packed_chips_give_the_losses_of_the_scenes_bit_for_bit(tmp_path, arguments, capsys):
    settings = [a for a in arguments if a not in TINY]
    packed = str(tmp_path / "packed")
    assert pack(pack_config([*settings, "--data.chip_size", "32", "--out", packed])) == 0
    scenes = pretrain(tmp_path / "scenes", arguments, *VIT, "--steps", "4")
    side = TINY.index("--data.chip_size")
    from_packed = [*TINY[:side], *TINY[side + 2 :], *VIT, "--data", packed]  # whose chips have the size they have
    whole = pretrain(tmp_path / "whole", from_packed, "--steps", "4", "--data.workers", "1")
    assert losses(whole) == losses(scenes)
    assert yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["data"]["chip_size"] == 32
    assert "data: about" in capsys.readouterr().out
    part = tmp_path / "part"
    pretrain(part, from_packed, "--steps", "4", "--log.checkpoint_every", "2", "--log.keep", "9")
    runs.checkpoints(part)[-1].unlink()
    assert main(pretrain_config(["--resume", str(part)])) == 0
    assert losses(read_log(part)) == losses(scenes)
    two = pretrain(tmp_path / "two", from_packed, "--data.bands", "B08", "B02", "--steps", "1")
    assert np.isfinite(losses(two)).all()
    with pytest.raises(UserError, match=r"packed with --data.bands .*, not B12: .*ssl_geo.pack"):
        pretrain(tmp_path / "none", from_packed, "--data.bands", "B12", "--steps", "1")
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="session")
def dates(tmp_path_factory, imagery) -> Path:
    """One place at three dates, with georeferencing that differs in its last digits, and a place at one."""
    folder = tmp_path_factory.mktemp("dates")
    for number, (month, left) in enumerate([("03", 0), ("06", 1e-7), ("09", 0), ("06", 1000)]):
        noise = np.random.default_rng(number).gamma(4, 300, (5, 64, 64))
        write_geotiff(
            folder / f"S2A_MSIL2A_2018{month}10T103021_N0208_R108_T32U{'PU' if left < 1 else 'QU'}.tif",
            noise.astype(np.uint16) + 1,
            crs="EPSG:32632",
            transform=(10.0, 0.0, 6e5 + left, 0.0, -10.0, 5.4e6),
            nodata=0,
            descriptions=["B02", "B03", "B04", "B08", "B11"],
        )
    return folder


def test_a_run_with_two_dates_of_a_place_says_so_and_is_resumed_as_it_was(tmp_path, arguments, dates, capsys):
    settings = [*arguments, *VIT, "--data", str(dates), "--views.season", "0.7", "--steps", "4"]
    part = tmp_path / "part"
    whole = losses(pretrain(part, settings, "--log.checkpoint_every", "2", "--log.keep", "9"))
    assert "season: 12 of 16 chips have another date\n" in capsys.readouterr().out
    runs.checkpoints(part)[-1].unlink()
    assert main(pretrain_config(["--resume", str(part)])) == 0
    assert losses(read_log(part)) == whole
    with pytest.raises(SystemExit):
        pretrain_config(["--resume", str(part), "--views.season", "0"])
    assert "views.season 0.7 -> 0.0" in capsys.readouterr().err


def test_every_second_view_of_a_run_is_of_another_date(tmp_path, arguments, dates, capsys):
    def views(name: str, *settings: str) -> list[torch.Tensor]:
        wanted = [*arguments, "--data", str(dates), "--steps", "1", "--out", str(tmp_path / name), *settings]
        with Lock() as lock:
            return next(iter(prepare(pretrain_config(wanted), lock).batches))

    none = views("none")
    assert "season" not in capsys.readouterr().out
    seasons, on_device = (
        views(b, "--views.season", "1", "--views.backend", b, "--data.workers", "1") for b in ("opencv", "torch")
    )
    for i, (one, other, third) in enumerate(zip(none, seasons, on_device, strict=True)):
        changed = (one != other).flatten(1).any(1)
        assert changed.any() == (i % 2 == 1)
        # The imagery is noise, so that 1/32 pixel of rounding counts.
        assert (other - third).abs().mean() < 0.05 < 0.5 < (one - other)[changed].abs().mean() or i % 2 == 0


@pytest.mark.parametrize(("backbone", "lr"), [(VIT, 5e-4), (["--backbone.name", "resnet10t"], 1e-3 * 256 / 4)])
def test_a_transformer_that_unlearned_at_the_rate_of_small_networks(tmp_path, arguments, backbone, lr):
    config = pretrain_config([*arguments, *backbone, "--steps", "1", "--out", str(tmp_path / "run")])
    with Lock() as lock:
        prepare(config, lock)
    assert config.optim.lr == pytest.approx(lr)


def test_a_skipped_step_names_both_dates_that_its_views_show(tmp_path, arguments, dates):
    wanted = [*arguments, "--data", str(dates), "--views.season", "1", "--steps", "2", "--out", str(tmp_path / "run")]
    config = pretrain_config(wanted)
    with Lock() as lock:
        run = prepare(config, lock)
    run.state.skips.note(torch.tensor(False))
    run.state.step = 1
    mind_skips(config, run, print)
    (kept,) = (tmp_path / "run" / "skipped").iterdir()
    with safe_open(kept, "pt") as file:
        chips = json.loads(file.metadata()["chips"])
    scenes = [(Path(c["scene"]).name, Path(c.get("another date", c)["scene"]).name) for c in chips]
    assert len(chips) == 4
    assert [one == other for one, other in scenes] == ["32UQU" in one for one, _ in scenes]  # it has one date
    assert all(c["another date"][name] == c[name] for c in chips if "another date" in c for name in ("row", "col"))


def test_a_run_is_resumed_from_another_working_directory(tmp_path, imagery, monkeypatch):
    labels = write_labels(tmp_path / "labels", imagery.iterdir())
    monkeypatch.chdir(imagery.parent)
    settings = ["--data", imagery.name, "--data.labels", os.path.relpath(labels), "--data.bands", "B02", "B08"]
    settings += [*TINY, "--data.cache", str(tmp_path / "cache"), "--log.checkpoint_every", "1", "--log.keep", "9"]
    run = tmp_path / "run"
    pretrain(run, settings, "--steps", "2")
    runs.checkpoints(run)[-1].unlink()
    monkeypatch.chdir(tmp_path)
    assert main(pretrain_config(["--resume", "run"])) == 0
    assert [line["step"] for line in read_log(run)] == [1, 2]


def write_labels(folder: Path, scenes: Iterable[Path], value: int | None = None) -> Path:
    """Labels 0 to 2 from pixel to pixel for scenes, or one value everywhere; 255 is ignored."""
    folder.mkdir()
    for scene in scenes:
        with rasterio.open(scene) as dataset:
            grid = {"crs": dataset.crs.to_string(), "transform": dataset.transform}
        classes = (
            np.arange(9000, dtype=np.uint8).reshape(1, 100, 90) % 3 if value is None else np.full((1, 100, 90), value)
        )
        write_geotiff(folder / scene.name, classes.astype(np.uint8), **grid, nodata=255)
    return folder


@pytest.mark.parametrize(("labelled", "value"), [(1, None), (3, 255)], ids=["one scene", "all ignored"])
def test_a_knn_score_that_says_nothing_is_left_out_and_said(tmp_path, imagery, arguments, capsys, labelled, value):
    """With one scene nobody may vote, and class 0 was taken for everybody's choice; without labels it ended the run."""
    scenes = sorted(imagery.iterdir())[:labelled]
    labels = write_labels(tmp_path / "labels", scenes, value)
    seen = ["--data", *map(str, scenes), "--data.labels", str(labels)]
    log = pretrain(tmp_path / "run", [*arguments, *seen], "--steps", "1")
    assert "no kNN score is watched: it wants chips of two scenes with labels" in capsys.readouterr().out
    assert "knn_accuracy" not in log[-1]
    assert "effective_rank" in log[-1]


def test_wrong_labels_to_watch_leave_no_run(tmp_path, arguments):
    """They left a run of no step, whose name was taken and which could not be gone on with."""
    (tmp_path / "labels").mkdir()
    with pytest.raises(UserError, match="no labels for"):
        main(pretrain_config([*arguments, "--data.labels", str(tmp_path / "labels"), "--out", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


def test_chips_that_patches_do_not_cover_are_watched_without_what_is_left_over(tmp_path, arguments):
    """The first look at the embeddings ended the run, before its first checkpoint: BigEarthNet's 120 pixels, ViT/16."""
    log = pretrain(tmp_path / "run", arguments, *VIT, "--data.chip_size", "36", "--steps", "1")
    assert log[-1]["effective_rank"] > 1


def test_resuming_writes_the_backbone_that_a_full_disk_kept_from_being_written(
    tmp_path, arguments, monkeypatch, capsys
):
    """It ended with exit code 0 and named the backbone of the checkpoint before as that of the last step."""
    run, export = tmp_path / "run", ssl_geo.pretrain.export_backbone

    def full(folder, backbone, description):
        if description["step"] == 4:
            raise UserError("no space left")
        export(folder, backbone, description)

    with monkeypatch.context() as patch:
        patch.setattr(ssl_geo.pretrain, "export_backbone", full)
        with pytest.raises(UserError, match="no space left"):
            pretrain(run, arguments, "--steps", "4", "--log.checkpoint_every", "2")
    assert json.loads((run / "backbone.json").read_text())["step"] == 2
    assert main(pretrain_config(["--resume", str(run)])) == 0
    assert json.loads((run / "backbone.json").read_text())["step"] == 4
    checkpoint = torch.load(runs.checkpoints(run)[-1], weights_only=True)
    assert same_tensors(checkpoint["backbone"], load_backbone(run).state_dict())


def test_a_run_goes_on_without_the_weights_that_it_started_from(tmp_path, arguments):
    weights, run = tmp_path / "weights", tmp_path / "run"
    pretrain(weights, arguments, "--steps", "1")
    settings = ("--backbone.weights", str(weights), "--steps", "3", "--log.checkpoint_every", "1", "--log.keep", "9")
    whole = losses(pretrain(run, arguments, *settings))
    shutil.rmtree(weights)
    for path in runs.checkpoints(run)[1:]:
        path.unlink()
    assert main(pretrain_config(["--resume", str(run)])) == 0
    assert losses(read_log(run)) == whole


def test_prototypes_that_were_not_trained_are_not_resumed_as_trained_ones(tmp_path, arguments):
    """Names and shapes agree, so that the optimizer's own error came through."""
    pretrain(tmp_path / "run", arguments, "--steps", "1")
    resume = ["--resume", str(tmp_path / "run"), "--resume_changed", "--dino.norm_last_layer", "false"]
    with pytest.raises(UserError, match=r"the checkpoint does not fit the settings: .* --dino.norm_last_layer"):
        main(pretrain_config(resume))


@pytest.mark.parametrize(("name", "values"), [("mean", "1000"), ("std", "-0.1")])
def test_statistics_in_dn_are_refused(tmp_path, arguments, name, values):
    """Means in DN once trained to the end: every chip was near the same dark image."""
    with pytest.raises(
        UserError, match=rf"--data.{name} is {values} for B02, whose own is 0.\d+: give positive reflec"
    ):
        pretrain(tmp_path / "run", arguments, f"--data.{name}", *[values] * 5, "--steps", "1")


def test_loader_processes_are_shared_out_among_the_ranks_of_one_machine(monkeypatch):
    """Cores of this machine were once divided by the ranks of all machines: none for 32 ranks of four."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(96))
    assert [default_workers(ranks) for ranks in (1, 8, 32, 96)] == [8, 8, 2, 0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert distributed.setup("cpu").on_this_machine == 8


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ssl_geo.pretrain", *arguments]


@pytest.mark.parametrize("backbone", [VIT, ["--backbone.name", "resnet18"]], ids=["vit", "resnet"])
def test_two_processes_give_the_losses_of_one(tmp_path, arguments, backbone):
    # Batch norm over few values amplifies the last digit of a sum: enough chips and pixels for 1e-5 to mean something.
    enough = ["--data.chip_size", "64", "--optim.batch_size", "16"]
    settings = [*arguments, *backbone, *enough, "--steps", "3"]
    settings = [s.replace("drop_path_rate: 0.1", "drop_path_rate: 0.0") for s in settings]
    one = losses(pretrain(tmp_path / "one", settings))
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "ssl_geo.pretrain", *settings, "--out", str(tmp_path / "two")),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
    )
    assert losses(read_log(tmp_path / "two")) == pytest.approx(one, abs=1e-5)


def test_sigterm_saves_and_leaves_with_a_message(tmp_path, arguments):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(*arguments, "--steps", "100000", "--out", str(run)), stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not ((run / "log.jsonl").is_file() and read_log(run)) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == runs.INTERRUPTED
    assert "SIGTERM: saved at step" in said
    assert f"--resume {run}" in said
    assert runs.last_checkpoint(run)["step"] == read_log(run)[-1]["step"]


def test_accumulated_micro_batches_give_the_losses_of_one_batch(tmp_path, arguments):
    settings = [*arguments, *[s.replace("drop_path_rate: 0.1", "drop_path_rate: 0.0") for s in VIT], "--steps", "3"]
    one = losses(pretrain(tmp_path / "one", settings))
    two = losses(pretrain(tmp_path / "two", settings, "--optim.accumulate", "2"))
    assert two == pytest.approx(one, abs=1e-5)


def test_a_step_that_is_not_finite_is_skipped_counted_and_given_up(tmp_path, arguments, monkeypatch, capsys):
    step = ssl_geo.pretrain.train_step

    def step_without_numbers(method, optimizer, scaler, views, number, **more):
        return step(method, optimizer, scaler, [view * float("nan") for view in views], number, **more)

    monkeypatch.setattr(ssl_geo.pretrain, "train_step", step_without_numbers)
    with pytest.raises(UserError, match="2 steps in a row were not finite"):
        pretrain(tmp_path / "run", arguments, "--steps", "9", "--optim.max_skipped", "1")
    assert "not finite, skipped" in capsys.readouterr().out


def test_a_run_that_diverges_is_told_in_one_line_and_saves_nothing_over_what_is_good(tmp_path, arguments):
    """It ended in a LinAlgError of the measures of health."""
    often = ("--log.health_every", "3", "--log.checkpoint_every", "1")
    with pytest.raises(UserError, match=r"step 3: the run has diverged.*lower --optim.lr than 1e\+12"):
        pretrain(tmp_path / "run", arguments, "--steps", "9", "--optim.lr", "1e12", "--optim.warmup_steps", "0", *often)
    assert read_log(tmp_path / "run")[-1]["effective_rank"] is None
    assert runs.last_checkpoint(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--data", "EMPTY"], "EMPTY"),
        (["--data.bands", "B02", "B8A"], "B8A"),
        (["--data.chip_size", "128"], "--data.chip_size"),
        (["--views.global_size", "30", *VIT], "--views.global_size"),
        (["--backbone.name", "resnet1888"], "resnet18"),
        (["--optim.batch_size", "5", "--optim.accumulate", "2"], "--optim.batch_size"),
        (["--data.mean", "0.1", "0.2"], "--data.mean has 2 values, the backbone takes 5 bands"),
        (["--views.season", "1.5"], "--views.season is 1.5: give a probability from 0 to 1"),
        (["--views.season", "-0.1"], "--views.season is -0.1: give a probability from 0 to 1"),
        (
            ["--views.season", "0.5"],
            "--views.season 0.5, but none of the 36 chips has another date: no two scenes have one on the same ground; "
            "give --views.season 0",
        ),
        (["--data.std", "0.1"], "--data.std has 1 values, the backbone takes 5 bands"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_wrong_input_is_one_line_and_nothing_is_written(tmp_path, arguments, settings, words):
    (tmp_path / "EMPTY").mkdir()
    settings = [str(tmp_path / s) if s == "EMPTY" else s for s in settings]
    with pytest.raises(UserError) as error:
        pretrain(tmp_path / "run", [*arguments, *settings], "--steps", "1")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_mistake_ends_the_command_with_code_2_and_one_line(tmp_path, imagery):
    done = subprocess.run(
        command("--data", str(imagery), "--data.bands", "B02", "B8A", "--out", str(tmp_path / "run")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("ssl_geo.pretrain: error: ")


def test_an_output_folder_in_use_is_refused(tmp_path, arguments):
    pretrain(tmp_path / "run", arguments, "--steps", "1")
    with pytest.raises(UserError, match="is in use"):
        pretrain(tmp_path / "run", arguments, "--steps", "1")


TEN = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
TWELVE = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]


def test_a_teacher_at_temperature_1_is_told_from_the_first_line_on(tmp_path, arguments, capfd):
    pretrain(tmp_path / "run", arguments, *VIT, "--steps", "5", "--log.every", "5", "--dino.teacher_temp", "1")
    said = "".join(capfd.readouterr())
    assert "step 5: WARNING the representation has collapsed: the teacher answers evenly" in said


@pytest.fixture
def small(tmp_path):
    """Settings that make a run on real imagery short: chips as they are, views at half their size."""
    return [
        *("--data.cache", str(tmp_path / "cache"), "--data.workers", "0", "--data.chip_size", "64"),
        *("--views.global_size", "32", "--views.local_size", "16", "--views.local_count", "2"),
        *(
            "--dino.out_dim",
            "256",
            "--dino.hidden_dim",
            "256",
            "--log.every",
            "1",
            "--steps",
            "40",
            "--optim.batch_size",
            "16",
        ),
    ]


def falls(log: list[dict]) -> bool:
    found = losses(log)
    return bool(np.isfinite(found).all()) and np.mean(found[-10:]) < np.mean(found[:10])


def test_real_scenes_patches_and_chips_together(tmp_path, shared_data, small, capsys):
    folders = [str(shared_data / name) for name in ("scenes", "bigearthnet", "chips_seasonal")]
    log = pretrain(tmp_path / "run", [*small, "--data", *folders])
    said = capsys.readouterr().out
    assert "australia_20190105" in said
    assert "B8A, B12" in said
    assert int(said.split(" chips of 64")[0].split()[-1]) >= 350
    assert falls(log)


def test_real_scenes_with_the_bands_that_all_share(tmp_path, shared_data, small, capsys):
    shared = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B11"]
    pretrain(tmp_path / "run", [*small, "--data", str(shared_data / "scenes"), "--data.bands", *shared, "--steps", "1"])
    assert "from 4 of 4 scenes" in capsys.readouterr().out


def test_real_jp2_product_alone_and_refused_beside_l2a(tmp_path, shared_data, small):
    jp2, scenes = str(shared_data / "jp2_multires"), str(shared_data / "scenes")
    assert falls(pretrain(tmp_path / "run", [*small, "--data", jp2]))
    with pytest.raises(UserError, match=r"L1C.*L2A.*--data.allow_mixed|L2A.*L1C.*--data.allow_mixed"):
        pretrain(tmp_path / "mixed", [*small, "--data", jp2, scenes])
    assert not (tmp_path / "mixed").exists()


def test_real_chips_without_band_names(tmp_path, shared_data, small):
    chips = str(shared_data / "chips_coastal")
    with pytest.raises(UserError, match=r"--data.band_names.*B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B11 B12"):
        pretrain(tmp_path / "unnamed", [*small, "--data", chips])
    assert falls(pretrain(tmp_path / "run", [*small, "--data", chips, "--data.band_names", *TWELVE]))
