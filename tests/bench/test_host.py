"""bench.host: that all of a step is timed with kernels launched into nothing. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no stubs")
def test_every_part_has_its_time():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.host", "--rounds", "2", "--layers", "1"]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = {row["part"]: row for row in map(json.loads, run.stdout.splitlines())}
    assert len(rows) == 5
    assert all(0 < row["least_ms"] <= row["median_ms"] for row in rows.values())
    assert {(row["launches"], row["layers"]) for row in rows.values()} == {("stubbed", 1)}
    whole, part = rows["train.py's step"], rows["its forward and backward"]
    assert whole["least_ms"] > part["least_ms"] > rows["whether the model is as built"]["least_ms"]
