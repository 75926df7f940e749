"""bench.gpu over stages that hang, fault, fill the disk and write garbage."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench.gpu import keeper, results, session, stages, store, table

ROOT = Path(__file__).parents[2]
FILES = {store.STATE, store.TABLE, store.TAR}


def start(*words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.bench.gpu_driver", *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def call(out: Path, budget: float, *words: object, code: int = 0) -> dict:
    """The state after one call over stub stages, and what holds after every call."""
    driver = start(out, budget, *words)
    said, _ = driver.communicate(timeout=100)
    assert driver.returncode == code, said
    assert not alive(out)
    shown = (out / store.TABLE).read_text()
    assert said.endswith(shown) and {path.name for path in out.iterdir()} == FILES
    lines = shown.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100 and all(map(str.isprintable, lines))
    state = store.read(out / store.STATE)
    return state | {"table": shown, "said": said}


def alive(out: Path) -> list[str]:
    """Processes with this folder, or the session's work folder, in their command line."""
    folders = [str(out).encode()]
    if (out / store.STATE).exists():
        folders.append(store.read(out / store.STATE).get("work", str(out)).encode())
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if any(folder in line for folder in folders) and str(os.getpid()) != path.parent.name:
            found.append(line.decode())
    return found


def ended(state: dict) -> dict[str, str]:
    return {name: entry["ended"] for name, entry in state["stages"].items()}


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def line(state: dict, name: str) -> str:
    return next(text for text in state["table"].splitlines() if text.startswith(f"{name} "))


@pytest.fixture(scope="module")
def wrecked(tmp_path_factory) -> dict:
    words = "hang orphan fault memory killed keeper garbage fill silent once failed_test ok"
    return call(tmp_path_factory.mktemp("wreck") / "out", 90, *words.split())


ENDS = {
    "hang": "out of time after",
    "orphan": "done",
    "fault": "killed by SIGSEGV",
    "memory": "exit 1",
    "killed": "killed by SIGKILL (out of memory?)",
    "keeper": "lost",
    "garbage": "done",
    "fill": "stopped: it filled the disk",
    "silent": "ended without a result",
    "once": "done",
    "failed_test": "done",
    "ok": "done",
}


@pytest.mark.parametrize("name", ENDS)
def test_the_table_says_what_happened(wrecked, name):
    assert ended(wrecked)[name].startswith(ENDS[name])
    assert ENDS[name] in line(wrecked, name)


def test_what_was_written_before_the_end_counts(wrecked):
    for name in ("hang", "fault", "fill", "orphan", "ok"):
        assert [r["microseconds"] for r in wrecked["stages"][name]["results"]["rows"]] == [28.0]
    assert "MemoryError" in line(wrecked, "memory")


def test_what_failed_is_tried_once_more_after_all_others(wrecked):
    tries = {name: entry["tries"] for name, entry in wrecked["stages"].items()}
    again = {"hang", "fault", "memory", "killed", "keeper", "fill", "silent", "once"}
    assert {name for name, n in tries.items() if n == 2} == again and max(tries.values()) == 2
    order = [text.split(":")[0] for text in wrecked["said"].splitlines() if ": at most" in text]
    assert order.index("ok") < len(order) - 1 - order[::-1].index("hang")


def test_a_failed_ops_rows_are_flagged_and_kept(wrecked):
    assert "!fwd 28 us" in line(wrecked, "ok")
    assert "test_real_sizes[layer_norm] (seed 17)" in wrecked["table"]
    doubts = results.flags(wrecked)
    assert doubts == {"layer_norm": "tests/gpu/test_ops.py::test_real_sizes[layer_norm]"}
    rows = {
        ("layer_norm", "fastgpt"): True, ("layer_norm", "eager"): False, ("mlp", "fastgpt"): False,
        (None, "fastgpt-step"): True, (None, "nanogpt"): False,
    }  # fmt: skip
    for (op, variant), doubted in rows.items():
        row = {"variant": variant} | ({"op": op} if op else {})
        assert bool(results.flagged(row, doubts)) == doubted


