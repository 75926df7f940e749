"""bench.gpu without a GPU: stages that hang, fault and write garbage, toy sizes, and --install."""

import argparse
import errno
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench.gpu import install, keeper, results, session, stages, store, table
from bench.harness import record
from fastgpt import backend

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


class Parsed(Exception):
    """The arguments were understood."""


@pytest.mark.parametrize("sizes", ["REAL", "TOY"])
@pytest.mark.parametrize("stage", [stages.PREFLIGHT, *stages.STAGES], ids=lambda s: s.name)
def test_every_stage_is_a_command_that_exists(stage, sizes, tmp_path, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **more):
        parse(self, *args, **more)
        raise Parsed

    values = getattr(stages, sizes)
    more = {"out": tmp_path / "a folder", "seconds": 60, "data": "data", "compile": "compile"}
    _, _, module, *words = stage.argv(values | more)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def test_our_own_comes_last_and_each_op_is_alone():
    names = [stage.name for stage in stages.STAGES]
    assert names[0] == "suite" and len(names) == len(set(names))
    last = [stage.last for stage in stages.STAGES]
    assert last == sorted(last) and {"own-gemm", "tune"} <= set(names[last.index(True) :])
    with_op = {word for stage in stages.STAGES for word in stage.command.split()}
    assert set(backend.KERNELS) - {"block"} <= with_op  # those have no op to call


