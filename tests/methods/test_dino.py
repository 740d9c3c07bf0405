"""DINO against slow references written from the paper; run as a script, this file is one of two processes."""

import copy
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssl_geo.methods.dino import DINO, MANY_VIEWS, DINOHead, DINOLoss, MultiCropWrapper
from ssl_geo.training import distributed
from ssl_geo.training.optimizers import adamw, set_step_values
from ssl_geo.training.step import train_step


class Convolutional(nn.Module):
    """A small backbone with everything that needs care: BatchNorm, norm with activation, a norm free of batches."""

    num_features = 6

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 4, 3, 2, 1), timm.layers.BatchNormAct2d(4)),
            *(nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.Dropout(dropout), nn.GELU()),
        )
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        embedding: Tensor = self.body(x).mean((2, 3))
        return embedding


class Affine(nn.Module):
    """A backbone without BatchNorm: what it makes of a view does not depend on the others."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 2, 2)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        embedding: Tensor = torch.tanh(self.conv(x)).mean((2, 3))
        return embedding


def make(backbone: nn.Module | None = None, **settings: object) -> DINO:
    choices: dict = {
        "out_dim": 12,
        "hidden_dim": 16,
        "bottleneck_dim": 8,
        "teacher_momentum": lambda step: 0.9 + 0.01 * step,
        "teacher_temp": lambda step: 0.04 + 0.01 * step,
        **settings,
    }
    return DINO(Affine() if backbone is None else backbone, **choices)


def make_views(batch: int = 4, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, *size, generator=draw) for size in [(16, 12), (16, 12), (8, 12), (8, 8)]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Line 10, 14: the wrapper


def test_views_of_equal_size_go_together_and_come_out_in_the_order_given() -> None:
    backbone, head = Affine(), nn.Linear(5, 7)
    views = [torch.randn(2, 3, h, w) for h, w in [(8, 6), (8, 4), (8, 6), (4, 6), (8, 4)]]
    expected = torch.cat([head(backbone(view)) for view in views])
    backbone.shapes.clear()
    torch.testing.assert_close(MultiCropWrapper(backbone, head)(views), expected)
    assert backbone.shapes == [(4, 3, 8, 6), (4, 3, 8, 4), (2, 3, 4, 6)]  # (8, 4) and (8, 6) share a height only
    backbone.shapes.clear()
    torch.testing.assert_close(MultiCropWrapper(backbone, head, one_pass_per_view=True)(views), expected)
    assert backbone.shapes == [tuple(view.shape) for view in views]


def test_the_head_runs_once_and_views_may_differ_in_batch() -> None:
    rows: list[int] = []
    head = nn.Linear(5, 7)
    head.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    views = [torch.randn(3, 3, 8, 8), torch.randn(2, 3, 4, 4), torch.randn(1, 3, 8, 8)]
    assert MultiCropWrapper(Affine(), head)(views).shape == (6, 7)
    assert rows == [6]


def test_a_single_tensor_and_a_backbone_that_returns_a_tuple() -> None:
    class Pair(Affine):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return super().forward(x), "tokens"

    backbone, view = Pair(), torch.randn(2, 3, 8, 8)
    output = MultiCropWrapper(backbone, nn.Identity())(view)
    torch.testing.assert_close(output, backbone(view)[0])


def test_attributes_of_the_backbone_stay() -> None:
    backbone = timm.create_model("resnet18", num_classes=5)
    wrapper = MultiCropWrapper(backbone, nn.Identity())
    assert isinstance(wrapper.backbone.fc, nn.Linear)
    assert wrapper(torch.randn(2, 3, 32, 32)).shape == (2, 5)


# Line 4: the head


def test_head_is_the_papers_with_torchs_own_weight_normalization() -> None:
    head = DINOHead(9, 20, hidden_dim=16, bottleneck_dim=8, norm_last_layer=False)
    with torch.no_grad():
        head.last_layer.norm.uniform_(0.5, 2)
    first, second, third = (module for module in head.mlp if isinstance(module, nn.Linear))
    prototypes = nn.utils.parametrizations.weight_norm(nn.Linear(8, 20, bias=False))
    prototypes.parametrizations.weight.original0.data = head.last_layer.norm.data
    prototypes.parametrizations.weight.original1.data = head.last_layer.weight.data
    x = torch.randn(5, 9)
    bottleneck = third(F.gelu(second(F.gelu(first(x)))))
    expected = prototypes(bottleneck / bottleneck.norm(dim=1, keepdim=True))
    torch.testing.assert_close(head(x), expected)


def test_prototypes_stay_on_the_sphere_whatever_training_does() -> None:
    head = DINOHead(9, 20, hidden_dim=16, bottleneck_dim=8)
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        head(torch.randn(6, 9)).square().sum().backward()
        optimizer.step()
    bottleneck = torch.eye(8)
    lengths = head.last_layer(bottleneck).norm(dim=0)
    torch.testing.assert_close(lengths, torch.ones(20))
    assert head(torch.randn(100, 9) * 50).abs().max() <= 1 + 1e-6


def test_prototype_lengths_are_trained_only_if_asked() -> None:
    assert not DINOHead(4, 3).last_layer.norm.requires_grad
    assert DINOHead(4, 3, norm_last_layer=False).last_layer.norm.requires_grad
    assert not any("bias" in name for name, _ in DINOHead(4, 3).last_layer.named_parameters())


def test_head_starts_as_the_authors_do() -> None:
    head = DINOHead(384, 4096)
    for module in head.mlp:
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.02)
    bound = 1 / math.sqrt(256)  # nn.Linear's own, on the directions
    assert head.last_layer.weight.abs().max() <= bound
    assert head.last_layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert [tuple(m.weight.shape) for m in head.mlp if isinstance(m, nn.Linear)] == [
        *((2048, 384), (2048, 2048), (256, 2048))
    ]


@pytest.mark.parametrize(("layers", "linears"), [(1, 1), (2, 2), (4, 4)])
def test_number_of_layers(layers: int, linears: int) -> None:
    head = DINOHead(5, 7, hidden_dim=6, bottleneck_dim=4, layers=layers)
    assert sum(isinstance(m, nn.Linear) for m in head.mlp) == linears
    assert isinstance(head.mlp[-1], nn.Linear)
    assert head(torch.randn(2, 5)).shape == (2, 7)


def test_head_copies_and_its_keys_are_plain() -> None:
    for norm_last_layer in (True, False):
        head = DINOHead(5, 7, hidden_dim=6, bottleneck_dim=4, norm_last_layer=norm_last_layer)
        assert list(head.state_dict()) == [
            *("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "mlp.4.weight", "mlp.4.bias"),
            *("last_layer.weight", "last_layer.norm"),
        ]
        twin, x = copy.deepcopy(head), torch.randn(3, 5)
        assert torch.equal(twin(x), head(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_in_half_precision(dtype: torch.dtype) -> None:
    head = DINOHead(16, 32, hidden_dim=64, bottleneck_dim=16)
    x = torch.randn(8, 16)
    with torch.autocast("cpu", dtype):
        logits = head(x)
        assert torch.isfinite(head(torch.zeros(2, 16))).all()  # a bottleneck of zeros is not divided by 0
    torch.testing.assert_close(logits.float(), head(x), atol=0.02, rtol=0)
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.requires_grad)


# Lines 1, 2: the loss


def slow_loss(student: Tensor, teacher: Tensor, center: Tensor, teacher_temp: float, student_temp: float) -> Tensor:
    """H(P_t, P_s) summed over pairs of unlike views, pair by pair and row by row (algorithm 1 and equation 3)."""
    batch = len(teacher) // 2
    views = len(student) // batch
    terms = []
    for i in range(2):
        for j in range(views):
            if i == j:
                continue
            for row in range(batch):
                t = (teacher[i * batch + row] - center[0]) / teacher_temp
                s = student[j * batch + row] / student_temp
                p_t = torch.exp(t - t.max()) / torch.exp(t - t.max()).sum()
                log_p_s = s - s.max() - torch.log(torch.exp(s - s.max()).sum())
                terms.append(-(p_t * log_p_s).sum())
    assert len(terms) == (2 * views - 2) * batch
    return torch.stack(terms).mean()


@settings(deadline=None, max_examples=25)
@given(
    views=st.integers(2, 6),
    batch=st.integers(1, 4),
    out_dim=st.integers(2, 30),
    teacher_temp=st.floats(0.03, 0.1),
    student_temp=st.floats(0.05, 0.5),
    seed=st.integers(0, 99),
)
@example(views=2, batch=1, out_dim=2, teacher_temp=0.05, student_temp=0.05, seed=2)  # probabilities next to 1 cancel
def test_loss_and_gradient_are_those_of_the_slow_reference(
    views: int, batch: int, out_dim: int, teacher_temp: float, student_temp: float, seed: int
) -> None:
    torch.manual_seed(seed)
    student = (torch.rand(views * batch, out_dim) * 2 - 1).requires_grad_()
    teacher = torch.rand(2 * batch, out_dim) * 2 - 1
    criterion = DINOLoss(out_dim, student_temp)
    criterion.center.copy_(torch.randn(1, out_dim) / 10)
    slow = slow_loss(student.double(), teacher.double(), criterion.center.double(), teacher_temp, student_temp)
    fast = criterion.cross_entropy(student, teacher, teacher_temp)
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(slow, student)
    (found,) = torch.autograd.grad(fast, student)
    # Probabilities are subtracted, which float32 knows to some roundings of 1: of the gradient's scale, no less.
    pairs, scale = min(views - 1, 2), 1 / (student_temp * batch * (2 * views - 2))
    rounding = 4 * torch.finfo(torch.float32).eps * pairs * scale
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=rounding)


def test_a_collapse_to_even_answers_is_ln_k() -> None:
    criterion = DINOLoss(65536)
    loss = criterion(torch.zeros(8, 65536), torch.zeros(4, 65536), 0.04)
    assert loss.item() == pytest.approx(11.0904, abs=1e-4)


def test_the_loss_uses_the_old_center_and_then_moves_it_by_raw_logits() -> None:
    criterion = DINOLoss(10, center_momentum=0.9)
    old = torch.randn(1, 10)
    criterion.center.copy_(old)
    student, teacher = torch.randn(12, 10), torch.randn(6, 10)
    loss = criterion(student, teacher, 0.05)
    torch.testing.assert_close(loss, slow_loss(student, teacher, old, 0.05, 0.1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(criterion.center, 0.9 * old + 0.1 * teacher.mean(0, keepdim=True))


def test_center_is_a_saved_buffer_and_cross_entropy_leaves_it() -> None:
    criterion = DINOLoss(10)
    assert list(criterion.state_dict()) == ["center"]
    assert criterion.center.shape == (1, 10)
    assert not criterion.center.any()
    criterion.cross_entropy(torch.randn(6, 10), torch.randn(4, 10), 0.04)
    assert not criterion.center.any()


def test_loss_is_in_float32_whatever_autocast_says() -> None:
    criterion = DINOLoss(2000)
    student = torch.randn(8, 2000).bfloat16().requires_grad_()
    teacher = torch.randn(4, 2000).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(student, teacher, 0.04)
    exact = slow_loss(student.double(), teacher.double(), torch.zeros(1, 2000).double(), 0.04, 0.1)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert criterion.center.dtype == torch.float32
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_backward_keeps_one_tensor_of_all_views_and_answers_of_the_teacher_alone() -> None:
    views, batch, out_dim = 8, 4, 500
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    student = torch.randn(views * batch, out_dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        DINOLoss(out_dim)(student, torch.randn(2 * batch, out_dim), 0.04)
    assert sum(kept.values()) <= 4 * (views + 2) * batch * out_dim + 64


@pytest.mark.parametrize(
    ("student", "teacher"), [((7, 5), (4, 5)), ((6, 5), (3, 5)), ((2, 5), (4, 5)), ((6, 4), (4, 5))]
)
def test_shapes_that_do_not_belong_together(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="student logits"):
        DINOLoss(5)(torch.zeros(student), torch.zeros(teacher), 0.04)


# Lines 3, 5, 9, 16: student and teacher through the steps


def test_three_steps_are_those_of_algorithm_1() -> None:
    method = make()
    student, teacher = copy.deepcopy(method.student), copy.deepcopy(method.student)
    ours = torch.optim.AdamW(method.student.parameters(), lr=0.01)
    theirs = torch.optim.AdamW(student.parameters(), lr=0.01)
    center = torch.zeros(1, 12)
    for step in range(3):
        views = make_views(seed=step)

        ours.zero_grad()
        loss = method.loss(views, step)
        loss.backward()
        ours.step()
        method.after_step(step)

        with torch.no_grad():
            t = torch.cat([teacher(view) for view in views[:2]])
        s = torch.cat([student(view) for view in views])
        expected = slow_loss(s, t, center, 0.04 + 0.01 * step, 0.1)
        theirs.zero_grad()
        expected.backward()
        theirs.step()
        center = 0.9 * center + 0.1 * t.mean(0, keepdim=True)
        momentum = 0.9 + 0.01 * step
        with torch.no_grad():
            for p_t, p_s in zip(teacher.parameters(), student.parameters(), strict=True):
                p_t.copy_(momentum * p_t + (1 - momentum) * p_s)

        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(method.criterion.center, center, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(method.teacher.parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_dino_in_float64_is_dino_in_float32() -> None:
    """`update_center` once met a float32 mean of a float64 center."""
    single = make()
    double = copy.deepcopy(single).double()
    lr = {"lr": 0.01, "weight_decay": 0.04}
    for method in (single, double):
        dtype = method.criterion.center.dtype
        optimizer = adamw(method.student)
        set_step_values(optimizer, **lr)
        for step in range(3):
            views = [view.to(dtype) for view in make_views(seed=step)]
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            loss, finite = train_step(method, optimizer, scaler, views, step, clip=3.0)
            assert finite
        assert loss.dtype == dtype
    assert {value.dtype for value in double.state_dict().values()} == {torch.float64}
    for name, value in double.state_dict().items():
        torch.testing.assert_close(
            value.to(single.state_dict()[name].dtype), single.state_dict()[name], rtol=1e-3, atol=1e-4
        )
    logits = torch.randn(8, 12, dtype=torch.float64)
    DINOLoss(12)(logits, logits[:4], 0.04)  # a center in float32


def test_the_teacher_starts_as_the_student_head_too_and_shares_no_memory() -> None:
    method = make(Convolutional())
    student, teacher = method.student.state_dict(), method.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert any(name.startswith("head.") for name in teacher)
    for name in student:
        assert torch.equal(student[name], teacher[name])
        assert student[name].untyped_storage().data_ptr() != teacher[name].untyped_storage().data_ptr()
    assert not any(p.requires_grad for p in method.teacher.parameters())
    assert method.backbone is method.teacher.backbone


def test_momentum_1_keeps_the_teacher_and_momentum_0_makes_it_the_student() -> None:
    method = make(teacher_momentum=lambda step: float(step))
    before = copy.deepcopy(method.teacher.state_dict())
    for p in method.student.parameters():
        torch.nn.init.normal_(p)
    method.loss(make_views(), 1)
    method.after_step(1)
    assert all(torch.equal(before[k], v) for k, v in method.teacher.state_dict().items())
    method.loss(make_views(), 0)
    method.after_step(0)
    for p_t, p_s in zip(method.teacher.parameters(), method.student.parameters(), strict=True):
        assert torch.equal(p_t, p_s)


def test_dropout_and_drop_path_act_in_the_student_alone() -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2,
        drop_path_rate=0.5, proj_drop_rate=0.3, attn_drop_rate=0.3,
    )  # fmt: skip
    method = make(vit)
    view = torch.randn(8, 3, 16, 16)
    assert torch.equal(method.teacher(view), method.teacher(view))
    assert not torch.equal(method.student(view), method.student(view))


def test_teacher_batchnorm_takes_the_batch_and_gathers_its_own_statistics() -> None:
    method = make(Convolutional(dropout=0.5))
    norms = [m for m in method.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    views = make_views()
    with torch.no_grad():
        before_norm = method.teacher.backbone.body[0](torch.cat(views[:2]))
    method.loss(views, 0)
    expected = 0.1 * before_norm.mean((0, 2, 3))
    torch.testing.assert_close(norms[0].running_mean, expected)
    student = [m for m in method.student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not torch.allclose(student[0].running_mean, norms[0].running_mean)  # it saw the local views too

    statistics = norms[0].running_mean.clone()
    method.after_step(0)
    assert torch.equal(norms[0].running_mean, statistics)  # no moving average of buffers


def test_looking_at_the_backbone_in_eval_mode_between_steps_changes_nothing() -> None:
    torch.manual_seed(1)
    watched, alone = (make(Convolutional()) for _ in range(2))
    alone.load_state_dict(watched.state_dict())
    for step in range(2):
        losses = [method.loss(make_views(seed=step), step) for method in (watched, alone)]
        assert torch.equal(*losses)
        for method in (watched, alone):
            method.after_step(step)
        training = watched.backbone.training
        watched.backbone.eval()
        with torch.no_grad():
            watched.backbone(torch.randn(2, 3, 8, 8))
        watched.backbone.train(training)
    watched.eval()
    assert not any(m.training for m in watched.modules())
    watched.train()
    assert all(m.training for m in watched.student.modules())
    assert {type(m) for m in watched.teacher.modules() if m.training} == {nn.BatchNorm2d, timm.layers.BatchNormAct2d}


def test_a_frozen_last_layer_is_neither_moved_nor_decayed_nor_remembered() -> None:
    method = make(freeze_last_layer_steps=2)
    prototypes = method.student.head.last_layer.weight
    start = prototypes.detach().clone()
    parameters = [p for p in method.student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.4)
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        method.loss(make_views(seed=step), step).backward()
        assert prototypes.grad is not None
        method.freeze_last_layer(step)
        optimizer.step()
        method.after_step(step)
        if step < 2:
            assert torch.equal(prototypes, start)
            assert prototypes not in optimizer.state
    assert not torch.equal(prototypes, start)
    assert optimizer.state[prototypes]["step"] == 1


def test_micro_batches_are_one_batch() -> None:
    whole = make()
    parts = make()
    parts.load_state_dict(whole.state_dict())
    views = make_views(batch=6)
    whole.loss(views, 0).backward()
    for micro in zip(*(view.chunk(3) for view in views), strict=True):
        (parts.loss(list(micro), 0) / 3).backward()
    for a, b in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6 * b.grad.abs().max().item())
    assert not parts.criterion.center.any()  # the old center for all of them
    for method in (whole, parts):
        method.after_step(0)
    torch.testing.assert_close(whole.criterion.center, parts.criterion.center)


def test_a_discarded_step_leaves_no_trace() -> None:
    once, twice = (make(Convolutional()) for _ in range(2))
    twice.load_state_dict(once.state_dict())
    before = copy.deepcopy(twice.state_dict())
    bad = make_views()
    bad[0][0, 0, 0, 0] = math.nan
    assert torch.isnan(twice.loss(make_views(seed=5), 0) + twice.loss(bad, 0))
    assert any(torch.isnan(v).any() for v in twice.state_dict().values())  # the BatchNorm statistics of both
    twice.after_step(0, torch.tensor(False))
    assert all(torch.equal(before[k], v) for k, v in twice.state_dict().items())
    losses = [method.loss(make_views(seed=1), 1) for method in (once, twice)]
    assert torch.equal(*losses)
    for method in (once, twice):
        method.after_step(1)
    assert torch.equal(once.criterion.center, twice.criterion.center)


def test_state_holds_student_teacher_and_center_and_comes_back(tmp_path: Path) -> None:
    method = make(Convolutional())
    method.loss(make_views(), 0)
    method.after_step(0)
    state = method.state_dict()
    assert {name.split(".")[0] for name in state} == {"student", "teacher", "criterion"}
    assert "criterion.center" in state
    torch.save(state, tmp_path / "state.pt")
    other = make(Convolutional())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(method.loss(make_views(), 1), other.loss(make_views(), 1))


def test_health_is_entropy_and_divergence_by_their_definitions() -> None:
    method = make()
    assert method.health() == {}
    views = make_views()
    center = torch.randn(1, 12) / 10
    method.criterion.center.copy_(center)
    with torch.no_grad():
        p = F.softmax((torch.cat([method.teacher(v) for v in views[:2]]) - center) / 0.04, dim=1).chunk(2)
        q = [F.log_softmax(method.student(v) / 0.1, dim=1) for v in views]
    pairs = [F.kl_div(q[j], p[i], reduction="batchmean") for i in range(2) for j in range(4) if i != j]
    loss = method.loss(views, 0)
    health = method.health()
    assert health.keys() == {"teacher_entropy", "kl", "ln_k"}
    assert not any(value.requires_grad for value in health.values())
    entropy = torch.cat([torch.distributions.Categorical(row).entropy() for row in p]).mean()
    torch.testing.assert_close(health["teacher_entropy"], entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(health["kl"], torch.stack(pairs).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(health["teacher_entropy"] + health["kl"], loss.detach())
    assert health["ln_k"].item() == pytest.approx(math.log(12))


def test_prototypes_in_use_are_those_that_many_views_share_out() -> None:
    method = make()
    many = [view.repeat(-(-MANY_VIEWS // (2 * len(view))), 1, 1, 1) for view in make_views()]
    many = [view + torch.randn_like(view) for view in many]
    method.loss(many, 0)
    with torch.no_grad():
        answers = method.criterion.sharpen(method.teacher(many[:2]), 0.04)
    used = torch.distributions.Categorical(answers.mean(dim=0)).entropy().exp()
    torch.testing.assert_close(method.health()["prototypes_used"], used, rtol=1e-4, atol=1e-5)
    method.criterion.center.fill_(0)
    method.loss([view[:1].expand(len(view), -1, -1, -1) for view in [many[0]] * 4], 0)
    entropy = method.health()["teacher_entropy"]
    torch.testing.assert_close(method.health()["prototypes_used"], entropy.exp())  # one answer to all: no more


def test_the_width_is_that_of_the_embedding() -> None:
    backbone = timm.create_model("mobilenetv3_small_050", num_classes=0)  # num_features 288, embedding 1024
    method = make(backbone)
    assert torch.isfinite(method.loss([torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)], 0))
    assert make(nn.Flatten(), embed_dim=48).student.head.mlp[0].in_features == 48
    with pytest.raises(TypeError, match="embed_dim"):
        make(nn.Flatten())


@pytest.mark.parametrize("backbone", [Affine, Convolutional])
def test_a_wrapper_that_is_a_module_stays_out_of_the_state(backbone: Callable[[], nn.Module]) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.passes = module, 0

        def forward(self, views: list[Tensor]) -> Tensor:
            self.passes += 1
            logits: Tensor = self.module(views)
            return logits

    method = make(backbone())
    names, wrappers = list(method.state_dict()), []

    def wrap(module: nn.Module) -> nn.Module:
        wrappers.append(Wrapper(module))
        return wrappers[0]

    method.distribute(wrap)
    method.loss(make_views(), 0)
    assert wrappers[0].passes == 1
    assert wrappers[0].module is method.student
    assert list(method.state_dict()) == names


# Lines 1, 11: two processes


def train(method: DINO, rank: int, world: int, accumulate: int) -> dict[str, Tensor]:
    """Three steps of gradient descent on this rank's share; what came out of them."""
    method.distribute(lambda module: distributed.wrap(module, ranks) if world > 1 else module)
    parameters = [p for p in method.student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    found = {}
    for step in range(3):
        share = [view.chunk(world)[rank] for view in make_views(batch=8, seed=step)]
        optimizer.zero_grad()
        losses = torch.zeros(())
        for micro in zip(*(view.chunk(accumulate) for view in share), strict=True):
            loss = method.loss(list(micro), step)
            (loss / accumulate).backward()
            losses += loss.detach() / accumulate
        found[f"loss {step}"] = distributed.mean_over_ranks(losses)
        found |= {f"gradient {step} {i}": p.grad.clone() for i, p in enumerate(parameters)}
        optimizer.step()
        method.after_step(step)
    return found | {name: value.clone() for name, value in method.state_dict().items()}


CASES = {"batchnorm": (Convolutional, 1), "accumulated": (Affine, 2)}
rank = int(os.environ.get("RANK", 0))
ranks = distributed.Ranks(rank, 2, rank, 2, torch.device("cpu"))


def one_of_two(out: Path) -> None:
    """What each of the two processes does."""
    distributed.setup("cpu")
    for name, (backbone, accumulate) in CASES.items():
        torch.manual_seed(7 if ranks.main else 8)  # the main rank's weights are everybody's
        torch.save(train(make(backbone()), ranks.rank, 2, accumulate), out / f"{name}-{ranks.rank}.pt")
    distributed.shutdown()


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


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_half_the_batch_each_are_one_with_all_of_it(case: str, two_processes: Path) -> None:
    backbone, accumulate = CASES[case]
    torch.manual_seed(7)
    expected = train(make(backbone()), 0, 1, accumulate)
    for rank in range(2):
        found = torch.load(two_processes / f"{case}-{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # BatchNorm divides a gradient by how little a small net's units vary: 1e-5 of its size is not held there.
            rtol = 1e-4 if name.startswith("gradient") else 1e-5
            torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
