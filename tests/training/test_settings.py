"""What a resumed run keeps, what it starts from, how the rate falls, and what is told of it."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import GPT, GPTConfig, checkpoint, cli
from fastgpt.commands.prepare import prepare
from fastgpt.training.config import TrainConfig
from fastgpt.training.progress import clock
from fastgpt.training.schedule import learning_rate
from fastgpt.training.trainer import Trainer
from tests.marks import slow
from tests.training.runs import ROOT, SMALL, finished, losses, prepared, start


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with data/ and out/, a run of six steps."""
    folder = tmp_path_factory.mktemp("run")
    prepared(folder / "data")
    more = "--steps 6 --eval-every 2 --keep 2 --lr 2e-3 --seed 5"
    argv = ["train", "--data", f"{folder}/data", "--out", f"{folder}/out", *SMALL.split()]
    assert cli.main([*argv, *more.split()]) == 0
    return folder


def saved_settings(folder: Path) -> dict:
    return checkpoint.load_checkpoint(folder / "out/ckpt.pt")["config"]


def test_resume_restores_the_settings_and_reports_changes(run, capsys):
    assert cli.main(["train", "--out", f"{run}/out", "--resume", "--steps=8", "--min_lr=0"]) == 0
    said = capsys.readouterr().out
    assert "--steps: 6 before, 8 from now on" in said
    assert "--min-lr: 0.0001 before, 0.0 from now on" in said and said.count("from now on") == 2
    found = saved_settings(run)
    assert (found["lr"], found["seed"], found["n_embd"], found["steps"]) == (2e-3, 5, 16, 8)
    steps = [step for step, name in losses(run / "out") if name == "loss"]
    assert steps == list(range(1, 9))  # the history is kept


def test_resume_refuses_another_shape_and_another_vocabulary(run, tmp_path, capsys):
    resume = ["train", "--out", f"{run}/out", "--resume"]
    assert cli.main([*resume, "--n-layer", "3"]) == 2
    assert "n_layer=3, but the checkpoint's model has n_layer=2" in capsys.readouterr().err
    other = "".join(chr(65 + i * i % 23) for i in range(3000))  # as many other characters
    prepare(other, tmp_path)
    assert cli.main([*resume, "--data", str(tmp_path)]) == 2
    assert "another vocabulary of 12 characters" in capsys.readouterr().err


def test_latest_best_and_numbered(run):
    out = run / "out"
    assert len(list(out.glob("ckpt-*.pt"))) == 2
    found = losses(out)
    best = checkpoint.load_checkpoint(out / "best.pt")
    measured = {s: loss for (s, name), loss in found.items() if name == "val_loss" and s > 0}
    assert best["best_val_loss"] == min(measured.values()) == measured[best["iter_num"]]


def test_starts_from_a_checkpoint_or_a_hugging_face_folder(run, tmp_path, capsys):
    sources = [run / "out/best.pt"]
    if pytest.importorskip("transformers", reason="Hugging Face's folders need transformers"):
        assert cli.main(["convert", str(sources[0]), f"{tmp_path}/hf"]) == 0
        sources.append(tmp_path / "hf")
    base = ["train", "--data", f"{run}/data", "--device", "cpu", "--steps", "1", "--eval-iters=1"]
    for source in sources:
        out = tmp_path / f"from-{source.name}"
        argv = [*base, "--out", str(out), "--init-from", str(source), "--block-size", "4"]
        assert cli.main([*argv, "--lr", "1e-9"]) == 0
        found = checkpoint.load_checkpoint(out / "ckpt.pt")
        assert found["model_args"]["block_size"] == 4  # cropped
        expected = checkpoint.load_checkpoint(sources[0])["model"]
        for name in ("transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"):
            torch.testing.assert_close(found["model"][name], expected[name], rtol=0, atol=1e-6)
        capsys.readouterr()
        assert cli.main([*argv, "--force", "--n-layer", "3"]) == 2
        assert "--n-layer 3, but" in capsys.readouterr().err
    prepare("0123456789" * 30, tmp_path / "digits")
    argv = ["train", "--data", f"{tmp_path}/digits", "--init-from", str(sources[0])]
    assert cli.main([*argv, "--out", f"{tmp_path}/x"]) == 2
    assert "vocabulary" in capsys.readouterr().err


def test_schedules():
    config = TrainConfig(data="data", steps=100, warmup=10, lr=1.0, min_lr=0.1)

    def rates(**changes) -> list[float]:
        changed = TrainConfig(**{**vars(config), **changes})
        return [learning_rate(changed, step, step / changed.steps) for step in range(121)]

    cosine = rates()
    assert cosine[0] == pytest.approx(1 / 11) and cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.55) and cosine[100] == cosine[120] == 0.1
    assert rates(lr_decay_steps=50)[50] == 0.1 and rates(schedule="constant")[120] == 1.0
    late = rates(schedule="constant-then-decay", decay_fraction=0.5)
    assert late[54] == 1.0 and late[100] == 0.1
    assert late[77] == pytest.approx(0.1 + 0.9 * (1 - (77 - 10) / 90) / 0.5)


