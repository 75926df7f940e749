"""Whatever ends a run, the last whole step is kept, as the best one too if it was."""

import os
import time
from pathlib import Path

import pytest
import torch

from fastgpt import checkpoint, cli
from fastgpt.storage import files
from fastgpt.train_step import SkippedSteps
from fastgpt.training.config import TrainConfig
from fastgpt.training.interrupts import Interrupts
from fastgpt.training.log import draw
from fastgpt.training.loop import train
from fastgpt.training.nanogpt import translated
from fastgpt.training.trainer import Trainer
from fastgpt.training.world import World
from tests.training.runs import prepared

ENDS = [MemoryError, RuntimeError, KeyError, AssertionError, ImportError, KeyboardInterrupt]


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(
        data=str(prepared(tmp_path / "data")), out=str(tmp_path / "out"), device="cpu", n_layer=1,
        n_head=1, n_embd=8, block_size=8, batch_size=2, steps=6, eval_every=100, eval_iters=1,
        warmup=1,
    )  # fmt: skip


def changed(config: TrainConfig, **changes) -> TrainConfig:
    return TrainConfig(**vars(config) | changes)


def step_of(path: Path) -> int:
    return checkpoint.load_checkpoint(path)["iter_num"]


def failing_at(step: int, error: type[BaseException], monkeypatch) -> None:
    whole = Trainer.train_step

    def train_step(trainer):
        if trainer.steps_done == step:
            raise error("in the fourth step")
        return whole(trainer)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("error", ENDS, ids=lambda error: error.__name__)
def test_an_error_in_a_step(config, monkeypatch, error):
    failing_at(3, error, monkeypatch)
    with pytest.raises(error, match="in the fourth step"):
        train(config)
    assert step_of(Path(config.out) / "ckpt.pt") == 3


def test_weights_that_may_be_half_updated_are_not_saved(config, monkeypatch):
    whole = torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        if optimizer.state and next(iter(optimizer.state.values()))["step"] == 3:
            raise MemoryError
        return whole(optimizer, *args, **kwargs)

    monkeypatch.setattr("fastgpt.optim.AdamW.step", step)
    with pytest.raises(MemoryError):
        train(changed(config, grad_clip=0.0, eval_every=2))
    assert step_of(Path(config.out) / "ckpt.pt") == 2


