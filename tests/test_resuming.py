from ssl_geo.config import ArchiveConfig, PretrainConfig, pretrain_config, to_dict
from ssl_geo.resuming import FREE, OF_THE_SAME_CHIPS, changed_settings

DEFAULTS = to_dict(PretrainConfig())


def test_changed_settings_are_named_and_free_ones_are_not():
    before = to_dict(pretrain_config(["--optim.lr", "0.1"]))
    now = to_dict(pretrain_config(["--optim.lr", "0.2", "--data.workers", "3", "--log.every", "1", "--out", "x"]))
    assert changed_settings(before, now, DEFAULTS) == {"optim.lr": "0.1 -> 0.2"}
    assert changed_settings(before, before, DEFAULTS) == {}


def test_every_setting_of_the_imagery_either_makes_other_chips_or_does_not():
    of_other_chips = {"paths", "bands", *ArchiveConfig().index_settings()}
    free = {name for name in DEFAULTS["data"] if f"data.{name}".startswith(FREE)}
    of_the_same_chips = {name.removeprefix("data.") for name in OF_THE_SAME_CHIPS}
    assert of_other_chips | free | of_the_same_chips == set(DEFAULTS["data"])
    assert not of_other_chips & (free | of_the_same_chips)


def test_a_run_from_before_another_date_could_be_shown_shows_none():
    before = to_dict(pretrain_config([]))
    del before["views"]["season"]
    assert changed_settings(before, DEFAULTS, DEFAULTS) == {}
    now = to_dict(pretrain_config(["--views.season", "0.5"]))
    assert changed_settings(before, now, DEFAULTS)["views.season"] == "0.0 -> 0.5"
