"""pytest -p tests.gpu.shard --shard I/N --outcomes FILE: every N-th of the collected tests.

FILE gets a line of JSON when a test waits, starts and ends, so that a process that dies tells which
test it died in. It names the ops that the test is marked with (pytest.mark.ops). Tests that ended
according to a file in FILE's folder are not run again. After a failure that leaves the device
unusable the process ends, and tests.gpu starts it anew for the rest.

Imports nothing of torch or triton: conftest.py must be the first to.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest

FAILURES = "failures.txt"  # at once: a process that is ended never prints its tracebacks
MAX_TEXT = 6000  # characters of one
BROKEN = 70  # exit code: the device answers this process no longer
UNFINISHED = ("waiting", "started")


def read(path: Path) -> list[dict]:
    """The lines of one file; half a line, where a process died, is none."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def outcomes(folder: Path) -> dict[str, dict]:
    """test -> the last line about it, of all files."""
    files = sorted(folder.glob("outcomes-*.jsonl"))
    return {line["test"]: line for path in files for line in read(path)}


def write(path: Path, test: str, outcome: str, **more: object) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, **more}) + "\n")


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", metavar="I/N")
    parser.addoption("--outcomes", type=Path, metavar="FILE")


def pytest_configure(config):
    if config.getoption("outcomes"):
        config.pluginmanager.register(Outcomes(config.getoption("outcomes")))


@pytest.hookimpl(trylast=True)  # what -m leaves out will not run, and nobody waits for it
def pytest_collection_modifyitems(config, items):
    first, step = map(int, config.getoption("shard").split("/"))
    kept, path = items[first::step], config.getoption("outcomes")
    if path:
        last = outcomes(path.parent)
        ended = {test for test, line in last.items() if line["outcome"] not in UNFINISHED}
        kept = [item for item in kept if item.nodeid not in ended]
        for item in kept:
            write(path, item.nodeid, "waiting")
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


class Outcomes:
    def __init__(self, path: Path):
        self.path, self.seed = path, None
        self.ops: dict[str, str] = {}  # test -> the ops that it is of

    def pytest_collection_modifyitems(self, items):
        for item in items:
            mark = item.get_closest_marker("ops")  # a test's own, else its file's
            self.ops[item.nodeid] = " ".join(mark.args) if mark else ""

    def write(self, test, outcome, **more):
        write(self.path, test, outcome, ops=self.ops.get(test, ""), **more)

    def pytest_runtest_logstart(self, nodeid):
        self.write(nodeid, "started")

    def pytest_runtest_call(self, item):
        if torch := sys.modules.get("torch"):
            self.seed = torch.initial_seed()  # fixtures have set it
        self.write(item.nodeid, "started", seed=self.seed)

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        lines = report.longreprtext.splitlines() if report.failed else []
        why = next((line[1:].strip() for line in lines if line.startswith("E ")), "")
        more = {"seed": self.seed, "seconds": round(report.duration, 2), "why": why[:300]}
        self.write(report.nodeid, report.outcome, **more)
        if report.failed:
            with (self.path.parent / FAILURES).open("a") as file:
                file.write(f"{report.nodeid}\n{report.longreprtext[-MAX_TEXT:]}\n\n")
            if not _device_answers():
                os._exit(BROKEN)


def _device_answers() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:  # an illegal access: every later call would fail with it
        return False
    return True
