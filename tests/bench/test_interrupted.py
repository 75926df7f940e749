"""bench.train where a variant ends it, fails late, or takes the device with it."""

import itertools
import json
from pathlib import Path

import pytest

from bench import train
from bench.harness import machine, memory_budget, record, training_record, training_variant
from bench.peers import training

SHORT = ["--size", "char", "--device", "cpu", "--dtype", "float32"]
SHORT += ["--batch-size", "2", "--block-size", "16", "--rounds", "2", "--steps", "2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(train, "matmul_ceiling", lambda device, dtype: 1e12)
    monkeypatch.setattr(machine, "check", lambda **_: {"load": 0.0, "busy": 0.0, "spread": 0.0})


def bench(out: Path, variants: str) -> dict:
    """The record of one run."""
    assert train.main([*SHORT, "--variants", *variants.split(), "--out", str(out / "out")]) == 0
    (path,) = out.glob("out/*/train-*.json")
    return record.load(path)


STEPS_BEFORE = {"first steps": 0, "first round": 5}


@pytest.mark.parametrize("when", STEPS_BEFORE)
@pytest.mark.parametrize("together", [True, False], ids=["in turns", "one at a time"])
def test_what_ends_the_process_leaves_what_was_measured_before(
    tmp_path, monkeypatch, when, together
):
    """The process is not ended here, but the record is read as if it had been."""

    class Ended(BaseException):
        pass

    def ends(run):
        right, count = training.VARIANTS["eager"](run), itertools.count()

        def step(x, y):
            if next(count) == STEPS_BEFORE[when]:
                raise Ended
            return right(x, y)

        return step

    if not together:
        monkeypatch.setattr(memory_budget, "all_at_once", lambda *_: False)
    monkeypatch.setitem(training.VARIANTS, "hf", ends)
    with pytest.raises(Ended):
        bench(tmp_path, "eager fastgpt hf liger")
    (path,) = tmp_path.glob("out/*/train-*.json")
    eager, ours, ended, never = json.loads(path.read_text())["rows"]
    assert len(eager["seconds"]) == len(ours["seconds"]) == 1 and ours["over_eager"] > 0
    assert ours["loss_gap"] < 1e-3
    assert ("timed in one round only" in ours.get("flag", "")) == together  # no round was whole
    if together and when == "first round":
        assert len(ended["seconds"]) == 1 and never["problem"] == "Liger's kernels need a GPU"
    else:
        assert ended["problem"] == never["problem"] == training_record.UNTIMED


def test_a_variant_that_fails_late_keeps_its_time(tmp_path, monkeypatch):
    def fails(run):
        right, count = training.VARIANTS["eager"](run), itertools.count()

        def step(x, y):
            if next(count) == 8:
                raise RuntimeError("out of luck")
            return right(x, y)

        return step

    monkeypatch.setitem(training.VARIANTS, "hf", fails)
    eager, failed, ours = bench(tmp_path, "eager hf fastgpt")["rows"]
    assert "it stopped early: RuntimeError: out of luck" in failed["flag"]
    assert len(failed["seconds"]) == 1 and failed["over_eager"] > 0
    assert len(eager["seconds"]) == len(ours["seconds"]) == 2


def test_after_a_lost_device_a_new_process_runs_the_rest(tmp_path, monkeypatch):
    def faults(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    started = []
    with monkeypatch.context() as patch:
        patch.setitem(training.VARIANTS, "hf", faults)
        patch.setattr(training_variant, "_free", faults)  # as whatever else asks for the device
        patch.setattr(train, "_in_a_new_process", lambda *args: started.append(args))
        eager, faulty, ours = bench(tmp_path, "eager hf fastgpt")["rows"]
    assert "seconds" in eager and "illegal memory access" in faulty["problem"]
    assert ours["problem"] == training_record.UNTIMED
    ((settings, args, variants),) = started
    assert variants == ["eager", "fastgpt"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train._in_a_new_process(settings, args, variants)
    rows = [row for p in tmp_path.glob("out/*/train-*.json") for row in record.load(p)["rows"]]
    assert [row["variant"] for row in rows if "seconds" in row].count("fastgpt") == 1


def test_without_eager_there_is_no_second_process(tmp_path, monkeypatch):
    def faults(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(training.VARIANTS, "eager", faults)
    monkeypatch.setattr(training_variant, "_free", faults)
    monkeypatch.delattr(train, "_in_a_new_process")
    eager, ours = bench(tmp_path, "eager fastgpt")["rows"]
    assert "illegal memory access" in eager["problem"]
    assert ours["problem"] == training_record.UNTIMED
