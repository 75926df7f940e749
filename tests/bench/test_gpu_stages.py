"""The stages of bench.gpu themselves: commands that exist, what they are given, toy sizes."""

import argparse
import importlib
import json
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.gpu import inputs, session, stages, store
from fastgpt import backend
from tests.gpu.__main__ import KERNELS

ROOT = Path(__file__).parents[2]


def test_what_was_carried_is_what_stages_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "CARRIED", tmp_path)
    monkeypatch.delenv("NANOGPT_DIR", raising=False)
    one = inputs.Inputs(False)
    assert one.carried() == {} and one.values()["compile"] == "compile"
    for name in ("nanoGPT/model.py", "data/train.bin", "liger/torn.whl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with zipfile.ZipFile(tmp_path / "liger/liger_kernel-1.whl", "w") as wheel:
        wheel.writestr("liger_kernel/__init__.py", "")
    env = one.environment()
    assert one.values()["compile"] == "nanogpt-compile"
    assert env["NANOGPT_DIR"] == str(tmp_path / "nanoGPT")
    site = Path(env["PYTHONPATH"].split(os.pathsep)[0])
    assert (site / "liger_kernel/__init__.py").exists()
    one.forget()
    assert not site.exists()
    monkeypatch.setenv("NANOGPT_DIR", str(tmp_path / "elsewhere"))
    assert "NANOGPT_DIR" not in one.environment()
    one.forget()


class Parsed(BaseException):  # which no command reports as its own
    """The arguments were understood."""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("sizes", ["REAL", "TOY"])
@pytest.mark.parametrize("stage", [stages.PREFLIGHT, *stages.STAGES], ids=lambda s: s.name)
def test_every_stage_is_a_command_that_exists(stage, sizes, tmp_path, monkeypatch):
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, *args, **more):
        parse(self, *args, **more)
        raise Parsed

    values = getattr(stages, sizes)
    more = {"out": tmp_path / "a folder", "seconds": 60, "data": "data", "compile": "compile"}
    _, _, module, *words = stage.argv(values | more)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def test_our_own_comes_last_and_each_op_is_alone():
    names = [stage.name for stage in stages.STAGES]
    assert names[0] == "suite" and len(names) == len(set(names))
    last = [stage.last for stage in stages.STAGES]
    assert last == sorted(last) and {"own-gemm", "tune"} <= set(names[last.index(True) :])
    ops = {stage.name[3:] for stage in stages.STAGES if stage.name.startswith("op-")}
    assert ops <= set(backend.OPS) and len(ops) >= 8


def test_a_failed_test_of_any_kernel_puts_an_op_in_doubt():
    """Else its times would stand in the table without a mark."""
    files = [importlib.import_module(f"tests.{name.replace('/', '.')}") for name in KERNELS]
    marks = [file.pytestmark for file in files if file.__name__.startswith("tests.kernels.")]
    marked = {op for mark in marks for op in mark.args}
    wholes = {"block", "compiled"}  # their tests are of models
    assert marked == backend.OPS.keys() - wholes


@pytest.mark.skipif(os.environ.get("FASTGPT_DEEP") != "1", reason="minutes; make test-deep")
def test_rehearsal_of_everything(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--budget", "1500"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert set(_ended(store.read(tmp_path / store.STATE)).values()) == {"done"}, done.stdout


@pytest.mark.slow
def test_rehearsal_and_then_more_of_it(tmp_path):
    """The real preflight and real stages, at toy sizes; the second call keeps the first's."""
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--out", str(tmp_path), "--only"]
    for only in ("gemm", "adamw"):
        done = subprocess.run([*command, only], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    state = store.read(tmp_path / store.STATE)
    assert _ended(state) == {"gemm": "done", "adamw": "done"} and len(state["calls"]) == 2
    assert len(state["stages"]["gemm"]["results"]["rows"]) == 15
    assert "REHEARSAL" in done.stdout and "AdamW, clip and copy" in done.stdout
    with pytest.raises(ValueError, match="is a rehearsal, this call is not"):
        session.Session(tmp_path, 10).load(None)


COMPILERS = {  # CC, PATH -> what preflight says
    "none": ("", "/nowhere", "no C compiler: Triton needs gcc or clang on PATH, or CC"),
    "broken": ("false", None, "false cannot build a Python extension"),
    "not there": ("/nowhere/gcc", None, "the C compiler does not work"),
    "no headers": ("gcc -nostdinc", None, "cannot build a Python extension"),
}


@pytest.mark.parametrize("name", COMPILERS)
def test_preflight_tries_the_compiler(tmp_path, name):
    cc, path, why = COMPILERS[name]
    env = {**os.environ, "CC": cc} | ({"PATH": path} if path else {})
    command = [sys.executable, "-m", "bench.gpu.preflight", "--out", str(tmp_path), "--only"]
    done = subprocess.run(
        [*command, "disk", "compiler"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    said = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and not said["ok"] and why in said["why"]


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this machine has a GPU")
def test_preflight_refuses_a_machine_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--budget", "60", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "STOP: torch" in done.stdout and "sees no GPU" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {store.STATE, store.TABLE, store.TAR}


def _ended(state: dict) -> dict[str, str]:
    return {name: entry["ended"] for name, entry in state["stages"].items()}