def test_a_call_goes_on_where_the_last_one_stopped(tmp_path):
    out = tmp_path / "out"
    first = call(out, 3.5, "hang", "own=ok+", "ok")
    assert set(ended(first)) == {"hang"}  # no time was left for ok, and ours comes after it
    second = call(out, 20, "hang", "own=ok+", "ok")
    assert list(ended(second)) == ["hang", "ok", "own"] and len(second["calls"]) == 2
    assert second["stages"]["hang"]["tries"] == 2
    third = call(out, 20, "hang", "own=ok+", "ok")
    assert third["stages"] == second["stages"] and "at most" not in third["said"]


@pytest.mark.parametrize("what", ["folder", "gpu.json"])
def test_a_call_goes_on_from_files_that_came_from_elsewhere(tmp_path, what):
    first = call(tmp_path / "there", 20, "ok", "once")
    carried = tmp_path / "there" / ("" if what == "folder" else store.STATE)
    state = json.loads((tmp_path / "there" / store.STATE).read_text())
    (tmp_path / "there" / store.STATE).write_text(json.dumps(state | {"work": "/nowhere"}))
    second = call(tmp_path / "here", 20, "--resume", carried, "ok", "once", "orphan")
    assert list(ended(second)) == ["ok", "once", "orphan"]
    assert second["stages"]["ok"] == first["stages"]["ok"]
    with tarfile.open(tmp_path / "here" / store.TAR) as tar:
        assert {"ok/log.txt", "orphan/log.txt"} <= set(tar.getnames())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_call_leaves_the_files_and_no_process(tmp_path, number):
    out = tmp_path / "out"
    driver = start(out, 60, "ok", "hang")
    wait_for(lambda: len([p for p in alive(out) if "signal.SIG_IGN" in p]) == 1)  # its grandchild
    time.sleep(0.5)
    driver.send_signal(number)
    driver.send_signal(number)  # impatient
    said, _ = driver.communicate(timeout=20)
    assert driver.returncode == 1 and not alive(out)
    state = store.read(out / store.STATE)
    assert ended(state) == {"ok": "done", "hang": "interrupted"}
    assert state["stages"]["hang"]["results"]["rows"] and number.name in said
    assert (out / store.TABLE).read_text() in said


def test_a_killed_driver_leaves_no_process_and_the_next_goes_on(tmp_path):
    out = tmp_path / "out"
    driver = start(out, 60, "ok", "hang", "orphan")
    wait_for(lambda: len([p for p in alive(out) if "signal.SIG_IGN" in p]) == 1)  # its grandchild
    driver.kill()
    driver.communicate()
    wait_for(lambda: not alive(out))
    assert ended(store.read(out / store.STATE)) == {"ok": "done", "hang": "running"}
    state = call(out, 20, "ok", "hang", "orphan")
    assert list(ended(state)) == ["ok", "hang", "orphan"] and state["stages"]["hang"]["tries"] == 2


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_the_state_is_whole_whenever_the_driver_is_killed(tmp_path, delay):
    out = tmp_path / "out"
    driver = start(out, 60, "ok", "orphan", "silent", "a=ok", "b=ok")
    wait_for(lambda: (out / store.STATE).exists())
    time.sleep(delay)
    driver.kill()
    driver.communicate()
    wait_for(lambda: not alive(out))
    store.read(out / store.STATE)
    state = call(out, 30, "ok", "orphan", "silent", "a=ok", "b=ok")
    assert set(ended(state)) == {"ok", "orphan", "silent", "a", "b"}


