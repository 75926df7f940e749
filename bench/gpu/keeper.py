"""Runs one command and ends every process that it started: `run`, and the keeper that `run` starts.

The keeper is a small process between the caller and the command. It logs what the command prints,
watches the clock and the disk, and finally ends all descendants, those in sessions of their own
too: as their subreaper (prctl(2)) it sees them all below it in /proc. If the caller dies, even by
SIGKILL, the pipe between the two closes, and the keeper ends the command. Standard library only,
and no import of this project: it runs as a script (see `run`).
"""

import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

PR_SET_CHILD_SUBREAPER = 36
HEAD, TAIL = 4 * 2**20, 64 * 2**10  # bytes of a command's output that are kept: first, last


class Limits(NamedTuple):
    seconds: float
    grace: float = 5.0  # seconds between SIGTERM and SIGKILL
    max_bytes: int = 4 * 2**30  # in the folders that the command may write to
    min_free: int = 2**28  # bytes that stay free on their disk


class Outcome(NamedTuple):
    how: str  # "exited", "signal", "out of time", "disk", "interrupted", "not started", "lost"
    code: int  # of the exit, or the signal's number
    seconds: float
    left: list[int]  # processes that not even SIGKILL ended


def run(
    command: list[str],
    log: Path,
    folders: list[Path],
    limits: Limits,
    cwd: Path,
    env: dict[str, str],
) -> Outcome:
    """Run `command` under a keeper. Any exception here, KeyboardInterrupt too, ends it as well."""
    spec = [command, str(log), [str(f) for f in folders], limits, str(cwd)]
    start = time.monotonic()
    # -I: no module in PYTHONPATH or in this folder may shadow one that the keeper imports
    keeper = subprocess.Popen(
        [sys.executable, "-I", __file__, json.dumps(spec)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = _wait(keeper, limits.seconds + limits.grace + 20)
    except BaseException:
        with contextlib.suppress(OSError):
            keeper.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            keeper.wait(limits.grace + 15)
        raise
    try:
        return Outcome(*json.loads(output))
    except ValueError:  # somebody killed the keeper, or it hung
        left = stop_descendants(os.getpid(), limits.grace)
        return Outcome("lost", keeper.returncode or 0, time.monotonic() - start, left)


def _wait(keeper: subprocess.Popen, seconds: float) -> tuple[bytes, int]:
    """What the keeper printed. Its stdin stays open until then: closing it tells it to stop."""
    assert keeper.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(keeper.stdout, selectors.EVENT_READ)
        output, end = b"", time.monotonic() + seconds
        while time.monotonic() < end and selector.select(end - time.monotonic()):
            part = os.read(keeper.stdout.fileno(), 65536)
            if not part:
                break
            output += part
        else:
            keeper.kill()
    keeper.wait()
    keeper.stdin.close()  # type: ignore[union-attr]
    keeper.stdout.close()
    return output, keeper.returncode


def become_subreaper() -> None:
    """Orphaned descendants become children of this process, not of init."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Living processes below `pid`; none on systems without /proc."""
    children: dict[int, list[int]] = {}
    names = os.listdir("/proc") if os.path.isdir("/proc") else []
    for name in filter(str.isdigit, names):
        with contextlib.suppress(OSError, IndexError):
            state, parent, *_ = (
                Path(f"/proc/{name}/stat").read_text("latin1").rpartition(")")[2].split()
            )
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(name))
    pids, new = [], [pid]
    while new:
        new = [child for parent in new for child in children.get(parent, ())]
        pids += new
    return pids


def stop_descendants(pid: int, grace: float) -> list[int]:
    """SIGTERM, then SIGKILL to all below `pid` -> those alive ten seconds after SIGKILL."""
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        end, sent = time.monotonic() + seconds, set[int]()
        while living := descendants(pid):
            for child in living:
                if number == signal.SIGKILL or child not in sent:
                    with contextlib.suppress(OSError):
                        os.kill(child, number)
                    sent.add(child)
            if time.monotonic() > end:
                break
            time.sleep(0.02)
    return descendants(pid)


def size_of(folder: Path) -> int:
    """Bytes of all files below it, as a tar would hold them."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(at, name)).st_size
    return total


class _Log:
    """Writes the first HEAD bytes of a command's output at once, the last TAIL bytes on `close`."""

    def __init__(self, path: Path):
        self.path, self.seen, self.tail = path, 0, b""
        self.file = path.open("ab", buffering=0)

    def add(self, data: bytes) -> None:
        head = data[: max(0, HEAD - self.seen)]
        self.seen += len(data)
        self.tail = (self.tail + data[len(head) :])[-TAIL:]
        self._write(head)

    def close(self) -> None:
        if (left_out := self.seen - HEAD - len(self.tail)) > 0:
            self._write(f"\n[{left_out:,} bytes left out]\n".encode())
        self._write(self.tail)
        self.file.close()

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk: the command goes on, this output is lost
            self.file.write(data)


def keep(command: list[str], log: _Log, folders: list[Path], limits: Limits, cwd: str) -> Outcome:
    """What the keeper does: start the command, watch it, end it with all its descendants."""
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        log.add(f"{error}\n".encode())
        return Outcome("not started", error.errno or 1, 0.0, [])
    with contextlib.suppress(OSError):  # when memory runs out, the system kills this first
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("500")
    how = _watch(process, log, folders, limits, start + limits.seconds)
    # after an interruption of the caller a SIGKILL may follow soon
    left = _stop(process, log, min(limits.grace, 1.0) if how == "interrupted" else limits.grace)
    code = process.returncode if process.returncode is not None else 0
    if not how:
        how, code = ("exited", code) if code >= 0 else ("signal", -code)
    return Outcome(how, code, time.monotonic() - start, left)


def _watch(
    process: subprocess.Popen, log: _Log, folders: list[Path], limits: Limits, end: float
) -> str:
    """Wait for the command's end -> "", or the reason why it has to be stopped."""
    assert process.stdout is not None
    next_look = 0.0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)  # from the caller
        while process.poll() is None:
            for key, _ in selector.select(0.05):
                data = os.read(key.fd, 2**20)
                if key.fd == 0 and not data:
                    return "interrupted"
                if key.fd != 0 and data:
                    log.add(data)
                elif key.fd != 0:  # it closed its output and runs on
                    selector.unregister(process.stdout)
            now = time.monotonic()
            if now > end:
                return "out of time"
            if now > next_look:
                if _too_full(folders, limits):
                    return "disk"
                next_look = time.monotonic() + max(0.5, 10 * (time.monotonic() - now))
    return ""


def _too_full(folders: list[Path], limits: Limits) -> bool:
    if sum(map(size_of, folders)) > limits.max_bytes:
        return True
    with contextlib.suppress(OSError):
        return any(shutil.disk_usage(folder).free < limits.min_free for folder in folders)
    return False


def _stop(process: subprocess.Popen, log: _Log, grace: float) -> list[int]:
    """End what still runs and log the last output, without waiting for the pipe's end: a process
    that could not be ended may hold it open.
    """
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    if process.poll() is None and not os.path.isdir("/proc"):  # descendants cannot be listed
        os.killpg(process.pid, signal.SIGKILL)
    left = stop_descendants(os.getpid(), grace)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2)
    with contextlib.suppress(OSError):
        while data := os.read(process.stdout.fileno(), 2**20):
            log.add(data)
    log.close()
    return left


def main() -> int:
    command, log, folders, limits, cwd = json.loads(sys.argv[1])
    become_subreaper()
    outcome: Any = keep(command, _Log(Path(log)), list(map(Path, folders)), Limits(*limits), cwd)
    sys.stdout.write(json.dumps(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
