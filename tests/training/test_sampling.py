import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ssl_geo.training.sampling import Shuffle, StepBatches


def batches(**settings):
    return list(StepBatches(**{"chips": 10, "batch_size": 4, "start": 0, "stop": 5, "seed": 0, **settings}))


def test_every_chip_is_seen_once_an_epoch():
    keys = [key for batch in batches() for key in batch]
    for epoch in (0, 1):
        assert sorted(chip for e, chip in keys if e == epoch) == list(range(10))


def test_epochs_and_seeds_differ():
    keys = [key for batch in batches() for key in batch]
    assert [c for e, c in keys if e == 0] != [c for e, c in keys if e == 1]
    assert batches(seed=1) != batches()


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 9), st.integers(1, 4))
def test_starting_anywhere_gives_the_same_batches(chips, share, start, world):
    settings = {"chips": chips, "batch_size": share * world, "stop": 10, "seed": 3}
    assert batches(**settings, start=start) == batches(**settings, start=0)[start:]


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 4))
def test_the_ranks_together_see_what_one_process_sees(chips, share, world):
    settings = {"chips": chips, "batch_size": share * world, "seed": 3}
    ranks = [batches(**settings, rank=r, world=world) for r in range(world)]
    together = [[key for part in parts for key in part] for parts in zip(*ranks, strict=True)]
    assert together == batches(**settings)


def test_an_archive_smaller_than_a_batch_goes_round():
    assert [len(batch) for batch in batches(chips=1)] == [4] * 5


@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_a_shuffle_is_a_permutation(n, seed):
    assert sorted(Shuffle(n, (seed, 0))(np.arange(n)).tolist()) == list(range(n))


def test_the_size_of_the_archive_costs_nothing():
    n = 10**15
    chips = Shuffle(n, (0, 0))(np.arange(n - 1000, n))
    assert len(set(chips.tolist())) == 1000
    assert chips.min() >= 0
    assert n / 2 < chips.max() < n


def test_every_order_of_four_comes_equally_often():
    orders = [tuple(Shuffle(4, (0, epoch))(np.arange(4)).tolist()) for epoch in range(4800)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_large_shuffle_looks_random():
    n = 10_000
    order = Shuffle(n, (3, 1))(np.arange(n))
    bins = 20  # places against values: uniform together
    counts, _, _ = np.histogram2d(np.arange(n), order, bins=bins)
    # counts of a random permutation: variance (1 - 1/bins)² times that of independent draws
    assert stats.chi2.sf((counts**2).sum() / (n / bins**2) - n, (bins - 1) ** 2) > 1e-3
    steps = np.abs(np.diff(order))
    assert abs(steps.mean() / (n / 3) - 1) < 0.03  # the mean distance of two random places
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert abs((Shuffle(n, (3, 2))(np.arange(n)) == order).sum() - 1) <= 5