def test_without_our_kernels_nothing_is_measured(tmp_path):
    state = call(tmp_path / "out", 20, "preflight=refused", "ok", code=1)
    assert not state["stages"] and "STOP: no C compiler" in state["table"]
    state = call(tmp_path / "out", 20, "ok")  # which is no reason not to go on
    assert ended(state) == {"ok": "done"} and "STOP" not in state["table"]
    state = call(tmp_path / "hung", 20, "preflight=hang", "ok", code=1)
    assert "STOP: out of time" in state["table"]


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"kit": 1}', '{"kit": 2, "stages": []}', "\0"]
)
def test_a_state_that_is_none_is_refused_and_stays(tmp_path, content):
    (tmp_path / store.STATE).write_text(content)
    driver = start(tmp_path, 5, "ok")
    said, _ = driver.communicate(timeout=20)
    assert driver.returncode == 2 and f"{tmp_path / store.STATE} is no state" in said
    assert (tmp_path / store.STATE).read_text() == content


def test_a_full_disk_costs_what_is_large(tmp_path, monkeypatch, capsys):
    one = session.Session(tmp_path, 10, True)
    one.load(None)
    (one.work / "stage/records").mkdir(parents=True)
    (one.work / "stage/records/small.json").write_text("{}")
    (one.work / "stage/large").write_bytes(bytes(2 * 2**20))
    real = store.write

    def write(path: Path, content: bytes) -> None:
        if (one.work / "stage/large").exists() or len(content) > limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    limit = 2**20
    monkeypatch.setattr(store, "write", write)
    one.save()
    assert not one.unwritten and (one.work / "stage/records/small.json").exists()
    assert store.read(tmp_path / store.STATE)
    limit = 10
    one.save()
    assert "No space left" in one.unwritten and "No space left" in capsys.readouterr().err
    assert store.read(tmp_path / store.STATE)  # the old one
    shutil.rmtree(one.work)


def test_the_tar_is_kept_small_by_leaving_out_profiles_first(tmp_path):
    work = tmp_path / "work"
    sizes = {"profile-a/trace.json.gz": 3000, "profile-b/trace.json.gz": 2000, "x/log.txt": 4000,
             "x/records/r.json": 5000}  # fmt: skip
    for name, size in sizes.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(os.urandom(size))
    assert store.pack(work, tmp_path / "t", 13_000) == ["profile-a/trace.json.gz"]
    left_out = store.pack(work, tmp_path / "t", 6_000)
    assert left_out == ["profile-b/trace.json.gz", "x/log.txt"]
    assert [name for name, _ in store.members(tmp_path / "t")] == ["x/records/r.json"]


def test_the_table_fits_a_screen_whatever_is_in_it():
    entry = {"tries": 2, "ended": "done " * 40, "done": True, "seconds": 1.0, "notes": ["n" * 300]}
    rows = [{"variant": f"v{i}", "tokens_per_second": 1e6} for i in range(30)]
    entry["results"] = {"records": [{"bench": "train", "rows": rows}], "last": ["x"]}
    state = store.new(False) | {"stages": {stage.name: dict(entry) for stage in stages.STAGES}}
    lines = table.table(state, stages.STAGES, lambda stage: "").splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    for stage in stages.STAGES:
        assert any(text.startswith(f"{stage.name} ") for text in lines)


def test_an_unknown_stage_is_refused_with_the_names_there_are(capsys):
    from bench.gpu.__main__ import main

    with pytest.raises(SystemExit):
        main(["--only", "gemm", "trane"])
    said = capsys.readouterr().err
    assert "no stage trane" in said and all(stage.name in said for stage in stages.STAGES)
    for wrong in (["--budget", "0"], ["--budget", "nan"], ["--resume", "/nowhere"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert wrong[1] in capsys.readouterr().err


def test_the_keeper_takes_in_what_a_command_prints_last(tmp_path):
    code = "import sys; sys.stdout.write('a' * 5_000_000 + 'the end')"
    command = [sys.executable, "-c", code]
    limits = keeper.Limits(20.0, min_free=0)
    outcome = keeper.run(command, tmp_path / "log", [tmp_path], limits, tmp_path, dict(os.environ))
    assert outcome[:2] == ("exited", 0)
    text = (tmp_path / "log").read_text()
    assert text.startswith("aaa") and text.endswith("the end") and len(text) < 2**23
    outcome = keeper.run(["/nowhere"], tmp_path / "l", [tmp_path], limits, tmp_path, {})
    assert outcome.how == "not started"
