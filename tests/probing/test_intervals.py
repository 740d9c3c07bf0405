import numpy as np
import pytest
from scipy import stats

from ssl_geo.probing.intervals import MIN_BLOCKS, bootstrap, paired_difference
from ssl_geo.probing.metrics import (
    Marginals,
    class_iou,
    frequency_weighted_iou,
    macro_f1,
    marginals,
    micro_iou,
    miou,
    overall_accuracy,
)


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


def tail(blocks: int) -> float:
    """Share of the draws below a 95 % interval: where a normal has as much as a Student's t, wider by √(n / (n-1))."""
    return stats.norm.cdf(stats.t.ppf(0.025, blocks - 1) * np.sqrt(blocks / (blocks - 1)))


@pytest.mark.parametrize("statistic", [miou, overall_accuracy])
def test_interval_is_scipys(statistic: object) -> None:
    blocks = world()

    def of_blocks(*indices: np.ndarray, axis: int = -1) -> np.ndarray:
        return statistic(blocks[indices[0]].sum(-3))

    theirs = stats.bootstrap(
        (np.arange(len(blocks)),),
        of_blocks,
        n_resamples=4000,
        method="percentile",
        confidence_level=1 - 2 * tail(30),
        vectorized=True,
        rng=1,
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
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(slow, [tail(8), 1 - tail(8)])))
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


@pytest.mark.parametrize(("count", "least"), [(5, 0.89), (8, 0.92), (15, 0.93), (25, 0.93), (50, 0.93)])
def test_interval_covers_what_it_says(count: int, least: float) -> None:
    """Truth: the accuracy over very many blocks. Plain percentiles cover it 83 times in 100 with five blocks."""
    everything = world(60_000, seed=9)
    truth = float(overall_accuracy(everything.sum(0)))
    samples = everything[: 1000 * count].reshape(1000, count, 3, 3)
    covered = np.mean([(i := bootstrap(s, overall_accuracy)).low <= truth <= i.high for s in samples])
    assert least <= covered <= 0.975


@pytest.mark.parametrize("count", [5, 8, 25])
def test_no_difference_is_seldom_taken_for_one(count: int) -> None:
    """With five blocks the interval once left 0 out in 15 of 100 such cases, and p could be 0.002."""
    rng = np.random.default_rng(2)
    pairs = [world(count, seed=seed) for seed in range(400)]
    # Each block is swapped between the two models by a coin: neither is better.
    other = [p.copy() for p in pairs]
    for blocks in other:
        lost = np.minimum(rng.integers(0, 30, count), blocks[:, 0, 0])
        blocks[:, 0, 0] -= lost
        blocks[:, 0, 1] += lost
    found = []
    for one, two in zip(pairs, other, strict=True):
        coin = rng.random(count)[:, None, None] < 0.5
        found.append(paired_difference(np.where(coin, one, two), np.where(coin, two, one)))
    assert np.mean([d.low > 0 or d.high < 0 for d in found]) < 0.11
    assert np.mean([d.p < 0.05 for d in found]) < 0.09


def test_a_bootstrap_of_many_classes_draws_no_confusion_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 255 classes a thousand drawn matrices took half a gigabyte and seconds, for each score of each model."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 9, (12, 40, 40))
    weights = rng.multinomial(12, np.full(12, 1 / 12), size=200)
    drawn = np.tensordot(weights, blocks, axes=1)  # slow
    for statistic in (miou, macro_f1, micro_iou, frequency_weighted_iou, overall_accuracy):
        np.testing.assert_array_equal(statistic(drawn), statistic(Marginals(*(weights @ m for m in marginals(blocks)))))
    sizes = []
    monkeypatch.setattr(
        "ssl_geo.probing.intervals.Marginals", lambda *parts: sizes.append([p.size for p in parts]) or Marginals(*parts)
    )
    bootstrap(blocks)
    assert sizes == [[1000 * 40] * 3]


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
    # No draw is below 0: 2 / 1001 among many blocks, more among thirty.
    assert difference.p == pytest.approx(2 * stats.t.sf(stats.norm.isf(1 / 1001) / np.sqrt(30 / 29), 29))
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
