"""Forward, backward and update of DINO on ViT-S/8, against the plain step of the public recipe.

    python benchmarks/step.py [--device cuda] [--batch 4] [--prototypes 65536] [--rounds 5] [--peak FLOP/S]

Ten bands, 2 global views of 120 and 6 local views of 56 pixels. Ours is what `ssl_geo.pretrain` does in a step. The
plain one is float32, with attention written out, one cross-entropy a pair of views, loops over the parameters, and the
loss read every step. Each side is a process of its own, as memory is one of the things that differ; they step in turn.

Beside the ratio: samples/s, the floating-point operations of a step and their share of the device's peak, memory, where
the time goes (`--profile`), and how long a short run of `ssl_geo.pretrain` waits for data (`--run`); on a GPU always.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import compare, finish, machine
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ssl_geo.backbones import create_backbone, drop_unused_tokens
from ssl_geo.methods.dino import DINO
from ssl_geo.training.memory import keep_freed_memory
from ssl_geo.training.optimizers import adamw, set_step_values
from ssl_geo.training.precision import choose_dtype
from ssl_geo.training.step import train_step

BANDS, SIZES = 10, [120] * 2 + [56] * 6
LR, DECAY, CLIP = 1e-4, 0.04, 3.0
# Dense peak FLOP/s by the vendors' data sheets: of bf16 with float32 sums.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "T4": 65e12}


class OurStep:
    """The step of `ssl_geo.pretrain`."""

    def __init__(self, method: DINO, dtype: torch.dtype) -> None:
        self.method, self.dtype = method.to(memory_format=torch.channels_last), dtype
        for network in (method.student, method.teacher):
            drop_unused_tokens(network.backbone)
        self.optimizer = adamw(method.student)
        self.scaler = torch.amp.GradScaler(enabled=False)
        set_step_values(self.optimizer, lr=LR, weight_decay=DECAY)

    def __call__(self, views: Sequence[Tensor], step: int) -> Tensor:
        """Do a step and return the loss."""
        loss, _ = train_step(self.method, self.optimizer, self.scaler, views, step, dtype=self.dtype, clip=CLIP)
        return loss


class PlainHead(nn.Module):
    """DINO's head with torch's own weight normalization."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.mlp = copy.deepcopy(head.mlp)
        given = head.last_layer
        width, prototypes = given.weight.shape[1], given.weight.shape[0]
        last = nn.Linear(width, prototypes, bias=False, device=given.weight.device)
        self.last_layer = nn.utils.parametrizations.weight_norm(last)
        stored = self.last_layer.parametrizations.weight
        stored.original0.data, stored.original1.data = given.norm.data.clone(), given.weight.data.clone()
        stored.original0.requires_grad = given.norm.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) → (N, K)."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class PlainNetwork(nn.Module):
    """Backbone without fused attention, and head: views of one size go through together."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = copy.deepcopy(network.backbone), PlainHead(network.head)
        for module in self.backbone.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Views (B, C, h, w) → (V·B, K)."""
        embeddings, start = [], 0
        for end in range(1, len(views) + 1):
            if end == len(views) or views[end].shape[-1] != views[start].shape[-1]:
                embeddings.append(self.backbone(torch.cat(list(views[start:end]))))
                start = end
        return self.head(torch.cat(embeddings))


