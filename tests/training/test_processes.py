"""Runs on several processes (gloo, CPU): the same model, and what a lost process costs."""

import math
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from fastgpt import checkpoint, cli
from fastgpt.training import sharded
from fastgpt.training.trainer import Losses, Trainer
from tests.marks import slow
from tests.training.runs import (
    SMALL,
    assert_same_losses,
    assert_same_model,
    finished,
    losses,
    needs_gloo,
    prepared,
    start,
    wait_for,
)

pytestmark = needs_gloo
SETTINGS = ("--grad-accum", 6, "--steps", 8, "--eval-every", 4)
needs_fsdp_on_cpus = pytest.mark.skipif(
    sharded.problem("cpu") is not None, reason=str(sharded.problem("cpu"))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With data/, and alone/: the run of one process."""
    folder = tmp_path_factory.mktemp("runs")
    prepared(folder / "data")
    finished(start("--data", folder / "data", "--out", folder / "alone", *SETTINGS))
    return folder


@pytest.mark.parametrize("processes", [2, slow(3)])
def test_any_number_of_processes_trains_the_same_model(folder, processes):
    out = folder / f"of-{processes}"
    said = finished(start("--data", folder / "data", "--out", out, *SETTINGS, processes=processes))
    assert_same_losses(out, folder / "alone")
    assert_same_model(out / "ckpt.pt", folder / "alone/ckpt.pt")
    assert said.count("number of parameters") == 1  # one process prints


@pytest.mark.slow
def test_resumes_on_another_number_of_processes(folder):
    out = folder / "resumed"
    shorter = ("--grad-accum", 6, "--eval-every", 4, "--steps", 4, "--lr-decay-steps", 8)
    finished(start("--data", folder / "data", "--out", out, *shorter, processes=2))
    finished(start("--out", out, "--resume", "--steps", 8, processes=3))
    assert_same_losses(out, folder / "alone")
    finished(start("--out", out, "--resume", "--steps", 9))


@pytest.mark.slow
def test_a_number_that_does_not_divide_grad_accum_is_refused(folder):
    process = start("--data", folder / "data", "--out", folder / "odd", *SETTINGS, processes=4)
    said, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "fastgpt: grad_accum=6 micro-batches cannot be shared evenly among 4" in said
    assert said.count("cannot be shared evenly") == 1 and "--grad-accum 8" in said


@pytest.mark.slow
@needs_fsdp_on_cpus
def test_sharded_trains_the_same_model_resumes_and_becomes_one_file(folder, capsys):
    out = folder / "sharded"
    shorter = ("--grad-accum", 6, "--eval-every", 4, "--steps", 4, "--lr-decay-steps", 8)
    finished(start("--data", folder / "data", "--out", out, *shorter, "--shard", processes=2))
    finished(start("--out", out, "--resume", "--steps", 8, processes=3))
    assert_same_losses(out, folder / "alone")
    assert cli.main(["convert", f"{out}/sharded-000008", f"{folder}/one.pt"]) == 0
    assert_same_model(folder / "one.pt", folder / "alone/ckpt.pt")
    one, alone = (torch.load(folder / p)["optimizer"]["state"] for p in ("one.pt", "alone/ckpt.pt"))
    torch.testing.assert_close(one, alone, rtol=0, atol=1e-5)

    saved = checkpoint.load_checkpoint(folder / "one.pt")
    saved["fastgpt"]["run"] = "another"
    checkpoint.save_checkpoint(saved, out / "ckpt.pt")
    assert cli.main(["train", "--out", str(out), "--resume"]) == 2
    assert f"{out}/ckpt.pt is of another run than" in capsys.readouterr().err
    (out / "ckpt.pt").unlink()
    shard = next((out / "sharded-000008").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert cli.main(["convert", f"{out}/sharded-000008", f"{folder}/two.pt"]) == 2
    assert f"{shard} is damaged" in capsys.readouterr().err
    assert not (folder / "two.pt").exists()


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


def in_a_group_of_its_own(monkeypatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", free_port())


def test_a_pytorch_that_cannot_shard_on_cpus_is_refused(folder, monkeypatch, capsys):
    in_a_group_of_its_own(monkeypatch)
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)  # as in PyTorch 2.6
    argv = ["train", "--data", f"{folder}/data", "--out", f"{folder}/no", *SMALL.split()]
    assert cli.main([*argv, "--shard", "--steps=1"]) == 2
    assert f"PyTorch {torch.__version__} needs GPUs" in capsys.readouterr().err


@needs_fsdp_on_cpus
def test_sharded_keeps_the_best_and_nothing_that_is_not_finite(folder, monkeypatch, capsys):
    in_a_group_of_its_own(monkeypatch)
    out, measured = folder / "best", {2: 1.0, 4: 3.0, 6: 2.0}

    def validate(trainer, stop):
        trainer.validated_at = trainer.steps_done
        trainer.losses = Losses(1.0, measured.get(trainer.steps_done, 9.0))
        return trainer.losses

    monkeypatch.setattr(Trainer, "validate", validate)
    argv = ["train", "--data", f"{folder}/data", "--out", str(out), *SMALL.split(), "--shard"]
    assert cli.main([*argv, "--steps=6", "--eval-every=2", "--keep=1"]) == 0
    assert {p.name for p in out.glob("sharded-*")} == {"sharded-000002", "sharded-000006"}
    for flags, step in (["--best"], 2), ([], 6):
        assert cli.main(["convert", str(out), f"{out}/{step}.pt", *flags]) == 0
        assert checkpoint.load_checkpoint(out / f"{step}.pt")["iter_num"] == step
    capsys.readouterr()
    assert cli.main(["sample", "--out", str(out)]) == 2
    assert f"`fastgpt convert {out} {out}/ckpt.pt`" in capsys.readouterr().err

    step = Trainer.train_step

    def diverging(trainer):
        loss = step(trainer)
        next(iter(trainer.step.parts().values())).fill_(math.nan)
        return loss

    monkeypatch.setenv("MASTER_PORT", free_port())
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", diverging)
        assert cli.main(["train", "--out", str(out), "--resume", "--steps=7"]) == 2
    assert "not finite after step 7, which is not saved" in capsys.readouterr().err
    assert {p.name for p in out.glob("sharded-*")} == {"sharded-000002", "sharded-000006"}

    monkeypatch.delenv("RANK")  # a process alone goes on with the one file
    (out / "6.pt").rename(out / "ckpt.pt")
    assert cli.main(["train", "--out", str(out), "--resume", "--steps=7"]) == 0
    assert "--shard: True before, False from now on" in capsys.readouterr().out
    assert cli.main(["train", "--out", str(out), "--resume", "--steps=9", "--shard"]) == 2
    assert f"or older: --no-shard goes on with {out}/ckpt.pt;" in capsys.readouterr().err


def kill(said: str, launcher: int, rank: int) -> int:
    """SIGKILL for one process of a torchrun."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            os.kill(int(pid), signal.SIGKILL)
            return int(pid)
    raise AssertionError(said)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
def test_a_lost_process_is_named_and_costs_nothing(folder):
    out = folder / "lost"
    settings = ("--grad-accum", 6, "--steps", 100_000, "--eval-every", 100_000)
    process = start("--data", folder / "data", "--out", out, *settings, processes=3)
    said = wait_for(process, "step 1 ")
    killed, before = kill(said, process.pid, rank=1), time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - before < 20
    assert process.returncode != 0
    assert f"fastgpt: process 1 (pid {killed} on " in said
    step = int(re.findall(r"step (\d+) is saved", said)[0])
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    assert saved["iter_num"] == step >= 1
    assert len(losses(out)) >= step  # one a step, and those of the validation at step 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
def test_torchruns_restart_goes_on_where_the_lost_run_was(folder):
    out = folder / "elastic"
    settings = ("--grad-accum", 2, "--steps", 300, "--eval-every", 50)
    process = start("--data", folder / "data", "--out", out, *settings, processes=2, restarts=3)
    said = wait_for(process, "step 50: ")
    kill(said, process.pid, rank=1)
    said += finished(process)
    assert said.count("step 50: ") == 1  # not begun anew
    alone = folder / "elastic-alone"
    finished(start("--data", folder / "data", "--out", alone, *settings))
    assert losses(out).keys() == losses(alone).keys()
    assert_same_model(out / "ckpt.pt", alone / "ckpt.pt")
