import pytest
import torch
from torch import nn

from ssl_geo.training.optimizers import adamw, clip_gradients, set_step_values


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


def test_biases_and_norms_are_not_decayed():
    net = small_net()
    optimizer = adamw(net)
    set_step_values(optimizer, lr=0.1, weight_decay=0.4)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    found = {name: decay[id(p)] for name, p in net.named_parameters()}
    assert found == {
        "0.weight": 0.4,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "3.weight": 0.4,
        "3.bias": 0.0,
    }
    assert {g["lr"] for g in optimizer.param_groups} == {0.1}


def test_clipping_equals_the_loop_over_parameters():
    net = small_net()
    scales = [100.0, 0.001, 3.0, 1.0, 7.0, 0.5]
    for p, scale in zip(net.parameters(), scales, strict=True):
        p.grad = torch.randn_like(p) * scale
    expected = []
    for p in net.parameters():
        factor = 3.0 / (p.grad.norm(2) + 1e-6)
        expected.append(p.grad * factor if factor < 1 else p.grad.clone())
    total = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    assert clip_gradients(net.parameters(), 3.0).item() == pytest.approx(total.item(), rel=1e-5)
    for p, e in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


def test_the_norm_tells_of_a_gradient_that_is_not_finite():
    net = small_net()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net[0].weight.grad[0, 0, 0, 0] = float("nan")
    assert not torch.isfinite(clip_gradients(net.parameters(), 3.0))


def test_parameters_without_gradient_are_left_alone():
    net = small_net()
    for p in list(net.parameters())[1:]:
        p.grad = torch.ones_like(p)
    clip_gradients(net.parameters(), 3.0)
    assert net[0].weight.grad is None
