import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from timm.layers import create_conv2d
from torch import nn

from ssl_geo.errors import UserError
from ssl_geo.training.precision import choose_dtype, widen_narrow_inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bf16_only_where_the_hardware_computes_it(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert choose_dtype("auto", CPU) == expected


def test_what_is_asked_for_is_taken():
    assert choose_dtype("bf16", CPU) == torch.bfloat16
    assert choose_dtype("fp32", CPU) == torch.float32


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_dtype("fp16", CPU)


@pytest.mark.parametrize("size", [16, 32])
def test_gradients_in_bf16_of_views_that_end_in_one_pixel(size):
    # Weights of a stride of 2 over an input of one pixel had gradients of whatever lay in memory (AVX-512 BF16).
    torch.manual_seed(0)
    convolution = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)
    widen_narrow_inputs(convolution)
    image = torch.randn(16, 64, size // 16, size // 16).to(memory_format=torch.channels_last)
    upstream = torch.randn_like(convolution(image))
    (exact,) = torch.autograd.grad(convolution(image), convolution.weight, upstream)
    for _ in range(5):
        dirt = [torch.full((1 << 20,), torch.nan) for _ in range(4)]
        with torch.autocast("cpu", torch.bfloat16):
            output = convolution(image)
        del dirt
        (found,) = torch.autograd.grad(output, convolution.weight, upstream.to(output.dtype))
        assert (found - exact).norm() < 0.02 * exact.norm()


@given(
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
)
def test_a_widened_input_changes_neither_output_nor_gradients(height, width, kernel, stride, padding, dilation):
    reach = dilation * (kernel - 1) + 1
    assume(reach <= min(height, width) + 2 * padding)
    convolution = nn.Conv2d(2, 3, kernel, stride, padding, dilation).double()
    image = torch.randn(2, 2, height, width, dtype=torch.float64, requires_grad=True)
    wanted = F.conv2d(image, convolution.weight, convolution.bias, stride, padding, dilation)
    widen_narrow_inputs(convolution)
    output = convolution(image)
    upstream = torch.randn_like(wanted)
    leaves = (image, convolution.weight, convolution.bias)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(output, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream)
    )


@pytest.mark.parametrize(
    "convolution",
    [
        lambda: nn.Conv2d(2, 3, 3, 2, 1, padding_mode="circular"),
        lambda: nn.Conv2d(2, 3, 3, 2, 1, padding_mode="replicate"),
        lambda: nn.Conv2d(2, 3, 3, 1, "same"),
        lambda: create_conv2d(2, 3, 3, stride=2, padding="same"),
    ],
)
def test_convolutions_that_pad_by_their_input_are_left_alone(convolution):
    module, image = convolution(), torch.randn(2, 2, 3, 1)
    wanted = module(image)
    widen_narrow_inputs(module)
    assert torch.equal(module(image), wanted)


def test_a_network_with_widened_inputs_has_the_names_of_before():
    model = timm.create_model("resnet10t", num_classes=0)
    names = list(model.state_dict())
    widen_narrow_inputs(model)
    assert list(model.state_dict()) == names
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 512)