class PlainStep:
    """DINO's step as its public recipe has it (arXiv 2104.14294, algorithm 1; facebookresearch/dino, main_dino.py)."""

    def __init__(self, method: DINO) -> None:
        self.student, self.teacher = PlainNetwork(method.student), PlainNetwork(method.teacher).requires_grad_(False)
        self.momentum, self.temp = method.teacher_momentum, method.teacher_temp
        self.center = torch.zeros_like(method.criterion.center)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, foreach=False)

    def __call__(self, views: Sequence[Tensor], step: int) -> float:
        """Do a step and return the loss."""
        with torch.no_grad():
            teacher = self.teacher(views[:2])
        loss = self.loss(self.student(views), teacher, self.temp(step))
        value = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                factor = CLIP / (parameter.grad.norm(2) + 1e-6)
                if factor < 1:
                    parameter.grad.mul_(factor)
        self.optimizer.step()
        momentum = self.momentum(step)
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                ours.mul_(momentum).add_((1 - momentum) * theirs)
        return value

    def loss(self, student: Tensor, teacher: Tensor, temp: float) -> Tensor:
        """One term a pair of unlike views, and the center moved afterwards."""
        views = (student / 0.1).chunk(2 * len(student) // len(teacher))
        wanted = F.softmax((teacher - self.center) / temp, dim=-1).chunk(2)
        total, terms = 0.0, 0
        for i, q in enumerate(wanted):
            for j, view in enumerate(views):
                if i != j:
                    total = total + torch.sum(-q * F.log_softmax(view, dim=-1), dim=-1).mean()
                    terms += 1
        self.center = 0.9 * self.center + 0.1 * teacher.mean(dim=0, keepdim=True)
        return total / terms


def make_method(name: str, prototypes: int, head: int = 2048, **arguments: Any) -> DINO:
    """The start that both sides share, as in configs/one_gpu.yaml, but without drop path."""
    torch.manual_seed(0)
    return DINO(
        create_backbone(name, BANDS, [(size, size) for size in SIZES], **arguments),
        out_dim=prototypes,
        hidden_dim=head,
        norm_last_layer=False,
        teacher_momentum=lambda step: 0.996,
        teacher_temp=lambda step: 0.04,
    )


def make_views(batch: int, device: torch.device) -> list[Tensor]:
    """Random views of a batch."""
    torch.manual_seed(1)
    return [torch.randn(batch, BANDS, size, size, device=device) for size in SIZES]


def serve(connection: Connection, ours: bool, settings: argparse.Namespace) -> None:
    """One side in its process: does what it is asked for and answers, until it is told to end."""
    device = torch.device(settings.device)
    method = make_method(settings.backbone, settings.prototypes).to(device)
    views = make_views(settings.batch, device)
    if ours and device.type == "cpu":
        keep_freed_memory()
    side = OurStep(method, choose_dtype(settings.precision, device)) if ours else PlainStep(method)

    def steps(first: int, number: int) -> float:
        for step in range(first, first + number):
            loss = side(views, step)
        return float(loss)  # on a GPU, the wait for all of them

    def profiled() -> dict[str, float]:
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
            steps(0, 1)
        return breakdown(profiler.key_averages(), on_gpu)

    def memory() -> float:
        if on_gpu:
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    on_gpu = device.type == "cuda"
    answers = {"steps": steps, "profile": profiled, "memory": memory}
    while asked := connection.recv():
        name, *arguments = asked
        connection.send(answers[name](*arguments))


def breakdown(events: Any, on_gpu: bool) -> dict[str, float]:
    """Percent of the time that each of the most costly operators takes by itself."""
    own = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
    total = sum(time for name, time in own.items() if name.startswith("aten::") or not on_gpu)
    most = sorted(own.items(), key=lambda item: -item[1])
    return {name.removeprefix("aten::"): round(100 * time / total, 1) for name, time in most if time > 0.01 * total}


def flops(name: str, prototypes: int) -> int:
    """Floating-point operations of a step a chip: matrix products and convolutions, forward and backward."""
    plain = PlainStep(make_method(name, prototypes).to("meta"))
    views = make_views(1, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher = plain.teacher(views[:2])
        plain.loss(plain.student(views), teacher, 0.04).backward()
    return counter.get_total_flops()


def fed(settings: argparse.Namespace, steps: int) -> dict[str, float]:
    """Chips a second and the share of time spent waiting for data, of `ssl_geo.pretrain` on its sample.

    Of the second third of the steps: after the start, and before the embeddings are measured at the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            *(sys.executable, "-m", "ssl_geo.pretrain", "--config", "configs/one_gpu.yaml", "--data.workers", "null"),
            *("--views.global_size", "120", "--views.local_size", "56", "--device", settings.device, "--out", str(run)),
            *("--backbone.name", settings.backbone, "--dino.out_dim", str(settings.prototypes)),
            *("--optim.batch_size", str(settings.batch), "--optim.precision", settings.precision),
            *("--steps", str(3 * steps), "--log.every", str(steps)),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        second = json.loads((run / "log.jsonl").read_text().splitlines()[1])
    return {"samples_per_s": second["samples_per_s"], "data_wait": second["data_wait"]}


class Side:
    """One of the two, in its process."""

    def __init__(self, ours: bool, settings: argparse.Namespace) -> None:
        self._here, there = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, ours, settings))
        self._process.start()

    def ask(self, *what: Any) -> Any:
        """Send a request and wait for the answer."""
        self._here.send(what)
        return self._here.recv()

    def end(self) -> None:
        """Let the process go."""
        self._here.send(())
        self._process.join()


def main() -> None:
    """Time both sides and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="vit_small_patch8_224")
    parser.add_argument("--batch", type=int, help="chips; default: 4, on a GPU 64")
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", type=float, help="FLOP/s of the device, where it is not a known GPU")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--run", action="store_true", help="a short run of ssl_geo.pretrain for the data wait")
    settings = parser.parse_args()
    on_gpu = settings.device.startswith("cuda")
    settings.batch = settings.batch or (64 if on_gpu else 4)
    steps = 10 if on_gpu else 1  # a round

    ours, plain = (Side(side, settings) for side in (True, False))
    pair = compare(
        lambda number: ours.ask("steps", number * steps, steps),
        lambda number: plain.ask("steps", number * steps, steps),
        settings.rounds,
        warm=1,
    )
    figures: dict[str, Any] = {}
    if settings.profile or on_gpu:
        figures["percent_of_time"] = {"ours": ours.ask("profile"), "plain": plain.ask("profile")}
    figures["peak_memory_gib"] = {"ours": round(ours.ask("memory"), 2), "plain": round(plain.ask("memory"), 2)}
    ours.end()
    plain.end()

    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    peak = settings.peak or next((peak for name, peak in PEAKS.items() if name in device), None)
    per_chip = flops(settings.backbone, settings.prototypes)
    rate = per_chip * settings.batch * steps / pair.ours
    not_measured = []
    if peak is None:
        not_measured.append("utilization: the peak of this device is not known (--peak)")
    if settings.run or on_gpu:
        figures["run"] = fed(settings, steps=20 if on_gpu else 3)
    else:
        not_measured.append("data wait (--run)")
    if not on_gpu:
        not_measured.append("anything about a GPU (--device cuda)")
    finish(
        "step",
        pair.ratio,
        2.5 if on_gpu or machine()["bf16_units"] else 1.2,
        seconds_a_step={"ours": round(pair.ours / steps, 4), "plain": round(pair.peer / steps, 4)},
        samples_per_s=round(settings.batch * steps / pair.ours, 2),
        gflop_a_chip=round(per_chip / 1e9, 1),
        gflop_per_s=round(rate / 1e9, 1),
        utilization=None if peak is None else round(rate / peak, 3),
        **figures,
        batch=settings.batch,
        prototypes=settings.prototypes,
        device=device,
        dtype=str(choose_dtype(settings.precision, torch.device(settings.device))).removeprefix("torch."),
        not_measured=not_measured,
    )


if __name__ == "__main__":
    main()
