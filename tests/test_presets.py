import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_geo.config import PretrainConfig, pretrain_config
from ssl_geo.errors import UserError
from ssl_geo.presets import resolve


@given(st.integers(1, 10**7), st.integers(1, 10_000))
def test_presets_fit_any_archive_and_any_length(chips, steps):
    config = PretrainConfig(steps=steps)
    config.data.paths = ["DIR"]
    resolve(config, chips)
    assert 0 <= config.optim.warmup_steps <= steps
    assert 0 <= config.dino.freeze_last_layer_steps <= steps
    assert 0.9 < config.dino.teacher_momentum < 1


def test_a_small_archive_gets_a_faster_teacher_and_says_so():
    small, large = PretrainConfig(steps=100), PretrainConfig(steps=100)
    small.data.paths = large.data.paths = ["DIR"]
    line = resolve(small, 300)[-1]
    resolve(large, 10**6)
    assert small.dino.teacher_momentum < large.dino.teacher_momentum == 0.996
    assert small.dino.out_dim < large.dino.out_dim == 65_536
    assert "300 chips" in line
    assert "dino.teacher_momentum 0.99" in line


@pytest.mark.parametrize(("patch_size", "batch_size", "rate"), [(1, 64, 1e-3), (8, 64, 1.25e-4), (8, 256, 5e-4)])
def test_on_a_small_archive_only_a_transformer_keeps_to_the_papers_learning_rate(patch_size, batch_size, rate):
    config = PretrainConfig(steps=100)
    config.optim.batch_size = batch_size
    line = resolve(config, 300, patch_size=patch_size)[-1]
    assert config.optim.lr * batch_size / 256 == pytest.approx(rate)
    assert ("a transformer's learning rate" in line) is (patch_size > 1)


@pytest.mark.parametrize("momentum", [1.0, 1.5, -0.1])
def test_a_teacher_that_never_moves_is_refused(momentum):
    config = PretrainConfig(steps=100)
    config.dino.teacher_momentum = momentum
    with pytest.raises(UserError, match=rf"--dino.teacher_momentum is {momentum:g}; it must be at least 0 and less"):
        resolve(config, 300)


def test_what_the_user_set_is_left_alone():
    config = PretrainConfig(steps=100)
    config.dino.out_dim = 77
    assert "out_dim" not in " ".join(resolve(config, 300))
    assert config.dino.out_dim == 77


def test_a_warmup_longer_than_the_run_is_refused():
    config = pretrain_config(["--steps", "10", "--dino.warmup_teacher_temp_steps", "11"])
    with pytest.raises(
        UserError, match=r"--dino.warmup_teacher_temp_steps is 11; it must lie between 0 and the run's 10"
    ):
        resolve(config, 100)
