"""Stages of a device that does everything wrong: python -m tests.bench.gpu_stub HOW FOLDER.

Imports nothing of torch: what is tried is bench.gpu, dozens of times.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

ROW = {"op": "layer_norm", "variant": "fastgpt", "direction": "forward", "microseconds": 28.0}


def say(row: object) -> None:
    print(json.dumps(row), flush=True)


def grandchild() -> None:
    """In a session of its own, deaf to SIGTERM, holding on to our output."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code, *sys.argv], start_new_session=True)


def preflight(out: Path) -> None:
    say({"check": "device", "ok": True, "device": "Stub GPU", "commit": "abc", "torch": "2.11"})


def refused(out: Path) -> None:
    say({"check": "compiler", "ok": False, "why": "no C compiler: \x1b[31mget one"})
    sys.exit(1)


def ok(out: Path) -> None:
    say(ROW)


def hang(out: Path) -> None:
    say(ROW)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    grandchild()
    time.sleep(600)


def orphan(out: Path) -> None:
    """Ends well, and leaves something running."""
    say(ROW)
    grandchild()


def fault(out: Path) -> None:
    say(ROW)
    os.kill(os.getpid(), signal.SIGSEGV)


def memory(out: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    bytearray(2**40)


def killed(out: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def keeper(out: Path) -> None:
    """Kills the process that watches over it, and runs on."""
    grandchild()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def garbage(out: Path) -> None:
    """100 MB that mean nothing, then rows and records of the wrong shape."""
    for _ in range(100):
        sys.stdout.buffer.write(os.urandom(10**6))
    print(
        '\n{"variant": NaN, "microseconds": NaN}\n{"half": \n[1, 2]\n{"problem": 3}\n' + "[" * 5000
    )
    print('{"variant": "fastgpt", "op": ["a"], "microseconds": "fast", "ms": 5, "direction": {}}')
    for i, text in enumerate(
        ['{"rows": 5}', '{"rows": [5, {"ms": [1]}], "bench": {}}', "\0", "[[["]
    ):
        folder = out / "records/x"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.json").write_text(text)
    train = {
        "bench": "train",
        "rows": [{"variant": None, "tokens_per_second": "x", "ms": {"p": 1}}],
    }
    (folder / "train.json").write_text(json.dumps(train))
    (out / "outcomes-0.jsonl").write_text('{"test": 5}\n{"test": "a", "outcome": []}\n7\n{"x')
    (out / "cache/fastgpt").mkdir(parents=True)
    (out / "cache/fastgpt/gpu.json").write_text("{")


def fill(out: Path) -> None:
    """The disk: see the limit in test_gpu.py."""
    say(ROW)
    with (out / "big").open("wb") as file:
        while True:
            file.write(bytes(2**20))
            file.flush()
            time.sleep(0.01)


def failed_test(out: Path) -> None:
    """As tests.gpu leaves it."""
    test = {"test": "tests/gpu/test_ops.py::test_real_sizes[layer_norm]", "outcome": "failed"}
    (out / "outcomes-0.jsonl").write_text(
        json.dumps(test | {"seed": 17, "why": "error 3e-2", "ops": "layer_norm"}) + "\n"
    )


def silent(out: Path) -> None:
    """Exit 0, and no result."""


def once(out: Path) -> None:
    """Fails at the first try."""
    if not (out / "tried").exists():
        (out / "tried").touch()
        sys.exit(3)
    say(ROW)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
