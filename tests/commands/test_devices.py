"""What a device can do: peaks are those of the named chip or unknown, never a lookalike's."""

import math

import pytest
import torch

from fastgpt import devices


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
    ],
)
def test_peaks(name, peak):
    assert devices.peak_flops_of(name) == peak


@pytest.mark.parametrize(
    "name",
    ["NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA GeForce RTX 4090 Laptop GPU", "Radeon", ""],
)
def test_unknown_devices_have_no_peak(name):
    assert math.isnan(devices.peak_flops_of(name))


def test_a_cpu_has_no_peak():
    assert math.isnan(devices.peak_flops(torch.device("cpu")))


def test_float16_is_for_cuda():
    with pytest.raises(ValueError, match="float16 is for CUDA"):
        devices.pick_dtype(torch.device("cpu"), "float16")
