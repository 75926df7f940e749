"""The ops under pytest-benchmark: `pytest bench/pytest_ops.py --benchmark-only -k layer_norm`.

`make bench-ops` saves a run, `make bench-compare` holds a new one against the last that was saved
on this machine. A call is timed as its caller sees it, until the device is done, from a cold cache.
bench.ops has what pytest-benchmark cannot take: device time, all variants of an op in turns. A call
that computes something else fails and is not timed; a peer that is not installed is skipped.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from bench import ops
from bench.harness import op_cases
from bench.peers.ops import peers
from fastgpt import devices
from fastgpt.commands import timing

CASES = op_cases.cases(torch.device("cpu"), torch.float32, 64, 64, 64)  # for their names
NAMES = [
    (case.op, direction, name)
    for case in CASES
    for direction in case.work
    for name, peer in peers(case.op).items()
    if direction == "both" or not peer.whole
]


@pytest.fixture(scope="session")
def device(pytestconfig) -> torch.device:
    return devices.pick_device(pytestconfig.option.device)


@pytest.fixture(scope="session")
def checked(pytestconfig, device) -> Callable[[str], ops.Checked]:
    """op -> its Checked at the sizes of the options. Only the last one is kept, to save memory."""
    dtype, *sizes = ops.sizes_of(pytestconfig.option, device)
    cases = {case.op: case for case in op_cases.cases(device, dtype, *sizes)}
    return functools.lru_cache(maxsize=1)(lambda op: ops.Checked(cases[op]))


@pytest.fixture(scope="session")
def cool(device) -> Callable[[], None]:
    """Makes the GPU's cache cold and waits for that; nothing on a CPU."""
    if device.type != "cuda":
        return lambda: None
    buffer = torch.ones(timing.FLUSH_BYTES // 4, device=device)

    def read() -> None:
        buffer.sum()
        torch.cuda.synchronize(device)

    return read


@pytest.mark.parametrize("op, direction, variant", NAMES)
def test_op(benchmark, checked, cool, device, pytestconfig, op, direction, variant):
    try:
        call = checked(op).calls(variant)[direction]
    except ArithmeticError:
        raise
    except Exception as problem:  # not installed, or not for this device
        pytest.skip(f"{type(problem).__name__}: {problem}")

    def until_done() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = f"{op} {checked(op).case.shape} {direction}"
    rounds = pytestconfig.option.rounds
    benchmark.pedantic(until_done, setup=cool, rounds=rounds, warmup_rounds=3)
