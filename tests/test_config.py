import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ssl_geo.config import pack_config, pretrain_config, probe_config, to_dict, to_yaml
from ssl_geo.presets import resolve

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def refusal(capsys, *argv: str) -> str:
    """The one line that the command line ends with."""
    with pytest.raises(SystemExit) as end:
        pretrain_config(list(argv))
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_one_folder_and_several_are_written_alike():
    assert pretrain_config(["--data", "/a"]).data.paths == ["/a"]
    assert pretrain_config(["--data", "/a", "/b", "--seed", "3"]).data.paths == ["/a", "/b"]
    assert pretrain_config(["--data.band_names", "B02", "B03"]).data.band_names == ["B02", "B03"]
    assert pretrain_config(["--data.band_names", "[B02, B03]"]).data.band_names == ["B02", "B03"]
    assert pretrain_config(["--views.local_scale", "0.1", "0.3"]).views.local_scale == (0.1, 0.3)


def test_negative_numbers_are_values_and_no_options():
    assert probe_config(["--ckpt", "R", "--layers", "-1", "layer2"]).layers == ["-1", "layer2"]
    assert probe_config(["--ckpt", "R", "--ignore", "-1", "0"]).ignore == [-1, 0]
    assert pretrain_config(["--data.nodata", "-3.4e38"]).data.nodata == -3.4e38


@pytest.mark.parametrize("read", [pretrain_config, pack_config])
def test_ones_own_imagery_is_not_cut_into_chips_of_the_samples_size(read):
    """The default was once chosen before the command line had been read: 32 pixels for everybody."""
    assert read([]).data.index_settings()["chip_size"] == 32
    assert read(["--data", "scenes"]).data.index_settings()["chip_size"] == 64
    assert read(["--data", "scenes", "--data.chip_size", "120"]).data.index_settings()["chip_size"] == 120


def test_paths_are_kept_whole_for_whoever_resumes_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = pretrain_config(["--data", "a", "/b", "--data.labels", "l", "--backbone.weights", "w.pth"])
    assert config.data.paths == [str(tmp_path / "a"), "/b"]
    assert (config.data.labels, config.backbone.weights) == (str(tmp_path / "l"), str(tmp_path / "w.pth"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    monkeypatch.chdir("/")
    assert pretrain_config(["--resume", str(tmp_path)]).data == config.data


def test_a_recipe_and_options_over_it(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim: {lr: 5e-4, batch_size: 8}\nbackbone: {arguments: {patch_size: 8}}\n")
    config = pretrain_config(["--config", str(recipe), "--optim.batch_size", "16"])
    assert config.optim.lr == 5e-4  # PyYAML alone reads 5e-4 as a string
    assert config.optim.batch_size == 16
    assert config.backbone.arguments == {"patch_size": 8}


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_is_understood(recipe):
    config = pretrain_config(["--config", str(recipe)])
    resolve(config, 50_000)
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)


def test_the_origins_statistics_are_big_earth_nets():
    data = pretrain_config(["--config", str(CONFIGS / "origin.yaml")]).data
    mean, std = dict(zip(data.bands, data.mean, strict=True)), dict(zip(data.bands, data.std, strict=True))
    assert data.bands == ["B02", "B03", "B04", "B05", "B06", "B07", "B11", "B08", "B8A", "B12"]
    assert (mean["B02"], mean["B11"], mean["B8A"]) == pytest.approx((0.042994, 0.159443, 0.226646), abs=1e-6)
    assert (std["B02"], std["B11"], std["B12"]) == pytest.approx((0.057242, 0.107919, 0.081887), abs=1e-6)


def test_an_unknown_setting_is_refused_with_the_nearest(capsys, tmp_path):
    assert "unknown setting optim.lrr; did you mean optim.lr?" in refusal(capsys, "--optim.lrr", "1")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim: {lrr: 1}")
    assert "unknown setting optim.lrr; did you mean optim.lr?" in refusal(capsys, "--config", str(recipe))


def test_a_value_of_another_type_is_refused(capsys):
    assert "optim.batch_size" in refusal(capsys, "--optim.batch_size", "many")
    assert "views.blur" in refusal(capsys, "--views.blur", "1", "2")


def test_resuming_what_is_no_run_is_refused(capsys, tmp_path):
    assert "is not a run folder: it has no config.yaml" in refusal(capsys, "--resume", str(tmp_path))


def test_resuming_takes_the_settings_of_the_run(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(pretrain_config(["--optim.lr", "0.5", "--steps", "7"])))
    config = pretrain_config(["--resume", str(tmp_path)])
    assert (config.optim.lr, config.steps, config.resume) == (0.5, 7, str(tmp_path))


def test_help_answers_without_torch():
    code = (
        "import sys, ssl_geo, ssl_geo.config; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'timm')])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_short_form_of_the_paths_is_not_called_a_configuration_file(capsys):
    with pytest.raises(SystemExit):
        pretrain_config(["--help"])
    said = capsys.readouterr().out
    assert "--data CONFIG" not in said
    assert "--data.paths [PATHS ...], --data [PATHS ...]" in said


def test_what_an_older_version_did_not_know_has_not_changed(tmp_path, capsys):
    settings = to_dict(pretrain_config(["--steps", "5", "--optim.clip", "3"]))
    del settings["views"]["backend"], settings["optim"]["clip"], settings["resume_changed"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    resumed = pretrain_config(["--resume", str(tmp_path)])
    assert (resumed.optim.clip, resumed.views.backend) == (3.0, "opencv")  # all that there was
    assert "optim.clip 3.0 -> 2.0" in refusal(capsys, "--resume", str(tmp_path), "--optim.clip", "2")
    line = refusal(capsys, "--resume", str(tmp_path), "--views.backend", "torch")
    assert "views.backend opencv -> torch" in line