def test_weights_that_no_count_is_of_are_not_saved(config, monkeypatch):
    """They were updated, and the step was not counted yet."""
    whole, calls = SkippedSteps.look, []

    def fails(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(SkippedSteps, "look", fails)
    with pytest.raises(KeyboardInterrupt):
        train(changed(config, eval_every=2))
    saved = checkpoint.load_checkpoint(Path(config.out) / "ckpt.pt")
    (steps,) = {int(state["step"]) for state in saved["optimizer"]["state"].values()}
    assert steps == saved["iter_num"] == 2


def test_a_process_without_memory_saves_whatever_its_company(config, monkeypatch):
    whole = Trainer.train_step

    def train_step(trainer):
        if trainer.steps_done == 3:
            trainer.world.size = 2
            raise torch.OutOfMemoryError("in the fourth step")
        return whole(trainer)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(torch.OutOfMemoryError, match="in the fourth step"):
        train(config)
    assert step_of(Path(config.out) / "ckpt.pt") == 3


def test_a_ctrl_c_whose_answer_nobody_reads(monkeypatch):
    def closed(fd, text):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", closed)
    interrupts = Interrupts()
    interrupts._note(2, None)
    assert interrupts.number == 2


def test_a_ctrl_c_in_an_update_waits_for_its_end():
    interrupts = Interrupts()
    interrupts.first = time.monotonic() - 60
    interrupts.updating = lambda: True
    interrupts._note(2, None)
    interrupts.updating = lambda: False
    with pytest.raises(KeyboardInterrupt):
        interrupts._note(2, None)


def test_the_first_ctrl_c_is_answered(capfd):
    Interrupts()._note(2, None)
    assert (
        "stopping after this step; Ctrl-C some seconds from now loses it" in capfd.readouterr().err
    )


def test_the_best_that_a_crash_has_left_out_is_made_at_the_next_start(config):
    train(changed(config, steps=2))
    best, latest = (Path(config.out) / name for name in ("best.pt", "ckpt.pt"))
    older = best.read_bytes()
    train(changed(config, steps=4, lr=1e-2, resume=True))
    assert step_of(best) == 4
    best.write_bytes(older)  # as if the process had been killed in front of the copy
    os.utime(best, ns=(0, latest.stat().st_mtime_ns - 1))
    train(changed(config, steps=5, lr=1e-12, min_lr=0.0, resume=True, eval_every=1000))
    assert step_of(best) in (4, 5)


def test_a_copy_that_fails_is_made_at_the_next_save(config, monkeypatch):
    copy, calls = files.copy, []

    def fails_once(source, target):
        calls.append(target)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(files, "copy", fails_once)
    with pytest.raises(OSError, match="No space left"):
        train(changed(config, steps=2))
    assert step_of(Path(config.out) / "best.pt") == 2


def test_a_folder_moved_away_is_not_mistaken_for_another(config, tmp_path, monkeypatch):
    """Whoever has its name by now keeps what is there."""
    out, whole = Path(config.out), Trainer.train_step

    def train_step(trainer):
        if trainer.steps_done == 3 and not (tmp_path / "moved").exists():
            out.rename(tmp_path / "moved")
            out.mkdir()
            (out / ".lock").write_text("another run")
            (out / "ckpt.pt").write_text("its checkpoint")
        return whole(trainer)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(
        OSError, match=r"is another folder than at the start.*move the first one back"
    ):
        train(config)
    assert (out / "ckpt.pt").read_text() == "its checkpoint"


@pytest.mark.parametrize("line", ['{"step": 5, "loss": "x"}', '{"step": 5, "val_loss": null}'])
def test_loss_curves_of_a_damaged_log(tmp_path, line):
    pytest.importorskip("matplotlib")
    log = tmp_path / "log.jsonl"
    log.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n')
    assert draw(log, tmp_path / "loss.png").startswith("loss curves: ")


def test_a_plot_that_fails_is_told_and_no_more(tmp_path, monkeypatch):
    def fails(*args):
        raise ValueError("Key backend: 'x' is not a valid value\nfor backend")

    monkeypatch.setattr("fastgpt.training.log._plot", fails)
    said = draw(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert said == "no loss curves: Key backend: 'x' is not a valid value"


def test_nanogpts_switches_turn_off_and_on():
    """Over a config file, or a saved run, that says otherwise."""
    assert translated("decay_lr", True) == {"schedule": "cosine"}
    assert translated("decay_lr", False) == {"schedule": "constant"}
    assert translated("wandb_log", True) == {"wandb": "online"}
    assert translated("wandb_log", False) == {"wandb": "disabled"}


def test_wandb_that_is_disabled_is_not_needed(config, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # not installed
    train(changed(config, steps=1, wandb="disabled"))


@pytest.mark.parametrize("more", [["--force"], ["--init-from", "gpt2"]], ids=lambda more: more[0])
def test_resume_and_what_contradicts_it(config, capsys, more):
    train(changed(config, steps=1))
    command = ["train", "--data", config.data, "--out", config.out, "--resume", *more]
    assert cli.main(command) == 2
    assert "contradict each other" in capsys.readouterr().err


def test_a_size_without_a_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 is in the environment and RANK is not"):
        World("cpu")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert cli.main(["prepare", str(tmp_path), "--out", str(tmp_path / "data")]) == 2
    assert f"{tmp_path}/closed: Permission denied" in capsys.readouterr().err


def test_files_of_others_are_not_swept(tmp_path):
    (tmp_path / ".notes.fastgpt-thesis").write_text("mine")
    (tmp_path / ".ckpt.pt.fastgpt-0123abcd").write_text("a dead writer's")
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".notes.fastgpt-thesis"]


@pytest.mark.parametrize("device", ["xpu", "meta", "hpu"])
def test_a_device_that_is_none_to_train_on(config, capsys, device):
    command = ["train", "--data", config.data, "--out", config.out, "--device", device]
    assert cli.main(command) == 2
    assert (
        f"device '{device}' is none that fastgpt knows; use cpu, cuda or mps"
        in capsys.readouterr().err
    )


def test_a_closed_stdout(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert cli.main([]) == 0
