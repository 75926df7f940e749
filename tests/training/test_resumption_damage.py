"""What would go on silently and wrongly: half a state, other data, weights that are no numbers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import checkpoint, cli
from fastgpt.commands.prepare import prepare
from fastgpt.storage import manifest
from fastgpt.training.config import TrainConfig
from fastgpt.training.loop import train
from fastgpt.training.trainer import Trainer
from tests.training.runs import SMALL, TEXT, prepared


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder with data/ and out/, a run of two steps."""
    prepared(tmp_path / "data")
    argv = ["train", "--data", f"{tmp_path}/data", "--out", f"{tmp_path}/out", *SMALL.split()]
    assert cli.main([*argv, "--steps", "2"]) == 0
    return tmp_path


def resume(run: Path, *more: str) -> int:
    return cli.main(["train", "--out", f"{run}/out", "--resume", "--steps", "3", *more])


def config_of(saved: dict[str, Any], **changes: Any) -> TrainConfig:
    known = {k: v for k, v in saved["config"].items() if k in TrainConfig.__dataclass_fields__}
    return TrainConfig(**{**known, "resume": True, **changes})


def first_state(saved):
    return saved["optimizer"]["state"][0]


DAMAGE = {
    "no optimizer": (lambda s: s.pop("optimizer"), "lacks 'optimizer'"),
    "no step": (lambda s: s.pop("iter_num"), "lacks 'iter_num'"),
    "no state": (lambda s: s["optimizer"].update(state={}), "state of parameter 0"),
    "half": (lambda s: s["optimizer"]["state"].pop(1), "state of parameter 1"),
    "no moment": (lambda s: first_state(s).pop("exp_avg"), "exp_avg"),
    "NaN": (lambda s: first_state(s)["exp_avg"].fill_(math.nan), "exp_avg of parameter 0"),
    "negative": (lambda s: first_state(s)["exp_avg_sq"].fill_(-1), "exp_avg_sq of parameter 0"),
    "step": (lambda s: first_state(s).update(step=torch.tensor(-5.0)), "step of parameter 0"),
    "seconds": (lambda s: s["fastgpt"].update(seconds=math.nan), "nan seconds"),
    "best": (lambda s: s.update(best_val_loss=math.nan), "`best_val_loss` is nan"),
    "weights": (lambda s: next(iter(s["model"].values())).fill_(math.inf), "not finite"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_half_a_state_is_not_gone_on_from(run, capsys, what):
    damage, message = DAMAGE[what]
    path = run / "out/ckpt.pt"
    saved = checkpoint.load_checkpoint(path)
    damage(saved)
    checkpoint.save_checkpoint({k: v for k, v in saved.items() if k != "checksum"}, path)
    capsys.readouterr()
    assert resume(run) == 2
    err = capsys.readouterr().err
    assert str(path) in err and message in err and err.count("\n") == 1


def test_the_optimizers_settings_are_the_runs(run):
    path = run / "out/ckpt.pt"
    saved = checkpoint.load_checkpoint(path)
    for group in saved["optimizer"]["param_groups"]:
        group.update(eps=5.0, maximize=True)
    groups = Trainer(config_of(saved), saved).optimizer.param_groups
    assert all(g["eps"] == 1e-8 and not g["maximize"] for g in groups)


def test_other_data_and_a_finished_run_are_told(run, capsys):
    prepare(TEXT[::-1], run / "data", force=True)
    assert resume(run) == 0
    assert "has other data than the run was trained on" in capsys.readouterr().out
    assert resume(run) == 0
    said = capsys.readouterr().out
    assert "is at step 3 already" in said and "other data" not in said


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_flipped_bit_in_the_data_is_found(run, capsys, name):
    path = run / "data" / name
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert resume(run) == 2
    assert f"{path} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("change", [("uint16", "uint32"), ('"vocab_size": 12', '"vocab_size": 9')])
def test_a_manifest_that_the_folder_contradicts(run, capsys, change):
    path = run / "data" / manifest.NAME
    path.write_text(path.read_text().replace(*change))
    assert resume(run) == 2
    assert str(path) in capsys.readouterr().err


def test_what_is_not_finite_takes_no_checkpoints_place(run, monkeypatch):
    before = (run / "out/ckpt.pt").read_bytes()
    step = Trainer.train_step

    def diverging(trainer):
        loss = step(trainer)
        trainer.model.lm_head.weight.data.fill_(math.nan)
        return loss  # of before

    monkeypatch.setattr(Trainer, "train_step", diverging)
    saved = checkpoint.load_checkpoint(run / "out/ckpt.pt")
    with pytest.raises(FloatingPointError, match="after step 3, which is not saved"):
        train(config_of(saved, steps=3), saved)
    assert (run / "out/ckpt.pt").read_bytes() == before


def test_a_vocabulary_of_as_many_others_is_refused(run, tmp_path, capsys):
    prepare(TEXT.upper(), tmp_path / "upper")
    argv = ["sample", "--out", f"{run}/out", "--data", f"{tmp_path}/upper"]
    assert cli.main(argv) == 2
    assert "another vocabulary" in capsys.readouterr().err
    pytest.importorskip("transformers", reason="Hugging Face's folders need transformers")
    assert cli.main(["convert", f"{run}/out/ckpt.pt", f"{run}/hf"]) == 0
    argv = ["train", "--data", f"{tmp_path}/upper", "--out", f"{run}/new", "--device", "cpu"]
    assert cli.main([*argv, "--init-from", f"{run}/hf"]) == 2
    assert "another vocabulary of 12 characters" in capsys.readouterr().err
