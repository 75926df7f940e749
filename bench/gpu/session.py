"""One call: preflight, then stage after stage until the budget is spent; the next call goes on.

Standard library only: what uses torch or a GPU runs in a process of its own under keeper.py, so
that no stage can end this process. Before and after every stage the state is written to disk. Of a
stage that was cut off, what it had written counts.
"""

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.gpu import keeper, results, store, table
from bench.gpu.inputs import ROOT, Inputs
from bench.gpu.stages import PREFLIGHT, STAGES, Stage

RUNNING, DONE = "running", "done"
MAX_TRIES = 2
SCRATCH = "scratch"  # beside the folders of the stages, and empty between them


class Stopped(BaseException):
    """A signal asked this process to end."""


class Session:
    def __init__(
        self,
        out: Path,
        budget: float,
        rehearsal: bool = False,
        stages: tuple[Stage, ...] = STAGES,
        preflight: Stage = PREFLIGHT,
        limits: keeper.Limits | None = None,
    ):
        self.out, self.stages, self.preflight = out, stages, preflight
        self.limits = limits or keeper.Limits(0.0)
        self.start, self.budget = time.monotonic(), budget
        self.state = store.new(rehearsal)
        self.work = out  # until `load`
        self.unwritten = ""  # why a file could not be written
        self.inputs = Inputs(rehearsal)

    def load(self, resume: Path | None) -> None:
        """Go on from the state in --out, or in `resume`, the folder or gpu.json of another call.

        ValueError says which file is not of a call of bench.gpu.
        """
        source = self.out if (self.out / store.STATE).exists() or resume is None else resume
        path = source if source.is_file() else source / store.STATE
        if path.exists() or resume is not None:
            state = store.read(path)
            if state["rehearsal"] != self.state["rehearsal"]:
                kind = "a rehearsal" if state["rehearsal"] else "a GPU's"
                raise ValueError(f"{path} is {kind}, this call is not: give another --out")
            self.state = state
        self.work = store.work_folder(self.state)
        shutil.rmtree(self.work / SCRATCH, ignore_errors=True)  # left by a call that was killed
        if (tar := path.with_name(store.TAR)).exists() and self.state["calls"]:
            store.unpack(tar, self.work)
        self.state["work"] = str(self.work)
        for name, entry in self.state["stages"].items():
            if entry.get("ended") == RUNNING:
                self._finish(name, entry, "cut off: the call was killed")

    def save(self) -> None:
        """Write all four files. On a full disk large files are deleted, never the state."""
        self.unwritten = ""
        while True:
            try:
                # the small files first: packing the tar takes longest
                store.write(self.out / store.STATE, store.dumps(self.state))
                store.write(self.out / store.TABLE, (self.table() + "\n").encode())
                if tuned := self._tuned():
                    store.write(self.out / store.TUNED, store.dumps(tuned))
                if left_out := store.pack(self.work, self.out / store.TAR):
                    self.state["left_out"] += left_out
                    store.write(self.out / store.STATE, store.dumps(self.state))
                return
            except OSError as error:
                if not self._drop_largest():
                    self.unwritten = f"{self.out} could not be written: {error}"
                    print(self.unwritten, file=sys.stderr, flush=True)
                    return

    def _drop_largest(self) -> bool:
        files = [path for path in self.work.rglob("*") if path.is_file()]
        files = [path for path in files if "records" not in path.parts]
        largest = max(files, key=lambda path: path.lstat().st_size, default=None)
        if largest is None or largest.lstat().st_size < 2**20:
            return False
        largest.unlink()
        return True

    def _tuned(self) -> dict[str, Any] | None:
        tunings = [entry.get("results", {}).get("tuned") for entry in self.state["stages"].values()]
        return next((tuned for tuned in tunings if tuned), None)

    def table(self) -> str:
        return table.table(self.state, self.stages, self.left_out)

    def left(self) -> float:
        """Seconds left for stages, without those kept for packing."""
        return self.budget - min(10.0, 0.05 * self.budget) - (time.monotonic() - self.start)

    def left_out(self, stage: Stage) -> str:
        """Why a stage cannot run on this machine, or ""."""
        if stage.gpu and self.state["rehearsal"]:
            return "needs a GPU"
        if stage.needs and stage.needs not in self.inputs.carried():
            return f"no {stage.needs} was carried in .local"
        return ""

    def next(self) -> Stage | None:
        """The first stage never tried that fits into the time left; then those that failed once."""
        possible = [stage for stage in self.stages if not self.left_out(stage)]
        entries = self.state["stages"]
        untried = [stage for stage in possible if stage.name not in entries]
        if any(not stage.last for stage in untried):
            untried = [stage for stage in untried if not stage.last]
        again = [
            stage for stage in possible if stage.name in entries
            and not entries[stage.name].get("done") and entries[stage.name]["tries"] < MAX_TRIES
        ]  # fmt: skip
        fits = (stage for stage in untried or again if stage.least <= self.left())
        return next(fits, None)

    def call(self, only: list[Stage]) -> int:
        """Run the stages -> exit code. The state's last call says what ended it early."""
        this: dict[str, Any] = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "budget": self.budget}
        this["ended"] = RUNNING
        self.state["calls"].append(this)
        try:
            with _signals():
                this["ended"] = self._stages(only)
        except Stopped as stopped:
            this["ended"] = f"interrupted by {stopped}"
        finally:
            this["seconds"] = round(time.monotonic() - self.start, 1)
            for name, entry in self.state["stages"].items():
                if entry["ended"] == RUNNING:  # the signal came between two lines of `run`
                    self._finish(name, entry, "interrupted")
            self.save()
            self.inputs.forget()
            if not self.unwritten:
                shutil.rmtree(self.work, ignore_errors=True)
            print(f"\n{self.table()}", flush=True)
        return 0 if this["ended"] == DONE and not self.unwritten else 1

    def _stages(self, only: list[Stage]) -> str:
        self.save()
        if why := self._preflight():
            return f"preflight: {why}"
        stages: Iterator[Stage] = iter(only) if only else iter(self.next, None)
        for stage in stages:
            healthy = self.run(stage)
            if not healthy and (why := self._preflight("--only kernel")):
                return f"the device no longer answers after {stage.name}: {why}"
        return DONE

    def _preflight(self, more: str = "") -> str:
        """Why fastgpt's kernels would not run here, or "". One that ran out of time may have waited
        for a cold disk: it is tried once more."""
        stage = Stage("preflight", f"{self.preflight.command} {more}", self.preflight.seconds, 0)
        for _ in range(2):
            shutil.rmtree(stage.out(self.work), ignore_errors=True)
            outcome = self._run(stage, stage.seconds)
            result = results.collect(stage.out(self.work))
            if outcome.how != "out of time":
                break
        checks = [row for row in result.get("rows", []) if "check" in row]
        refused = [str(row.get("why")) for row in checks if row.get("ok") is False]
        why = ""
        if refused or (outcome.how, outcome.code) != ("exited", 0):
            why = refused[0] if refused else f"{_words(outcome)}; {' / '.join(result['last'])}"
        if not more:
            self.state["preflight"] = {"why": why, "seconds": outcome.seconds, "checks": checks}
        return why

    def run(self, stage: Stage) -> bool:
        """Run a stage -> whether it ended by itself; if not, the device may be unusable."""
        entries = self.state["stages"]
        before = entries.get(stage.name, {"tries": 0})
        entry = entries[stage.name] = {
            "tries": before["tries"] + 1,
            "ended": RUNNING,
            "done": False,
        }
        entry |= {"device": self.device(), "results": before.get("results", {})}
        self.save()
        seconds = max(1.0, min(stage.seconds, self.left()))
        print(f"{stage.name}: at most {seconds:.0f} s, {self.left():.0f} s are left", flush=True)
        began = time.monotonic()
        ended = "interrupted"
        outcome = None
        try:
            outcome = self._run(stage, seconds)
            ended = _words(outcome)
            if outcome.how == "exited" and outcome.code in stage.fine:
                entry["done"], ended = True, DONE
        finally:
            entry["seconds"] = round(time.monotonic() - began, 1)
            self._finish(stage.name, entry, ended)
            self.save()
        print(f"{stage.name}: {entry['ended']}, {entry['seconds']:.0f} s", flush=True)
        return outcome.how == "exited" and not outcome.left

    def _finish(self, name: str, entry: dict[str, Any], ended: str) -> None:
        """Record how a stage ended, with the results that it had written by then."""
        folder = self.work / name
        notes = store.tidy(folder) if folder.is_dir() else []
        result = results.collect(folder)
        if ended == DONE and not results.wrote_something(result):
            entry["done"], ended = False, "ended without a result"
        result = results.joined(entry.get("results", {}), result)
        entry |= {"ended": ended, "results": result, "notes": notes}

    def _run(self, stage: Stage, seconds: float) -> keeper.Outcome:
        folder = stage.out(self.work)
        folder.mkdir(parents=True, exist_ok=True)
        scratch = self.work / SCRATCH
        scratch.mkdir()
        try:
            values = self.inputs.values() | {"out": folder, "seconds": int(0.85 * seconds)}
            limits = self.limits._replace(seconds=seconds)
            env = self.inputs.environment() | {
                "TMPDIR": str(scratch),
                "XDG_CACHE_HOME": f"{folder}/cache",
            }
            log = folder / results.LOG
            return keeper.run(stage.argv(values), log, [folder, scratch], limits, ROOT, env)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def device(self) -> str:
        checks = {row["check"]: row for row in self.state["preflight"].get("checks", [])}
        return str(checks.get("device", {}).get("device", "unknown device"))


