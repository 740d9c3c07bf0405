"""The step against the plain recipe written out in benchmarks/step.py, and against steps that never happened."""

import copy
import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_geo.errors import UserError
from ssl_geo.methods.dino import DINO
from ssl_geo.training.optimizers import adamw, set_step_values
from ssl_geo.training.step import Skips, compile_networks, train_step

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")


class Net(nn.Module):
    """Everything a step must put back: parameters and BatchNorm statistics."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


def make_method(freeze: int = 0) -> DINO:
    torch.manual_seed(0)
    return DINO(
        Net(),
        out_dim=12,
        hidden_dim=16,
        bottleneck_dim=8,
        freeze_last_layer_steps=freeze,
        teacher_momentum=lambda step: 0.9,
        teacher_temp=lambda step: 0.04,
    )


def make_views(seed: int = 0, batch: int = 4) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, size, size, generator=draw) for size in (12, 12, 8)]


class Trainer:
    def __init__(self, method: DINO) -> None:
        self.method, self.optimizer = method, adamw(method.student)
        self.scaler = torch.amp.GradScaler(enabled=False)
        set_step_values(self.optimizer, lr=0.01, weight_decay=0.1)

    def step(self, views: list[Tensor], step: int, **settings) -> tuple[Tensor, Tensor]:
        return train_step(self.method, self.optimizer, self.scaler, views, step, **settings)

    def state(self) -> dict[str, Tensor]:
        """All that a step may change."""
        state = {name: value.clone() for name, value in self.method.state_dict().items()}
        for number, moments in enumerate(self.optimizer.state.values()):
            state |= {f"{number}.{name}": value.clone() for name, value in moments.items()}
        return state


@pytest.fixture
def benchmark(monkeypatch):
    """benchmarks/step.py; its views made small."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("step")
    monkeypatch.setattr(module, "SIZES", [32, 32, 16, 16, 16])
    return module


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)],  # half the last digit of bfloat16, which is 2⁻⁸
    ids=["float32", "bfloat16"],
)
def test_twenty_steps_have_the_losses_of_the_plain_recipe(benchmark, dtype, tolerance):
    method = benchmark.make_method(
        "vit_tiny_patch16_224", 512, head=64, patch_size=8, embed_dim=48, depth=2, num_heads=3
    )
    plain, ours = benchmark.PlainStep(copy.deepcopy(method)), benchmark.OurStep(method, dtype)
    views = benchmark.make_views(4, CPU)
    found, expected = zip(*((float(ours(views, step)), plain(views, step)) for step in range(20)), strict=True)
    assert found == pytest.approx(expected, rel=tolerance)
    assert max(expected) - min(expected) > 0.3  # there was something to follow
    learned = dict(plain.teacher.backbone.named_parameters())
    for name, parameter in method.teacher.backbone.named_parameters():
        torch.testing.assert_close(parameter, learned[name], rtol=0, atol=tolerance / 10)


def test_a_step_that_is_not_finite_changes_nothing_and_the_next_goes_on():
    once, twice = Trainer(make_method()), Trainer(make_method())
    for trainer in (once, twice):
        trainer.step(make_views(), 0)
    before = twice.state()
    bad = make_views(seed=1)
    bad[1][0, 0, 0, 0] = math.inf
    loss, finite = twice.step(bad, 1, clip=3.0)
    assert not finite
    assert not torch.isfinite(loss)
    assert twice.state().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in twice.state().items())
    for trainer in (once, twice):
        _, finite = trainer.step(make_views(seed=2), 2)
        assert finite
    after, expected = twice.state(), once.state()
    assert all(torch.equal(value, expected[name]) for name, value in after.items())
    assert not all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_loss_that_is_finite_with_gradients_that_are_not_is_skipped_too():
    trainer = Trainer(make_method())
    before = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    trainer.method.student.head.mlp[0].weight.register_hook(lambda gradient: gradient * math.nan)
    loss, finite = trainer.step(make_views(), 0)
    assert torch.isfinite(loss)
    assert not finite
    assert all(torch.equal(value, before[name]) for name, value in trainer.method.state_dict().items())


class NothingIsRead(TorchDispatchMode):
    """Refuses `item()`, `float()`, `bool()` ... of a tensor: on a GPU each would wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        assert function is not torch.ops.aten.nonzero.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "not finite"])
def test_a_step_never_asks_the_device(bad):
    trainer, skips, views = Trainer(make_method(freeze=1)), Skips(CPU), make_views()
    views[0][0] = math.nan if bad else 0.0
    with NothingIsRead():
        for step in range(2):
            _, finite = trainer.step(views, step, clip=3.0, accumulate=2)
            skips.note(finite)
        trainer.method.health()
    with pytest.raises(AssertionError), NothingIsRead():
        float(finite)
    assert skips.total == (2 if bad else 0)


def test_skips_are_counted_in_all_and_in_a_row():
    skips = Skips(CPU, total=3)
    seen = []
    for finite in (True, False, False, True, False):
        skips.note(torch.tensor(finite))
        seen.append((skips.total, skips.in_a_row))
    assert seen == [(3, 0), (4, 1), (5, 2), (5, 0), (6, 1)]


def test_convolutions_get_channels_last():
    trainer, seen = Trainer(make_method()), []
    trainer.method.to(memory_format=torch.channels_last)
    for network in (trainer.method.student, trainer.method.teacher):
        network.backbone.body[1].register_forward_hook(lambda _, given, output: seen.extend([given[0], output]))
    trainer.step(make_views(), 0, accumulate=2)
    assert len(seen) == 12  # a pass a size in the student and one in the teacher, in two micro-batches
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)


def test_compiled_networks_answer_the_same_and_keep_their_names():
    net, view = Net().eval(), make_views()[0]
    names, expected = list(net.state_dict()), net(view)
    try:
        compile_networks([net], CPU)
    except UserError as reason:
        pytest.skip(str(reason))
    assert net._compiled_call_impl is not None
    with torch.no_grad():
        torch.testing.assert_close(net(view), expected)
    assert list(net.state_dict()) == names


def test_no_compiler_is_said_in_one_line(monkeypatch):
    def nothing_works(*_: object) -> None:
        from torch._dynamo.exc import BackendCompilerFailed

        raise BackendCompilerFailed(nothing_works, RuntimeError("no C++ compiler\nsearched: g++"), None)

    monkeypatch.setattr(torch, "compile", lambda function: nothing_works)
    with pytest.raises(
        UserError,
        match=r"^--optim.compile: no compiler works here \(.*no C\+\+ compiler\); install one, or leave it out$",
    ):
        compile_networks([], CPU)
