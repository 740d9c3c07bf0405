import numpy as np
import pytest
from scipy import stats

from ssl_geo.probing.intervals import MIN_BLOCKS, bootstrap, paired_difference
from ssl_geo.probing.metrics import class_iou, miou, overall_accuracy


def world(blocks: int = 30, seed: int = 0, skill: float = 0.7) -> np.ndarray:
    """Confusion matrices of blocks whose accuracy varies; the labels depend on the seed, not on the skill."""
    rng = np.random.default_rng(seed)
    support = rng.integers(20, 200, (blocks, 3))
    right = np.clip(rng.normal(skill, 0.15, (blocks, 3)), 0, 1)
    matrices = np.zeros((blocks, 3, 3), np.int64)
    for own in range(3):
        hits = np.round(support[:, own] * right[:, own]).astype(int)
        matrices[:, own, own] = hits
        matrices[:, own, (own + 1) % 3] = support[:, own] - hits
    return matrices


@pytest.mark.parametrize("statistic", [miou, overall_accuracy])
def test_interval_is_scipys(statistic: object) -> None:
    blocks = world()

    def of_blocks(*indices: np.ndarray, axis: int = -1) -> np.ndarray:
        return statistic(blocks[indices[0]].sum(-3))

    theirs = stats.bootstrap(
        (np.arange(len(blocks)),), of_blocks, n_resamples=4000, method="percentile", vectorized=True, rng=1
    ).confidence_interval
    ours = bootstrap(blocks, statistic, draws=4000)
    assert ours.value == pytest.approx(float(statistic(blocks.sum(0))))
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.08 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.08 * width)
    assert ours.low < ours.value < ours.high


def test_interval_is_the_slow_resampling() -> None:
    blocks = world(8)
    rng = np.random.default_rng(3)
    weights = rng.multinomial(8, np.full(8, 1 / 8), size=200)
    slow = [float(miou(sum(count * block for count, block in zip(row, blocks, strict=True)))) for row in weights]
    ours = bootstrap(blocks, draws=200, seed=3)
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    assert bootstrap(blocks, draws=200, seed=3) == ours
    assert bootstrap(blocks, draws=200, seed=4) != ours


def test_a_draw_without_a_rare_class_keeps_its_score() -> None:
    # The third class is in one block of twenty and always missed: about a third of the draws do not hold it.
    blocks = world(20)
    blocks[1:, 2] = 0
    blocks[0, 2] = [40, 0, 0]
    blocks[..., 2] = 0
    interval, third = bootstrap(blocks), class_iou(blocks.sum(0))[2]
    assert third == 0
    assert interval.high < 2 / 3
    two = np.quantile([class_iou(blocks[rows].sum(0))[:2].sum() / 3 for rows in draws_of(20)], [0.025, 0.975])
    assert (interval.low, interval.high) == pytest.approx(tuple(two), abs=0.02)


def draws_of(blocks: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, blocks, (1000, blocks))


def test_interval_covers_what_it_says() -> None:
    # Truth: the accuracy over very many blocks. 95 % intervals of 25 blocks should cover it about 95 times in 100.
    everything = world(20_000, seed=9)
    truth = float(overall_accuracy(everything.sum(0)))
    samples = everything[: 200 * 25].reshape(200, 25, 3, 3)
    covered = sum((i := bootstrap(s, overall_accuracy, draws=300)).low <= truth <= i.high for s in samples)
    assert 175 <= covered <= 199


def test_too_few_blocks_give_no_interval() -> None:
    few = np.concatenate([world(MIN_BLOCKS - 1), np.zeros((5, 3, 3), np.int64)])
    interval = bootstrap(few)
    assert not interval.reliable
    assert np.isnan([interval.low, interval.high]).all()
    assert interval.blocks == MIN_BLOCKS - 1
    assert "no interval: 4 blocks" in str(interval)
    difference = paired_difference(few, few)
    assert np.isnan([difference.low, difference.high, difference.p]).all()
    assert bootstrap(world(MIN_BLOCKS)).reliable


def test_difference_is_paired() -> None:
    a = world(30)
    b = a.copy()
    # The other model loses five pixels of the first class in each block: small beside the spread between blocks.
    b[:, 0, 0] -= np.minimum(5, a[:, 0, 0])
    b[:, 0, 1] += np.minimum(5, a[:, 0, 0])
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx(float(miou(a.sum(0)) - miou(b.sum(0))))
    assert 0 < difference.low < difference.value < difference.high
    assert difference.p == pytest.approx(2 / 1001)
    alone = bootstrap(a)
    assert difference.high - difference.low < 0.3 * (alone.high - alone.low)
    back = paired_difference(b, a)
    assert (back.value, back.low, back.high) == pytest.approx((-difference.value, -difference.high, -difference.low))


def test_no_difference_has_no_evidence() -> None:
    a = world(30)
    same = paired_difference(a, a)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_models_scored_on_other_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="same labels"):
        paired_difference(world(10), world(10, seed=1))


def test_one_class_alone_can_be_the_statistic() -> None:
    interval = bootstrap(world(), lambda matrix: class_iou(matrix)[..., 1])
    assert interval.low < interval.value < interval.high