@pytest.mark.skipif(os.environ.get("FASTGPT_DEEP") != "1", reason="minutes; make test-deep")
def test_rehearsal_of_everything(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--budget", "1500"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert set(ended(store.read(tmp_path / store.STATE)).values()) == {"done"}, done.stdout


def test_rehearsal_and_then_more_of_it(tmp_path):
    """The real preflight and real stages, at toy sizes; the second call keeps the first's."""
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--out", str(tmp_path), "--only"]
    for only in ("gemm", "adamw"):
        done = subprocess.run([*command, only], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    state = store.read(tmp_path / store.STATE)
    assert ended(state) == {"gemm": "done", "adamw": "done"} and len(state["calls"]) == 2
    assert len(state["stages"]["gemm"]["results"]["rows"]) == 15
    assert "REHEARSAL" in done.stdout and "AdamW, clip and copy" in done.stdout
    with pytest.raises(ValueError, match="is a rehearsal, this call is not"):
        session.Session(tmp_path, 10).load(None)


# -- --install


def train(device: str = "NVIDIA H200", **changes: object) -> dict:
    row = {
        "variant": "fastgpt", "seconds": [0.02, 0.021], "tokens_per_second": 8e5, "over_eager": 2.0,
        "ms": {"p10": 20, "median": 20.5, "p90": 21}, "mfu": 0.5, "of_matmul_ceiling": 0.6,
        "peak_bytes": 10**10, "first_step_seconds": 2.0, "final_loss": 10.9, "attention": "cuDNN",
    }  # fmt: skip
    settings = {"size": "124M", "B": 16, "T": 1024, "dtype": "bfloat16", "rounds": 4, "steps": 10}
    rows = [row | {"variant": "eager", "over_eager": 1.0}, row]
    quiet = {"load": 0.0, "busy": 0.0, "spread": 0.0}
    found = {
        "schema": record.SCHEMA, "bench": "train", "date": "2026-12-01T10:00:00+00:00",
        "environment": {"device": device, "torch": "2.11.0"}, "commit": "a" * 40,
        "settings": settings, "matmul_ceiling": 7e14, "machine": quiet, "rows": rows,
    }  # fmt: skip
    return found | changes


def ops(op: str, variants: tuple[str, ...] = ("eager", "fastgpt")) -> dict:
    row = {
        "op": op, "shape": "s", "direction": "forward", "seconds": [1e-4], "microseconds": 100.0,
        "over_eager": 1.0, "flops": 0.0, "bytes": 1e8, "gigabytes_per_second": 1e3,
        "teraflops_per_second": 0.0, "of_ceiling": 0.3, "rounds": 1,
    }  # fmt: skip
    settings = {"M": 16384, "C": 768, "V": 50304, "dtype": "bfloat16", "only": [op]}
    rows = [row | {"variant": variant} for variant in variants]
    ceilings = {"flops": 7e14, "bandwidth": 4e12, "source": "measured"}
    return train(bench="ops", settings=settings, rows=rows, ceilings=ceilings)


TUNED = {
    "date": "2026-12-01",
    "implementations": {"mlp": "triton", "causal_attention": "cudnn"},
    "configs": {
        "layer_norm_forward 768": {"BLOCK_M": 4, "num_warps": 4},
        "attention_backward 64 bfloat16": [{"BLOCK_M": 64}, {"BLOCK_M": 128}],
    },
}
BAD = {"test": "tests/gpu/test_ops.py::test_real_sizes[layer_norm]", "outcome": "failed"}


def brought_back(folder: Path, *records: object, tuned: object = TUNED, **state: object) -> Path:
    """What GPU sessions leave in a folder."""
    folder.mkdir()
    entries = {
        "suite": {"tries": 1, "ended": "done", "results": {"tests": {"counts": {}, "bad": [BAD]}}},
        "tune": {"tries": 1, "ended": "done", "device": "NVIDIA H200"},
    }
    store.write(folder / store.STATE, store.dumps(store.new(False) | {"stages": entries} | state))
    if tuned is not None:
        text = tuned if isinstance(tuned, str) else json.dumps(tuned)
        (folder / store.TUNED).write_text(text)
    with tarfile.open(folder / store.TAR, "w:gz") as tar:
        for i, found in enumerate(records):
            content = (found if isinstance(found, str) else json.dumps(found)).encode()
            member = tarfile.TarInfo(f"train-b16/records/gpu/{i}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what the kit touches and needs."""
    root = tmp_path_factory.mktemp("tree")
    for folder in ("bench", "docs", "fastgpt", "kernels"):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True,
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    shutil.copy(ROOT / "README.md", root)
    return root


def contents(root: Path) -> dict[Path, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path: path.read_bytes() for path in files}


def as_command(root: Path, folder: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "bench.gpu", "--install", str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


WRONG = {
    "no record": ([], {}, "holds no record"),
    "garbage": (["{"], {}, "0.json is not JSON"),
    "no object": (["[1]"], {}, "0.json is not a record"),
    "another schema": ([train(schema=9)], {}, "0.json is not a record"),
    "a CPU's": ([train("CPU (AMD EPYC)")], {}, "'CPU (AMD EPYC)', which is no GPU"),
    "no device": ([train(environment={})], {}, "None, which is no GPU"),
    "toy": ([train(settings={"size": "char", "B": 2, "T": 16})], {}, "are not a session's"),
    "a row of nothing": ([train(rows=[5])], {}, "names no variant"),
    "NaN": ([train(rows=[{"variant": "x", "seconds": [float("nan")]}])], {}, "not all above 0"),
    "no sense": ([train(rows=[{"variant": "x", "seconds": [1.0]}])], {}, "docs could not be made"),
    "one of two": ([train(), "{"], {}, "1.json is not JSON"),
    "a rehearsal": ([train()], {"rehearsal": True}, "is of a rehearsal"),
    "tuned on a CPU": ([train()], {"stages": {}}, "which is no GPU"),
    "tuned garbage": ([train()], {"tuned": "}"}, "tuned.json is not JSON"),
    "tuned list": ([train()], {"tuned": "[]"}, "is no entry of fastgpt tune"),
    "an op": ([train()], {"tuned": TUNED | {"implementations": {"x": "torch"}}}, "'torch' for 'x'"),
    "a name": ([train()], {"tuned": TUNED | {"implementations": {"mlp": "y"}}}, "'y' for 'mlp'"),
    "a tile": ([train()], {"tuned": TUNED | {"configs": {"k": {"B": "4"}}}}, "of 'k'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_and_nothing_installed(tree, tmp_path, capsys, name):
    records, state, why = WRONG[name]
    before = contents(tree)
    code = install.main(brought_back(tmp_path / "in", *records, **state), tree)
    assert code in (1, 2) and why in (said := capsys.readouterr().err), said
    assert contents(tree) == before


@pytest.mark.parametrize("missing", [store.STATE, store.TAR])
def test_a_missing_or_torn_file_is_named(tree, tmp_path, capsys, missing):
    folder = brought_back(tmp_path / "in", train())
    whole = (folder / missing).read_bytes()
    for content in (None, whole[: len(whole) // 2], b"garbage"):
        (folder / missing).unlink(missing_ok=True)
        if content is not None:
            (folder / missing).write_bytes(content)
        before = contents(tree)
        assert install.main(folder, tree) == 2
        assert str(folder / missing) in capsys.readouterr().err
        assert contents(tree) == before


def test_a_tar_that_reaches_out_is_refused(tmp_path):
    for name in ("../x", "/x"):
        with tarfile.open(tmp_path / "t", "w:gz") as tar:
            tar.addfile(tarfile.TarInfo(name))
        with pytest.raises(ValueError, match="which no session writes"):
            list(store.members(tmp_path / "t"))


def test_records_tables_and_docs_are_put_in_their_places(tree, tmp_path):
    short = train(date="2026-12-01T11:00:00+00:00")
    short["rows"] = short["rows"][:1] + [{"variant": "fastgpt", "problem": "cut off"}]
    records = [train(), short, ops("layer_norm"), ops("mlp"), ops("mlp", ("eager", "own GEMM"))]
    code, said = as_command(tree, brought_back(tmp_path / "in", *records))
    assert code == 0, said
    trained, of_ops = (
        json.loads(next((tree / "bench/results/nvidia-h200").glob(f"{bench}-*")).read_text())
        for bench in ("train", "ops")
    )
    assert trained["date"] == train()["date"]  # that with more times
    assert trained["rows"][1]["flag"].endswith("test_real_sizes[layer_norm]")
    found = [(row["op"], row["variant"], "flag" in row) for row in of_ops["rows"]]
    assert found == [
        ("layer_norm", "eager", False), ("layer_norm", "fastgpt", True), ("mlp", "eager", False),
        ("mlp", "fastgpt", False), ("mlp", "own GEMM", False),
    ]  # fmt: skip
    assert "only" not in of_ops["settings"]
    assert json.loads((tree / "kernels/tuned.json").read_text()) == {"NVIDIA H200": TUNED}
    code = "from fastgpt.kernels import _tuned; print(_tuned.entry('NVIDIA H200')['date'])"
    read = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert read.stdout == "2026-12-01\n", read.stderr
    readme = (tree / "README.md").read_text()
    assert "| NVIDIA H200 | 2026-12-01 |" in readme
    text = (tree / "docs/performance.md").read_text()
    assert "## NVIDIA H200" in text and "the GPU suite failed" in text
    before = contents(tree)
    assert install.main(tmp_path / "in", tree) == 0 and contents(tree) == before  # once more


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
