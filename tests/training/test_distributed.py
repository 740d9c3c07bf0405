"""Collectives against one process; run as a script, this file is one of two processes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from ssl_geo.errors import UserError
from ssl_geo.training import distributed

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


# One process


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_without_torchrun_there_is_one_process_and_no_group() -> None:
    ranks = distributed.setup("cpu")
    assert (ranks.rank, ranks.world, ranks.local_rank, ranks.device) == (0, 1, 0, torch.device("cpu"))
    assert ranks.main
    assert not torch.distributed.is_initialized()
    tensor, module = torch.randn(3), nn.BatchNorm2d(3)
    assert torch.equal(distributed.mean_over_ranks(tensor), tensor)
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    assert distributed.wrap(module, ranks) is module
    assert distributed.sync_batchnorm(module) is module
    distributed.broadcast(module)
    distributed.barrier()
    with ranks.main_first():
        pass
    distributed.shutdown()


@pytest.mark.usefixtures("alone")
def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.setup("auto").device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert distributed.setup("auto").device == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.setup("auto").device == torch.device("cuda", 1)


@pytest.mark.usefixtures("alone")
def test_a_gpu_that_is_not_there_is_a_mistake_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"--device cpu"):
        distributed.setup("cuda")


# Two processes


class Norms(nn.Module):
    """Every kind of BatchNorm: plain, with activation, without parameters, with a cumulative average, of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            timm.layers.BatchNormAct2d(4, act_layer=nn.PReLU),
            nn.BatchNorm2d(4, affine=False),
            nn.BatchNorm2d(4, momentum=None),
            nn.BatchNorm2d(4, track_running_stats=False),
        )
        self.vectors = nn.BatchNorm1d(4, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.vectors(self.maps(x).mean((2, 3)))
        return output


def make_norms() -> Norms:
    torch.manual_seed(0)
    module = Norms()
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    return module


def make_plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def passes(module: nn.Module, share: slice) -> dict[str, Tensor]:
    """Output, gradients and statistics after two passes in training mode."""
    torch.manual_seed(1)
    images, weights = torch.randn(2, 8, 3, 9, 7) * 3 + 5, torch.randn(2, 8, 4)
    found: dict[str, Tensor] = {}
    for number, (x, w) in enumerate(zip(images[:, share], weights[:, share], strict=True)):
        x.requires_grad_()
        output = module(x)
        (output * w).sum().backward()
        found |= {f"output {number}": output.detach(), f"input gradient {number}": x.grad}
    found |= {f"gradient {name.removeprefix('module.')}": p.grad for name, p in module.named_parameters()}
    return found | {name.removeprefix("module."): b.clone() for name, b in module.named_buffers()}


def one_of_two(out: Path) -> None:
    """What each of the two processes does."""
    ranks = distributed.setup("cpu")
    rank = ranks.rank
    found: dict[str, object] = {"ranks": (ranks.rank, ranks.world, ranks.local_rank, ranks.main, str(ranks.device))}

    tensor = torch.tensor([1.0, 10.0]) * (rank + 1)
    found["mean"] = distributed.mean_over_ranks(tensor)
    found["untouched"] = tensor
    found["any"] = [distributed.any_rank(flag) for flag in (rank == 0, rank == 1, False, True)]

    with ranks.main_first():
        began = time.time()
        time.sleep(0.3 if ranks.main else 0)
        (out / f"block-{rank}").write_text(f"{began} {time.time()}")

    torch.manual_seed(rank)
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[1].running_mean.fill_(float(rank))
    distributed.broadcast(module)
    found["broadcast"] = {name: value.clone() for name, value in module.state_dict().items()}

    norms = make_norms()
    before = {name: value.clone() for name, value in norms.state_dict().items()}
    parameters = dict(norms.named_parameters())
    norms.maps[1].eval()
    norms = distributed.sync_batchnorm(norms)
    assert list(norms.state_dict()) == list(before)
    assert all(torch.equal(before[name], value) for name, value in norms.state_dict().items())
    assert all(parameters[name] is parameter for name, parameter in norms.named_parameters())
    assert not norms.maps[1].training
    norms.train()
    share = slice(4 * rank, 4 * rank + 4)
    found["norms"] = passes(norms, share)
    assert isinstance(distributed.sync_batchnorm(nn.BatchNorm2d(2)), distributed.CPUSyncBatchNorm)
    found["wrapped"] = passes(distributed.wrap(make_plain(), ranks), share)

    with torch.autocast("cpu", torch.bfloat16):
        assert norms(torch.randn(4, 3, 9, 7)).dtype == torch.bfloat16
    if ranks.main:  # in eval mode nobody waits for the others
        norms.eval()
        norms(torch.randn(1, 3, 9, 7))
    torch.save(found, out / f"{rank}.pt")
    distributed.barrier()
    distributed.shutdown()
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", __file__, str(out)], env={**common, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in "01"
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return out


@pytest.fixture
def found(two_processes: Path) -> list[dict]:
    return [torch.load(two_processes / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_know_who_they_are(found: list[dict]) -> None:
    assert [f["ranks"] for f in found] == [(0, 2, 0, True, "cpu"), (1, 2, 1, False, "cpu")]


def test_mean_and_any(found: list[dict]) -> None:
    for rank, f in enumerate(found):
        assert f["mean"].tolist() == [1.5, 15.0]
        assert f["untouched"].tolist() == [1.0 + rank, 10.0 * (1 + rank)]
        assert f["any"] == [True, True, False, True]


def test_the_main_process_goes_first(two_processes: Path) -> None:
    (_, main_ended), (other_began, _) = (
        map(float, (two_processes / f"block-{rank}").read_text().split()) for rank in range(2)
    )
    assert other_began >= main_ended


def test_broadcast_gives_the_main_processs_state(found: list[dict]) -> None:
    torch.manual_seed(0)
    expected = nn.Linear(2, 2)
    for f in found:
        assert torch.equal(f["broadcast"]["0.weight"], expected.weight)
        assert f["broadcast"]["1.running_mean"].tolist() == [0.0, 0.0]


def test_synchronized_batchnorm_is_batchnorm_of_the_whole_batch(found: list[dict]) -> None:
    expected = passes(make_norms(), slice(0, 8))
    for rank, f in enumerate(found):
        share = slice(4 * rank, 4 * rank + 4)
        assert f["norms"].keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("gradient"):  # each process has its share of the sum
                both = sum(other["norms"][name] for other in found)
                torch.testing.assert_close(both, value, rtol=1e-4, atol=1e-4)
            elif name.startswith(("output", "input")):
                torch.testing.assert_close(f["norms"][name], value[share], rtol=1e-4, atol=1e-5)
            else:
                torch.testing.assert_close(f["norms"][name], value, rtol=1e-5, atol=1e-6)


def test_wrap_averages_gradients(found: list[dict]) -> None:
    expected = passes(make_plain(), slice(0, 8))
    for f in found:
        for name, value in expected.items():
            if name.startswith("gradient"):
                torch.testing.assert_close(f["wrapped"][name], value / 2, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))


def test_a_process_that_lost_torchrun_is_told_to_stop_and_killed_where_it_does_not(tmp_path, monkeypatch):
    """Killed with SIGKILL, torchrun left processes behind that went on writing to the run."""
    told = []
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        monkeypatch.setattr(os, "getppid", lambda: 1)

    monkeypatch.setattr(os, "getppid", lambda: 4711)
    monkeypatch.setattr(os, "kill", lambda process, number: told.append((process, number)))
    monkeypatch.setattr(distributed.time, "sleep", sleep)
    before = set(threading.enumerate())
    distributed.stop_without(4711)
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert told == [(os.getpid(), signal.SIGTERM), (os.getpid(), signal.SIGKILL)]
    assert slept[-1] == distributed.GRACE
