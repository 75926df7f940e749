"""launch: the second time straight to the compiled kernel, and only where Triton would take it."""

import os
import subprocess
import sys

import pytest
import torch

from fastgpt.kernels import _launch
from fastgpt.kernels._launch import launch


class Compiled:
    """What Triton's jitted kernels return; remembers its launches."""

    def __init__(self, takes_constants: bool):
        self.launches, self.takes_constants = [], takes_constants

    def __getitem__(self, grid):
        def start(*args):
            if not self.takes_constants:
                raise TypeError("function takes exactly 2 arguments (3 given)")
            self.launches.append((grid, args))

        return start


class Jitted:
    arg_names = ("x_ptr", "n", "BLOCK")

    def __init__(self, takes_constants: bool = True):
        self.compiled, self.asked, self.takes = {}, [], takes_constants

    def __getitem__(self, grid):
        def start(*args, **options):
            self.asked.append((grid, args, options))
            key = (args[0].dtype, args[1], *options.items())
            return self.compiled.setdefault(key, Compiled(self.takes))

        return start


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(_launch, "_compiled", {})


def test_the_second_launch_is_direct():
    kernel, x, y = Jitted(), torch.zeros(64), torch.ones(64)
    launch(kernel, 5, x, 48, BLOCK=32, num_warps=4)
    launch(kernel, 7, y, 48, BLOCK=32, num_warps=4)
    assert len(kernel.asked) == 1
    (compiled,) = kernel.compiled.values()
    assert compiled.launches == [((7, 1, 1), (y, 48, 32))]  # parameters as declared, no options


@pytest.mark.parametrize(
    "args, options",
    [
        ((torch.zeros(64).half(), 48), {}),
        ((torch.zeros(64)[1:], 48), {}),  # not at a multiple of 16
        ((torch.zeros(64), 47), {}),
        ((torch.zeros(64), 1), {}),
        ((torch.zeros(64), 2**31), {}),
        ((torch.zeros(64), 48.0), {}),
        ((torch.zeros(64), None), {}),
        ((torch.zeros(64), 48), dict(BLOCK=64)),
        ((torch.zeros(64), 48), dict(num_warps=8)),
    ],
)
def test_what_triton_specializes_for_is_asked_again(args, options):
    kernel = Jitted()
    launch(kernel, 1, torch.zeros(64), 48, BLOCK=32, num_warps=4)
    launch(kernel, 1, *args, **(dict(BLOCK=32, num_warps=4) | options))
    assert len(kernel.asked) == 2


def test_a_triton_whose_launchers_take_no_constants():
    kernel, x = Jitted(takes_constants=False), torch.zeros(64)
    for _ in range(3):
        launch(kernel, 5, x, 48, BLOCK=32)
    assert len(kernel.asked) == 3
    assert not any(compiled.launches for compiled in kernel.compiled.values())


# Every launch of a training step twice: as it is, and by Triton itself. Both must come to the same
# kernel with the same parameters. T is odd, so that few sizes are multiples of 16.
BY_BOTH = """
import torch
from bench import host
host.stub_launches()
from fastgpt import use_backend
from fastgpt.kernels import _launch
import triton
started, takes_constants = [], []
launcher = triton.runtime.driver.active.launcher_cls
call = launcher.__call__
def note(self, *args):
    call(self, *args)
    started.append((self, args))
launcher.__call__ = note
usual = _launch._start
def twice(index, kernel, grid, args, options):
    usual(index, kernel, grid, args, options)
    compiled = kernel[(grid,)](*args, **options)
    ours, tritons = started[-2:]
    assert ours[0] is tritons[0], kernel
    for number, (a, b) in enumerate(zip(ours[1], tritons[1], strict=True)):
        hooks = type(a).__name__ == type(b).__name__ == "LazyDict"  # what launch hooks may ask
        assert hooks or a is b or a == b, (kernel, number, type(a), type(b))
    seen.append(compiled)
    takes_constants.append(ours[0].parameters == len(kernel.arg_names))
_launch._start = twice
with use_backend("triton"):
    parts = host.parts(torch.device("cpu"), 1)
    for _ in range(3):
        seen = []
        parts["TrainStep"]()
direct = sum(found is not None for found in _launch._compiled.values())
print(len(seen), direct, len(_launch._compiled), int(all(takes_constants)))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no stubs")
def test_a_step_launches_what_triton_would():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", BY_BOTH]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    launches, direct, known, takes_constants = map(int, run.stdout.split()[-4:])
    assert launches > 15 and known > 8
    assert direct == (known if takes_constants else 0)