def _words(outcome: keeper.Outcome) -> str:
    """How a stage ended, as the table says it."""
    text = {
        "exited": f"exit {outcome.code}",
        "signal": f"killed by {_signal(outcome.code)}",
        "out of time": f"out of time after {outcome.seconds:.0f} s",
        "disk": "stopped: it filled the disk",
        "interrupted": "interrupted",
        "not started": f"could not be started (errno {outcome.code})",
        "lost": "lost: its keeper was killed",
    }.get(outcome.how, outcome.how)
    if outcome.how == "signal" and outcome.code == signal.SIGKILL:
        text += " (out of memory?)"
    if outcome.left:
        text += f"; processes {outcome.left} outlive SIGKILL"
    return text


def _signal(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """The first signal raises Stopped; later ones are ignored while files are written."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def stop(number: int, frame: object) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(_signal(number))

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except Stopped:
        raise  # signals stay ignored
    else:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(
    session: Session, only: list[Stage], resume: Path | None, say: Callable[[str], object]
) -> int:
    """Load the state and run the stages -> exit code. `say` gets the message of a bad argument."""
    try:
        session.out.mkdir(parents=True, exist_ok=True)
        session.load(resume)
    except (ValueError, OSError) as error:
        say(str(error))
        return 2
    keeper.become_subreaper()
    return session.call(only)
