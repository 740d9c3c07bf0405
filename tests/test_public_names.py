import subprocess
import sys

import pytest
import torch

import ssl_geo


@pytest.mark.parametrize("name", ssl_geo.__all__)
def test_public_names_are_there(name):
    assert getattr(ssl_geo, name).__name__ == name
    assert name in dir(ssl_geo)


def test_importing_the_package_imports_no_torch():
    code = "import sys, ssl_geo; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'DINOHat'"):
        _ = ssl_geo.DINOHat


def test_the_loss_is_called_as_documented_and_carries_its_center():
    loss = ssl_geo.DINOLoss(8)
    student, teacher = torch.randn(4 * 3, 8), torch.randn(2 * 3, 8)
    assert loss(student, teacher, 0.04).ndim == 0
    torch.testing.assert_close(loss.center, 0.1 * teacher.mean(dim=0, keepdim=True))
    assert "center" in loss.state_dict()