def test_the_clock():
    assert [clock(s) for s in (0, 61, 3599.6, 36000)] == [
        "0:00:00",
        "0:01:01",
        "1:00:00",
        "10:00:00",
    ]


@pytest.mark.parametrize("columns", [20, slow(200)])
def test_the_line_fits_the_terminal(run, tmp_path, columns):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    argv = ["-m", "fastgpt", "train", "--data", f"{run}/data", "--out", f"{tmp_path}/out"]
    argv += [*SMALL.split(), "--steps", "5"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *argv], stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    said = b""
    while True:
        try:
            said += os.read(controller, 1000)
        except OSError:  # closed at the other end
            break
    assert process.wait() == 0
    drawn = [line for line in re.split(r"[\r\n]", said.decode()) if "step 1  loss" in line]
    assert drawn and all(len(line) <= columns for line in drawn)
    if columns == 200:
        assert re.search(
            r"loss \d\.\d+  ETA \d:\d\d:\d\d  [\d,.k]+ tok/s  lr \S+  [\d.]+ [KMG]?B",
            drawn[0],
        )


def test_other_logs_are_written_by_flag_and_may_fail(run, tmp_path, monkeypatch, capsys):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append(("begun", purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append(("closed", None))

    class Run:
        def log(self, values, step):
            written.append(("wandb", step))

        def finish(self):
            written.append(("finished", None))

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    wandb: Any = types.ModuleType("wandb")
    asked: dict = {}
    wandb.init = lambda **how: asked.update(how) or Run()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    argv = ["train", "--data", f"{run}/data", "--out", str(tmp_path), *SMALL.split()]
    assert cli.main([*argv, "--steps=2", "--tensorboard", "--wandb", "offline"]) == 0
    assert asked["mode"] == "offline" and asked["config"]["steps"] == 2
    assert {("loss", 2), ("val_loss", 2), ("wandb", 2), ("closed", None)} <= set(written)
    assert written[-1] == ("finished", None)
    assert written[0] == ("begun", 0)
    capsys.readouterr()

    def fails(*_, **__):
        raise ConnectionError("no route\nto host")

    Run.log = fails  # type: ignore[method-assign]
    assert cli.main(["train", "--out", str(tmp_path), "--resume", "--steps=3"]) == 0
    err = capsys.readouterr().err
    assert err == "fastgpt: --wandb has ended, training goes on: no route to host\n"
    assert ("begun", 3) in written and written[-1] == ("closed", None)
    assert (3, "loss") in losses(tmp_path)
    wandb.init = fails
    assert cli.main(["train", "--out", str(tmp_path), "--resume", "--steps=4"]) == 2
    said = capsys.readouterr()
    assert said.err == "fastgpt: --wandb cannot begin: no route to host; or leave it out\n"
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main(["train", "--out", str(tmp_path), "--resume", "--steps=4"]) == 2
    said = capsys.readouterr()
    assert "pip install wandb" in said.err and "step 4" not in said.out


def test_eval_only_and_an_old_history(run, tmp_path):
    argv = ("--data", run / "data", "--out", tmp_path, "--eval-only")
    assert "step 0: training loss" in finished(start(*argv))
    assert not (tmp_path / "ckpt.pt").exists()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "settings" in lines[0] and lines[1]["step"] == 0


def test_checkpoints_have_only_nanogpts_fields_in_model_args(tmp_path):
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8, gelu="tanh")
    saved = {"model": GPT(config).state_dict(), "model_args": checkpoint.model_args(config)}
    checkpoint.save_checkpoint(saved, tmp_path / "ckpt.pt")
    stored = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert set(stored["model_args"]) == set(checkpoint.NANOGPT_FIELDS)
    assert checkpoint.load_checkpoint(tmp_path / "ckpt.pt")["model_args"]["gelu"] == "tanh"


@pytest.mark.parametrize(
    "device, size, options, expected",
    [
        ("cuda", 1, {}, True),
        ("cpu", 1, {}, False),
        ("cuda", 2, {}, False),
        ("cuda", 1, {"compile": True}, False),
        ("cuda", 1, {"checkpoint_blocks": True}, False),
    ],
)
def test_a_graph_is_captured_on_one_gpu(device, size, options, expected):
    run = types.SimpleNamespace(
        device=torch.device(device),
        world=types.SimpleNamespace(size=size),
        config=TrainConfig(data="data", **options),
    )
    assert Trainer._may_capture(run) == expected
