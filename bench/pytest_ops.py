"""bench.ops under pytest-benchmark: `pytest bench/pytest_ops.py --benchmark-only -k layer_norm`.

The samples are bench.ops's own: all variants of an op in turns, from a cold cache, on the device's
clock, which pytest-benchmark's loop over one variant cannot take. They reach it through its clock,
for its tables and its --benchmark-save and --benchmark-compare. What was measured is appended as a
record like any other. A wrong result fails; a peer that is not installed is skipped.
"""

from collections.abc import Iterable, Iterator

import pytest
import torch

from bench import ops
from bench.harness import op_cases
from bench.peers.ops import peers

CASES = op_cases.cases(torch.device("cpu"), torch.float32, 64, 64, 64)  # for their names
NAMES = [
    (case.op, direction, name)
    for case in CASES
    for direction in case.work
    for name, peer in peers(case.op).items()
    if direction == "both" or not peer.whole
]


class Replay:
    """A clock that shows 0 before a call and the next sample after it."""

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, samples: Iterable[float]) -> None:
        self._readings = iter([reading for sample in samples for reading in (0.0, sample)])

    def read(self) -> float:
        return next(self._readings)


replay = Replay()


@pytest.fixture(scope="session")
def run(pytestconfig):
    run = ops.Run(pytestconfig.option)
    yield run
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nrecord: {run.save()}")


@pytest.mark.benchmark(timer=replay.read)
@pytest.mark.parametrize("op, direction, variant", NAMES)
def test_op(benchmark, run, op, direction, variant):
    rows = [row for row in run.rows(op) if row["variant"] == variant]
    row = next(row for row in rows if row.get("direction", direction) == direction)
    if "problem" in row:
        refused = row["problem"].startswith("ArithmeticError")
        (pytest.fail if refused else pytest.skip)(row["problem"])
    benchmark.group = f"{op} {row['shape']} {direction}"
    benchmark.extra_info = {k: v for k, v in row.items() if k != "seconds"}
    replay.load(row["seconds"])
    benchmark.pedantic(lambda: None, rounds=len(row["seconds"]))
