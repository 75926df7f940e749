"""What Hopper's compiler makes of the hot kernels stays within bounds: a change that doubles a
kernel's instructions or halves its loads shows before a GPU does. See bench/NOTES.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="the compiler under test")

ROOT = Path(__file__).parents[2]
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


class Bound(NamedTuple):
    registers: int
    widest_load: int  # bits
    all: float = float("inf")  # instructions per element of a thread
    loops: tuple[float, ...] = ()  # the same of each innermost loop
    blocks: tuple[int, int] = (1, 32)  # on a multiprocessor, as far as registers decide
    walks: tuple[str, ...] = ()  # what loops may load with


BOUNDS = {
    "gelu": Bound(64, 128, all=18),
    "gelu backward": Bound(64, 128, all=22),
    "gelu backward, output": Bound(64, 128, all=23),
    # zeros for an ignored row; maximum and sum; gradients. More rows at once would leave L2
    "cross entropy": Bound(64, 128, loops=(3, 10, 7), blocks=(2, 2)),
    "cross entropy, odd": Bound(64, 16, loops=(4, 12, 11), blocks=(2, 2)),
    # 7 programs of 2 warps are launched on a multiprocessor
    "cross entropy, padded": Bound(64, 128, loops=(3, 10, 7), blocks=(2, 2)),
    "norm backward": Bound(128, 128, loops=(25,), blocks=(7, 32)),
    # left of the diagonal; dk and dv on it and below; an element is a score
    "attention": Bound(128, 128, loops=(12,), blocks=(4, 4), walks=("LDGSTS",)),
    "attention dq": Bound(128, 128, loops=(9.5,), blocks=(4, 4), walks=("LDGSTS",)),
    "attention dk dv": Bound(176, 128, loops=(19, 15.5), blocks=(2, 3), walks=("LDGSTS",)),
    "squares": Bound(64, 128),
    "adamw": Bound(128, 128),
}


@pytest.fixture(scope="module")
def compiled():
    """In a process of its own: here the interpreter may have taken the compiler's place."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.machine_code"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(VERSION < (3, 6), reason="the bounds are for Triton 3.6 and later")
@pytest.mark.parametrize("kernel", BOUNDS)
def test_hot_kernels_stay_within_their_bounds(compiled, kernel):
    found, bound = compiled[kernel], BOUNDS[kernel]
    assert found["spills"] == 0
    assert found["registers"] <= bound.registers
    assert found["widest_load"] >= bound.widest_load
    assert found["all"] <= bound.all
    if bound.loops:
        assert len(found["loops"]) == len(bound.loops)
        assert all(n <= most for n, most in zip(found["loops"], bound.loops, strict=True)), found
    if bound.walks:
        assert tuple(found["walks"]) == bound.walks
    assert bound.blocks[0] <= found["blocks"] <= bound.blocks[1]


def test_every_record_has_its_bounds(compiled):
    assert compiled.keys() == BOUNDS.keys()
