"""The command as a user runs it: exit codes, table, JSON and page; real imagery where it is at hand."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ssl_geo.config import doctor_config
from ssl_geo.doctor import main
from ssl_geo.errors import UserError
from ssl_geo.imagery.diagnosis import Diagnosis
from ssl_geo.imagery.diagnosis_report import as_html, as_text
from ssl_geo.imagery.findings import MAX_FOLDERS, MAX_PATHS, Finding, exit_code, groups_of, merge, placed
from ssl_geo.imagery.geotiff import write_geotiff
from ssl_geo.imagery.sample import make_sample

GRID = {"crs": "EPSG:32632", "transform": (10.0, 0.0, 6e5, 0.0, -10.0, 5.4e6)}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Six scenes of the embedded sample, smaller than usual."""
    return make_sample(tmp_path_factory.mktemp("sample"), scenes=6, size=150)


def examine(*arguments):
    """Exit code and findings by check, from the JSON, of a run of the command with ``--out``."""
    config = doctor_config([*map(str, arguments)])
    code = main(config)
    report = json.loads((Path(config.out) / "doctor.json").read_text())
    assert (report["format"], report["exit_code"]) == (2, code)
    return code, {finding["check"]: finding for finding in reversed(report["findings"])}


def test_the_sample_is_clean(sample, tmp_path, capsys):
    code, findings = examine(sample / "images", "--labels", sample / "labels", "--out", tmp_path)
    assert code == 0
    assert {finding["severity"] for finding in findings.values()} == {"info"}
    assert "6 scenes, 6 label rasters, 0.1 million pixels read: clean" in capsys.readouterr().out


def test_a_warning_is_1_and_an_error_is_2(tmp_path):
    dn = np.random.default_rng(0).integers(500, 3000, (3, 64, 64)).astype(np.uint16)
    dn[:, :20] = 0
    (tmp_path / "images").mkdir()
    write_geotiff(tmp_path / "images" / "a.tif", dn, descriptions=["B02", "B03", "B04"], **GRID)
    assert main(doctor_config([str(tmp_path / "images")])) == 1
    write_geotiff(tmp_path / "images" / "a.tif", dn, **GRID)
    assert main(doctor_config([str(tmp_path / "images")])) == 2


def test_less_than_one_worker_is_refused():
    """-1 once ended in a traceback, and 0 was taken for the default."""
    with pytest.raises(UserError, match="--workers is 0; it must be at least 1"):
        main(doctor_config(["--workers", "0"]))


