import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_geo.training.health import Monitor, collapse_warning, embedding_health, has_diverged, knn_accuracy


def test_a_sphere_of_embeddings_is_healthy_and_a_point_is_not():
    torch.manual_seed(0)
    sphere = embedding_health(torch.randn(2000, 16))
    assert sphere["embedding_std"] == pytest.approx(1.0, abs=0.05)
    assert sphere["effective_rank"] == pytest.approx(16, rel=0.05)
    point = embedding_health(torch.ones(50, 16) * 3)
    assert point == {"embedding_std": pytest.approx(0, abs=1e-6), "effective_rank": pytest.approx(0, abs=1e-3)}


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_embeddings_that_are_not_finite_are_measured_as_such(value):
    """The svd of a diverged run's embeddings ended in a LinAlgError."""
    embeddings = torch.randn(20, 4)
    embeddings[3:] = value
    measures = embedding_health(embeddings)
    assert math.isnan(measures["embedding_std"])
    assert has_diverged(measures)
    assert collapse_warning(measures) is None
    assert not has_diverged(embedding_health(torch.randn(20, 4)))
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    nn.init.constant_(net[1].weight, value)
    images = torch.ones(6, 1, 2, 2)
    assert "knn_accuracy" not in Monitor(images, torch.arange(6) % 2, torch.arange(6) // 3).measure(net)


def test_effective_rank_counts_equal_directions():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32)).Q[:3]
    coefficients = torch.linalg.qr(torch.randn(100, 4)).Q[:, :3]
    coefficients = coefficients - coefficients.mean(dim=0)
    coefficients = torch.linalg.qr(coefficients).Q  # three orthonormal columns of mean zero
    assert embedding_health(coefficients @ basis)["effective_rank"] == pytest.approx(3, abs=1e-3)


def slow_knn(embeddings, labels, groups, k):
    unit = F.normalize(embeddings, dim=1)
    right = 0
    for i in range(len(unit)):
        others = [(float(unit[i] @ unit[j]), int(labels[j])) for j in range(len(unit)) if groups[j] != groups[i]]
        votes: dict[int, float] = {}
        for similarity, label in sorted(others, reverse=True)[:k]:
            votes[label] = votes.get(label, 0) + math.exp(similarity / 0.07)
        right += max(votes, key=votes.get) == int(labels[i])
    return right / len(unit)


def test_knn_equals_the_loop():
    torch.manual_seed(1)
    labels, groups = torch.randint(0, 3, (60,)), torch.arange(60) // 10
    embeddings = torch.randn(60, 8) + 0.8 * F.one_hot(labels, 8)
    assert knn_accuracy(embeddings, labels, groups, 5) == pytest.approx(slow_knn(embeddings, labels, groups, 5))


def test_neighbours_of_the_same_scene_do_not_vote():
    embeddings = torch.tensor([[1.0, 0], [1, 0.01], [0, 1], [0.01, 1]])
    labels, groups = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    assert knn_accuracy(embeddings, labels, groups, 1) == 0.0  # each scene only knows the other's class


HEALTHY = {
    "teacher_entropy": 3.0,
    "ln_k": math.log(1024),
    "prototypes_used": 19.0,
    "embedding_std": 0.7,
    "effective_rank": 20.0,
}


def test_a_healthy_run_is_not_warned_about():
    assert collapse_warning(HEALTHY) is None
    assert collapse_warning({"teacher_entropy": 3.0, "ln_k": math.log(1024)}) is None


@pytest.mark.parametrize(
    ("measure", "value", "words"),
    [
        ("teacher_entropy", 6.931, "evenly over all prototypes"),
        ("teacher_entropy", 0.001, "single prototypes"),
        ("prototypes_used", 9.4, "with 9 of 1,024 prototypes"),
        ("embedding_std", 0.001, "nearly the same embedding"),
        ("effective_rank", 1.2, "lie on a line"),
    ],
)
def test_a_collapse_is_told_plainly(measure, value, words):
    assert words in collapse_warning({**HEALTHY, measure: value})


def test_monitoring_leaves_the_backbone_as_it_was():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before = net[1].running_mean.clone()
    torch.manual_seed(0)
    monitor = Monitor(torch.randn(20, 2, 8, 8), torch.arange(20) % 2, torch.arange(20) // 5)
    measures = monitor.measure(net, batch=7)
    assert set(measures) == {"embedding_std", "effective_rank", "knn_accuracy"}
    assert net.training
    assert torch.equal(net[1].running_mean, before)
    assert set(Monitor(torch.randn(9, 2, 8, 8), None, torch.arange(9)).measure(net)) == {
        "embedding_std",
        "effective_rank",
    }
