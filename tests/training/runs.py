"""Small runs of `fastgpt train` as processes of their own, and what they leave behind."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastgpt
from fastgpt.commands.prepare import prepare

ROOT = Path(fastgpt.__file__).resolve().parent.parent
TEXT = "".join(chr(97 + i * i % 23) for i in range(3000))
SMALL = (
    "--device cpu --n-layer 2 --n-head 2 --n-embd 16 --block-size 8 --batch-size 4 --dropout 0.1 "
    "--warmup 3 --eval-iters 3"
)
PATIENCE = 120  # seconds, on a busy machine

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this PyTorch was built without torch.distributed or without gloo",
)


def prepared(folder: Path) -> Path:
    prepare(TEXT, folder)
    return folder


def start(*args: object, processes: int = 0, restarts: int = 0) -> subprocess.Popen[str]:
    """`fastgpt train` with these arguments, under torchrun for 1 or more `processes`."""
    command = [sys.executable]
    if processes:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [*torchrun, str(processes), "--max-restarts", str(restarts)]
    command += ["-m", "fastgpt", "train", *SMALL.split(), *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, env=env, **pipes)
    limit = threading.Timer(PATIENCE, process.kill)
    limit.daemon = True
    limit.start()
    return process


def finished(process: subprocess.Popen[str]) -> str:
    """What a run that must succeed has said."""
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    return said


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Read what it says up to a line with `text`."""
    said = ""
    assert process.stdout is not None
    while text not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    return said


def losses(out: Path) -> dict[tuple[int, str], float]:
    """Of every step and validation in a run's log."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    names = ("loss", "train_loss", "val_loss")
    return {(line["step"], n): line[n] for line in lines for n in names if n in line}


def assert_same_losses(found: Path, expected: Path) -> None:
    a, b = losses(found), losses(expected)
    assert a.keys() == b.keys() and a
    for key, value in b.items():
        assert a[key] == pytest.approx(value, abs=1e-5), key


def assert_same_model(found: Path, expected: Path) -> None:
    a, b = (torch.load(path, weights_only=True)["model"] for path in (found, expected))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
