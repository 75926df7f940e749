"""torch.compile on CUDA: "auto" makes the model one graph, whatever is chosen. Needs no GPU.

On a CPU "auto" decides before it asks what it asks on CUDA, so tests there see no break of these.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

needs_no_device = pytest.mark.skipif(
    torch.version.cuda is None or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"),
    reason="this PyTorch knows no CUDA, or cannot pretend to have a device",
)


@needs_no_device
@pytest.mark.skipif(torch.cuda.is_available(), reason="it pretends that there is a GPU")
def test_one_graph_without_a_break():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.model.fake_cuda"]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert len(report) == 24
    assert {case: found for case, found in report.items() if found["graphs"] != 1} == {}
    for case, found in report.items():
        assert not found["breaks"], case
        left = "left to inductor" in case
        assert bool(found["ours"]) != left, case  # as it was asked
        fused = "fastgpt.add_layer_norm_forward.default" in found["ours"]  # in no module's forward
        assert fused != left, case
