import errno
import json
import threading

import numpy as np
import pytest
import torch
from torch import nn

from ssl_geo.errors import UserError
from ssl_geo.probing.features import FeatureExtractor
from ssl_geo.probing.store import extract, predicted_bytes, store_key


class Counting(nn.Module):
    """A backbone of one convolution that counts the chips it saw."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 3, 4, stride=4)
        self.norm = nn.BatchNorm2d(3)
        self.gain, self.seen = gain, 0

    def forward(self, x):
        self.seen += len(x)
        return self.norm(self.stem(x)) * self.gain


def read(number: int):
    rng = np.random.default_rng(number)
    return rng.standard_normal((2, 16, 16)).astype(np.float32), rng.integers(0, 3, (16, 16)).astype(np.uint8)


def make(net, folder, chips=10, memory=10**9, layers=("stem", "norm"), **settings):
    extractor = FeatureExtractor(net, list(layers), by="module", input_size=16)
    net.seen = 0
    return extract(extractor, read, chips, folder, memory=memory, batch_size=4, say=lambda line: None, **settings)


def test_the_store_holds_what_the_backbone_gives(tmp_path):
    net = Counting().eval()
    store = make(net, tmp_path / "s")
    images = torch.from_numpy(np.stack([read(n)[0] for n in range(10)]))
    with torch.no_grad():
        expected = net.norm(net.stem(images)).numpy()
    np.testing.assert_allclose(store.layers["norm"], expected, rtol=1e-3, atol=1e-3)
    assert store.layers["norm"].dtype == np.float16
    assert store.labels.dtype == np.uint8
    np.testing.assert_array_equal(store.labels[3], read(3)[1])
    assert store.passes == 10


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/s cannot be made \(Not a directory\); name another --cache"):
        make(Counting(), tmp_path / "file" / "s")


def test_the_next_run_makes_no_pass(tmp_path):
    net = Counting()
    make(net, tmp_path / "s")
    again = make(net, tmp_path / "s")
    assert (again.passes, net.seen) == (0, 0)
    assert len(again) == 10


def test_an_interrupted_extraction_goes_on_where_it_stopped(tmp_path):
    net = Counting()
    whole = make(net, tmp_path / "whole", chips=100)
    calls = 0

    def torn(number):
        nonlocal calls
        calls += 1
        if number == 80:
            raise KeyboardInterrupt
        return read(number)

    extractor = FeatureExtractor(net, ["stem", "norm"], by="module", input_size=16)
    with pytest.raises(KeyboardInterrupt):
        extract(extractor, torn, 100, tmp_path / "part", memory=10**9, batch_size=4, say=lambda line: None)
    assert json.loads((tmp_path / "part" / "store.json").read_text())["done"] == 64
    part = make(net, tmp_path / "part", chips=100)
    assert (part.passes, net.seen) == (36, 36)
    for name in whole.layers:
        np.testing.assert_array_equal(part.layers[name], whole.layers[name])
    np.testing.assert_array_equal(part.labels, whole.labels)


def test_overflow_of_float16_keeps_float32(tmp_path):
    net = Counting()
    with torch.no_grad():
        net.stem.weight.mul_(1e6)
    store = make(net, tmp_path / "s", layers=("stem",))
    assert store.layers["stem"].dtype == np.float32
    assert np.isfinite(store.layers["stem"]).all()
    assert np.abs(store.layers["stem"]).max() > 65_504
    assert len(store) == 10


def test_a_second_pass_that_is_interrupted_does_not_count_on_the_first(tmp_path):
    """What float16 could not hold was begun anew, and a kill left chips of zeros that counted as done."""
    net = Counting()

    def late(stop):
        def at(number):
            image, labels = read(number)
            if number == 70:  # beyond the sixteen batches after which progress is noted
                image = image * np.float32(1e7)
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return image, labels

        return at

    extractor = FeatureExtractor(net, ["stem"], by="module", input_size=16)
    given = {"memory": 10**9, "batch_size": 4, "say": lambda line: None}
    calls = 0
    whole = extract(extractor, late(0), 100, tmp_path / "whole", **given)
    calls = 0
    with pytest.raises(KeyboardInterrupt):  # 72 chips of the first pass, 8 of the second
        extract(extractor, late(80), 100, tmp_path / "part", **given)
    assert json.loads((tmp_path / "part" / "store.json").read_text())["done"] == 0
    part = extract(extractor, late(0), 100, tmp_path / "part", **given)
    assert part.layers["stem"].dtype == np.float32
    np.testing.assert_array_equal(part.layers["stem"], whole.layers["stem"])
    np.testing.assert_array_equal(part.labels, whole.labels)


def test_two_probes_of_one_backbone_do_not_write_over_each_other(tmp_path):
    """The second one's files replaced the first one's: chips of zeros, all of class 0, went into heads and scores."""
    whole, said, stores = make(Counting(), tmp_path / "whole", chips=40), [], {}
    begun, asked = threading.Event(), threading.Event()

    def slow(number):
        if number == 8:
            begun.set()
            assert asked.wait(60)  # until the other one is there
        return read(number)

    def say(line):
        said.append(line)
        asked.set()

    def probe(name, source, **given):
        extractor = FeatureExtractor(Counting(), ["stem", "norm"], by="module", input_size=16)
        stores[name] = extract(extractor, source, 40, tmp_path / "s", memory=10**9, batch_size=4, **given)

    first = threading.Thread(target=probe, args=("first", slow), kwargs={"say": lambda line: None})
    first.start()
    assert begun.wait(60)
    probe("second", read, say=say)
    first.join()
    assert said[0].startswith("another process computes these features, waiting for it")
    assert (stores["first"].passes, stores["second"].passes) == (40, 0)
    for store in stores.values():
        np.testing.assert_array_equal(store.layers["norm"], whole.layers["norm"])
        np.testing.assert_array_equal(store.labels, whole.labels)


def test_a_whole_store_is_read_where_nothing_can_be_locked(tmp_path, monkeypatch):
    make(Counting(), tmp_path / "s")

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert make(Counting(), tmp_path / "s").passes == 0
    said = []
    extractor = FeatureExtractor(Counting(), ["stem"], by="module", input_size=16)
    store = extract(extractor, read, 10, tmp_path / "other", memory=10**9, batch_size=4, say=said.append)
    assert store.passes == 10
    assert "cannot be locked (Function not implemented)" in said[0]


def test_a_store_of_other_chips_or_half_written_over_is_refused(tmp_path):
    make(Counting(), tmp_path / "s")
    with pytest.raises(UserError, match="holds 10 chips, not 9: delete it"):
        make(Counting(), tmp_path / "s", chips=9)
    state = json.loads((tmp_path / "s" / "store.json").read_text())
    (tmp_path / "s" / "store.json").write_text(json.dumps({**state, "done": 8, "dtype": "float32"}))
    with pytest.raises(UserError, match="written over by two probes at once: delete it"):
        make(Counting(), tmp_path / "s")


def test_a_store_beyond_the_budget_stays_on_disk(tmp_path):
    small = make(Counting(), tmp_path / "s")
    large = make(Counting(), tmp_path / "s", memory=0)
    assert not isinstance(small.layers["stem"], np.memmap)
    assert isinstance(large.layers["stem"], np.memmap)
    np.testing.assert_array_equal(small.layers["stem"], large.layers["stem"])


def test_the_size_is_predicted(tmp_path):
    extractor = FeatureExtractor(Counting(), ["stem", "norm"], by="module", input_size=16)
    make(Counting(), tmp_path / "s")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "s").glob("*.npy"))
    assert predicted_bytes(extractor, 10, (16, 16)) == pytest.approx(on_disk, abs=3 * 128)


def test_a_frozen_backbones_statistics_do_not_move(tmp_path):
    net = Counting().train()
    before = net.norm.running_mean.clone()
    make(net, tmp_path / "s")
    assert torch.equal(net.norm.running_mean, before)


def test_the_key_follows_everything_that_matters():
    parts = {"weights": "a", "layers": ["x"], "mean": [0.1]}
    assert store_key(parts) == store_key(dict(reversed(parts.items())))
    assert len({store_key(parts), store_key({**parts, "mean": [0.2]}), store_key({**parts, "layers": ["y"]})}) == 3


def test_batches_follow_the_order_asked_for(tmp_path):
    store = make(Counting(), tmp_path / "s")
    order = np.array([5, 1, 9, 0, 2])
    parts = list(store.batches(order, 2, ["stem"], torch.device("cpu")))
    assert np.concatenate([part for part, _, _ in parts]).tolist() == order.tolist()
    torch.testing.assert_close(parts[0][1]["stem"][1], torch.from_numpy(store.layers["stem"][1]).float())
    assert parts[0][2].dtype == torch.int64


def test_features_that_are_not_finite_are_refused(tmp_path):
    """They were stored, and heads trained on them."""
    for bias in (float("nan"), float("inf")):
        net = Counting().eval()
        torch.nn.init.constant_(net.norm.bias, bias)
        with pytest.raises(UserError, match="NaN or infinity"):
            make(net, tmp_path / str(bias))
