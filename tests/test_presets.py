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


@pytest.mark.parametrize(("transformer", "batch_size", "rate"), [(0, 64, 1e-3), (1, 64, 1.25e-4), (1, 256, 5e-4)])
def test_on_a_small_archive_only_a_transformer_keeps_to_the_papers_learning_rate(transformer, batch_size, rate):
    config = PretrainConfig(steps=100)
    config.optim.batch_size = batch_size
    line = resolve(config, 300, transformer=bool(transformer))[-1]
    assert config.optim.lr * batch_size / 256 == pytest.approx(rate)
    assert ("a transformer's learning rate" in line) is bool(transformer)


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--optim.lr", "-1"], r"--optim.lr is -1; it must be at least 0"),
        (["--dino.teacher_temp", "0"], r"--dino.teacher_temp is 0; it must be at least 0.001"),
        (["--dino.center_momentum", "2"], r"--dino.center_momentum is 2; it must be between 0 and 1"),
        (["--optim.weight_decay", "0.04", "-0.4"], r"--optim.weight_decay is -0.4; it must be at least 0"),
        (["--seed", "-1"], r"--seed is -1; it must be between 0 and 4294967295"),
        (["--dino.out_dim", "0"], r"--dino.out_dim is 0; it must be at least 1"),
        (["--data.workers", "-1"], r"--data.workers is -1; it must be at least 0"),
        (["--log.keep", "0"], r"--log.keep is 0; it must be at least 1"),
        (["--optim.batch_size", "0"], r"--optim.batch_size is 0; it must be at least 1"),
        (["--optim.accumulate", "0"], r"--optim.accumulate is 0; it must be at least 1"),
    ],
)
def test_a_value_that_would_train_nonsense_is_refused(given, message):
    """A negative learning rate and a negative temperature once trained to the end, with exit code 0."""
    with pytest.raises(UserError, match=message):
        resolve(pretrain_config(["--steps", "10", *given]), 100)


@pytest.mark.parametrize("size", ["0", "-64"])
def test_the_batch_is_judged_before_steps_are_counted_in_it(size):
    """It once ended in a division by zero, or the blame fell on --steps."""
    with pytest.raises(UserError, match=rf"--optim.batch_size is {size}; it must be at least 1"):
        resolve(pretrain_config(["--data", "imagery", "--optim.batch_size", size]), 100)


def test_a_warm_up_of_the_temperature_starts_at_the_papers_where_no_start_is_given():
    """It once started where it ended, and nobody was told that it warmed nothing up."""
    config = pretrain_config(
        ["--steps", "100", "--dino.teacher_temp", "0.07", "--dino.warmup_teacher_temp_steps", "30"]
    )
    resolve(config, 100)
    assert config.dino.warmup_teacher_temp == 0.04
    cooler = pretrain_config(["--steps", "9", "--dino.teacher_temp", "0.02", "--dino.warmup_teacher_temp_steps", "3"])
    resolve(cooler, 100)
    assert cooler.dino.warmup_teacher_temp == 0.02


def test_a_start_of_the_temperature_that_no_step_sees_is_said():
    config = pretrain_config(["--steps", "100", "--dino.teacher_temp", "0.07", "--dino.warmup_teacher_temp", "0.04"])
    line = resolve(config, 100)[-1]
    assert line == "dino.warmup_teacher_temp 0.04 is idle: no step warms up from it to 0.07 " + (
        "(--dino.warmup_teacher_temp_steps)"
    )
    assert not any("idle" in line for line in resolve(PretrainConfig(steps=100), 100))
