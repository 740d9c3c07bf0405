import pytest
import torch

from ssl_geo.errors import UserError
from ssl_geo.training.precision import choose_dtype

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