def test_the_command_line(tmp_path):
    dn = np.random.default_rng(0).integers(500, 3000, (3, 64, 64)).astype(np.uint16)
    path = tmp_path / "a b.tif"
    write_geotiff(path, dn, nodata=0, **GRID)
    command = [sys.executable, "-m", "ssl_geo.doctor", str(path), "--quick", "--data.band_names", "B02", "B03", "B04"]
    ran = subprocess.run([*command, "--data.offset", "0"], capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr
    assert re.search(r"^warning +bands missing +1 +.*a b\.tif$", ran.stdout, re.MULTILINE)
    ran = subprocess.run([sys.executable, "-m", "ssl_geo.doctor", str(tmp_path / "no")], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert "Traceback" not in ran.stderr


def test_positional_paths_and_flags():
    config = doctor_config(["a", "b c", "--labels", "l", "--quick"])
    assert (config.paths, config.labels, config.quick) == (["a", "b c"], ["l"], True)
    config = doctor_config(["a", "--quick", "--out", "o"])
    assert (config.quick, config.out) == (True, "o")
    assert doctor_config(["a", "--quick", "false"]).quick is False


def test_an_output_folder_that_cannot_be_made_is_said_before_the_look(sample, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        main(doctor_config([str(sample / "images"), "--out", str(tmp_path / "file" / "out")]))
    with pytest.raises(UserError, match="--out /proc cannot be written"):
        main(doctor_config([str(sample / "images"), "--out", "/proc"]))


class Page(HTMLParser):
    """Tags that are open, addresses, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in {"meta", "br", "link", "img"}:
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in {"href", "src", "action"}]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


HOSTILE = Diagnosis(
    2,
    0,
    10,
    [
        Finding("saturation", "error", ("<script>alert(1)</script>\n\x1b[31m.tif", "b"), "a & b", "<i>", "rm 'x'", 2),
        Finding("class balance", "info", (), "5", "6", "7"),
    ],
    [],
    [],
)


def test_the_page_loads_nothing_is_well_formed_and_escapes():
    html = as_html(HOSTILE, {"paths": ["</pre><script>"]}, "0.1")
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.addresses == []
    assert "<script" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert "<script>alert(1)</script>" in "".join(page.text)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def luminance(colour):
    """Relative luminance of sRGB (WCAG 2.2)."""
    channels = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_colours_of_the_page_have_contrast(mode):
    schemes = re.findall(r":root \{(.*?)\}", as_html(HOSTILE, {}, ""), re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", schemes[mode == "dark"]))
    for ground in ("page", "card"):
        for name in ("text", "dim", "error", "warning", "info", "clean"):
            dark, light = sorted(luminance(colours[c]) for c in (ground, name))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ground, name)


def test_the_table_has_no_control_characters():
    text = as_text(HOSTILE)
    assert "\x1b" not in text
    assert "\\n" in text
    assert max(map(len, text.splitlines())) <= 120


def test_findings_are_merged_by_what_was_expected():
    one = [Finding("a", "warning", (f"{k}",), f"found {k}", "e", "m") for k in range(MAX_PATHS + 10)]
    merged = merge([*one, Finding("a", "warning", ("x",), "f", "other", "m"), Finding("b", "error", (), "f", "e", "m")])
    assert [(f.check, f.severity, f.count) for f in merged] == [
        ("b", "error", 1),
        ("a", "warning", MAX_PATHS + 10),
        ("a", "warning", 1),
    ]
    assert merged[1].found == "found 0"
    assert len(merged[1].paths) == MAX_PATHS
    assert [exit_code(f) for f in (merged, merged[1:], [])] == [2, 1, 0]


def test_many_folders_are_grouped_by_those_above_them():
    paths = {f"/data/{k % 3}/{k}/a.tif": "L2A" for k in range(3 * MAX_FOLDERS)}
    groups = groups_of(paths)
    assert {(group.folder, group.rasters) for group in groups.values()} == {
        (f"/data/{k}", MAX_FOLDERS) for k in range(3)
    }
    assert groups_of({"/a/b.tif": "L2A", "/a/c/d.tif": "L2A"})["/a/c/d.tif"].folder == "/a/c"


def test_a_finding_of_several_folders_is_told_of_each():
    groups = groups_of({"/a/1.tif": "L2A", "/a/2.tif": "L2A", "/b/1.tif": "L2A"})
    each = placed(Finding("bands missing", "warning", tuple(groups), "f", "e", "m", 3), groups)
    assert [(part.where.folder, part.count) for part in each] == [("/a", 2), ("/b", 1)]
    (pairs,) = placed(Finding("duplicates", "warning", ("/a/1.tif", "/b/1.tif"), "f", "e", "m", 1), groups)
    assert pairs.where is None


def test_commands_are_not_wrapped():
    command = f"python -m ssl_geo.doctor '/{'long folder/' * 20}'"
    finding = Finding("labels among the images", "error", ("a",), "f", "e", "m", 1, command)
    assert f"run:   {command}\n" in as_text(Diagnosis(1, 0, 1, [finding], [], []))


# What is known of the real archives: folder, labels, options, exit code, checks that must be among the findings of that
# severity, and checks that must not.
REAL = [
    ("scenes", None, (), 1, {"undeclared nodata": "warning", "bands missing": "warning"}),
    ("chips_coastal", None, (), 2, {"band names missing": "error", "non-square pixels": "warning"}),
    ("bigearthnet", None, (), 0, {"mixed resolutions": "info"}),
    ("jp2_multires", None, (), 0, {"mixed resolutions": "info"}),
    ("landcover/images_l2a", "landcover/labels", (), 2, {"nodata not declared": "info", "band names missing": "error"}),
    ("landcover/images_l1c", "landcover/labels", (), 2, {"mixed offsets in the pixels": "error"}),
    ("water/images/labelled_image_1.tif", "water/labels", (), 2, {"band names missing": "error"}),
    ("cloud/images", "cloud/labels", ("--data.scale", "1"), 1, {"georeferencing missing": "warning"}),
    ("chips_seasonal", "chips_seasonal_labels", (), 2, {"several labels": "error", "label shift": "warning"}),
    ("odd/rasterio", None, (), 2, {"unreadable": "error", "no imagery": "warning", "nothing in it": "warning"}),
    ("odd/rio-cogeo/cog_no_offest.tif", None, (), 2, {"georeferencing missing": "warning"}),
    ("odd/rio-tiler/cog_scale.tif", None, (), 2, {"header contradicts itself": "error"}),
    ("odd/rio-tiler/inverted_lat.tif", None, (), 2, {"nothing in it": "warning", "grid not north-up": "info"}),
]
# Nothing of these is in the real archives, so a finding would be a false alarm.
NEVER = {"band order", "duplicates", "saturation", "negative reflectance", "wrong unit", "label grid", "clipped values"}


@pytest.mark.parametrize(("folder", "labels", "options", "code", "checks"), REAL, ids=lambda v: str(v)[:24])
def test_real_archives(shared_data, tmp_path, folder, labels, options, code, checks):
    more = ("--labels", shared_data / labels) if labels else ()
    got, findings = examine(shared_data / folder, *more, *options, "--out", tmp_path)
    assert got == code
    assert checks.items() <= {check: finding["severity"] for check, finding in findings.items()}.items()
    if "odd" not in folder:
        assert NEVER.isdisjoint(findings)
        assert "labels among the images" not in findings
    assert all(finding["fix"] and finding["found"] and finding["expected"] for finding in findings.values())
    if folder == "odd/rasterio":
        assert [path for path in findings["unreadable"]["paths"] if "corrupt" not in path] == []
    if folder == "scenes":
        report = json.loads((tmp_path / "doctor.json").read_text())
        assert sum(f["count"] for f in report["findings"] if f["check"] == "undeclared nodata") == 4
