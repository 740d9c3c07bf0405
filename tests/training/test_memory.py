import subprocess
import sys

import pytest
import torch

from ssl_geo.training.memory import on_device

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_batches_arrive_whole_and_in_order(device):
    batches = [[torch.full((2, 3, 4, 4), float(n)), torch.arange(5) + n] for n in range(50)]
    sent = [[t.pin_memory() for t in batch] for batch in batches] if device == "cuda" else batches
    place = torch.device(device)
    for given, found in zip(batches, on_device(iter(sent), place), strict=True):
        assert all(tensor.device.type == device for tensor in found)
        torch.ones(1000, 1000, device=place) @ torch.ones(1000, 1000, device=place)  # the device is behind
        assert all(torch.equal(a, b.cpu()) for a, b in zip(given, found, strict=True))


FAULTS = """
import resource, torch
from ssl_geo.training.memory import keep_freed_memory

def faults():
    for _ in range(10):  # small blocks settle between the large ones
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone")
def test_freed_memory_is_handed_out_again():
    """Pages of 10 times the same 64 MB that the kernel has to map."""
    by_default, taken, kept = subprocess.check_output([sys.executable, "-c", FAULTS], text=True).split()
    assert taken == "True"
    assert int(kept) < int(by_default) / 10
