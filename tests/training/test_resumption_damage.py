"""What would go on silently and wrongly: half a state, other data, weights that are no numbers."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import checkpoint, cli
from fastgpt.commands.prepare import prepare
from fastgpt.storage import manifest
from fastgpt.training.config import TrainConfig
from fastgpt.training.loop import train
from fastgpt.training.progress import Progress
from fastgpt.training.saved_run import saved_run
from fastgpt.training.trainer import Trainer
from tests.training.runs import SMALL, TEXT, losses, prepared


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with data/ and out/, a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    prepared(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", "--data=data", "--out=out", *SMALL.split(), "--steps=2"]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it, and the current folder."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    return folder


def resume(run: Path, *more: str) -> int:
    return cli.main(["train", "--out", f"{run}/out", "--resume", "--steps", "3", *more])


def config_of(saved: dict[str, Any], **changes: Any) -> TrainConfig:
    known = {k: v for k, v in saved["config"].items() if k in TrainConfig.__dataclass_fields__}
    return TrainConfig(**{**known, "resume": True, **changes})


def first_state(saved):
    return saved["optimizer"]["state"][0]


DAMAGE = {
    "no optimizer": (lambda s: s.pop("optimizer"), "lacks 'optimizer'"),
    "no step": (lambda s: s.pop("iter_num"), "lacks `iter_num`"),
    "no state": (lambda s: s["optimizer"].update(state={}), "state of parameter 0"),
    "half": (lambda s: s["optimizer"]["state"].pop(1), "state of parameter 1"),
    "no moment": (lambda s: first_state(s).pop("exp_avg"), "exp_avg"),
    "NaN": (lambda s: first_state(s)["exp_avg"].fill_(math.nan), "exp_avg of parameter 0"),
    "negative": (lambda s: first_state(s)["exp_avg_sq"].fill_(-1), "exp_avg_sq of parameter 0"),
    "step": (lambda s: first_state(s).update(step=torch.tensor(-5.0)), "step of parameter 0"),
    "huge step": (lambda s: first_state(s).update(step=torch.tensor(1e30)), "step of parameter 0"),
    "groups": (lambda s: s["optimizer"].update(param_groups=torch.ones(2)), "`param_groups`"),
    "seconds": (lambda s: s["fastgpt"].update(seconds=math.nan), "`seconds` is nan"),
    "scaler": (lambda s: s["fastgpt"].update(scaler={"scale": "x"}), "`scaler` is {'scale'"),
    "losses": (lambda s: s["fastgpt"].update(losses=[1.0]), "`losses` is [1.0]"),
    "validated": (lambda s: s["fastgpt"].update(validated_at=9), "`validated_at` is 9"),
    "run": (lambda s: s["fastgpt"].update(run=5), "`run` is 5"),
    "iter_num": (lambda s: s.update(iter_num=10**30), "`iter_num` is 1000"),
    "blocks": (lambda s: s["model_args"].update(n_layer=10**400), "n_layer=1000"),
    "untied": (lambda s: s["model"].update({"lm_head.weight": torch.ones(12, 16)}), "differs from"),
    "no data": (lambda s: s["config"].update(data=""), "data=''"),
    "config": (lambda s: s["config"].update(lr="\x1b[31m"), "lr='"),
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
    named = path.parent if what in ("no data", "config") else path
    assert str(named) in err and message in err and err.count("\n") == 1


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
    assert f"data/{name} is damaged" in capsys.readouterr().err


MANIFEST = [("uint16", "uint32"), ('"vocab_size": 12', '"vocab_size": 9'), ('"char"', '"gpt2"')]


@pytest.mark.parametrize("change", MANIFEST)
def test_a_manifest_that_the_folder_contradicts(run, capsys, change):
    path = run / "data" / manifest.NAME
    path.write_text(path.read_text().replace(*change))
    assert resume(run) == 2
    assert f"data/{manifest.NAME} " in capsys.readouterr().err


def test_what_is_not_finite_takes_no_checkpoints_place(run, monkeypatch):
    before = (run / "out/ckpt.pt").read_bytes()
    step = Trainer.train_step

    def diverging(trainer):
        loss = step(trainer)
        trainer.model.lm_head.weight.data.fill_(math.nan)
        return loss  # of before

    saved = checkpoint.load_checkpoint(run / "out/ckpt.pt")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", diverging)
        with pytest.raises(FloatingPointError, match="after step 3, which is not saved"):
            train(config_of(saved, steps=3), saved)
    assert (run / "out/ckpt.pt").read_bytes() == before

    def without_memory(trainer):
        if trainer.steps_done == 4:
            raise torch.OutOfMemoryError("does not fit")
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", without_memory)
    with pytest.raises(torch.OutOfMemoryError):
        train(config_of(saved, steps=9), saved)
    assert checkpoint.load_checkpoint(run / "out/ckpt.pt")["iter_num"] == 4
    assert max(losses(run / "out"))[0] == 4


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


def test_force_leaves_nothing_of_the_run_before(run):
    argv = ["train", "--data=data", "--out=out", *SMALL.split()]
    assert cli.main([*argv, "--steps=8", "--eval-every=2", "--keep=4", "--force"]) == 0
    (run / "out/sharded-000002").mkdir()
    before = checkpoint.load_checkpoint(run / "out/ckpt.pt")["fastgpt"]["run"]
    assert cli.main([*argv, "--steps=5", "--eval-every=5", "--keep=3", "--force"]) == 0
    assert {p.name for p in (run / "out").glob("*[0-9]*")} == {"ckpt-000005.pt"}
    for name in ("ckpt.pt", "best.pt"):
        found = checkpoint.load_checkpoint(run / "out" / name)
        assert found["iter_num"] == 5 and found["fastgpt"]["run"] != before
    assert max(losses(run / "out"))[0] == 5


def test_steps_before_one_that_is_not_finite_are_logged():
    logged: list[dict[str, float]] = []
    cpu = torch.device("cpu")
    progress = Progress(1, 0.0, lambda _: math.nan, cpu, logged.extend, quiet=True)
    progress.every = 99.0
    for step, loss in enumerate((3.0, 2.0, math.nan), start=1):
        progress.add(step, torch.tensor(loss), 0.1, 0.1)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
        progress.show(0.1)
    assert [(line["step"], line["loss"]) for line in logged] == [(1, 3.0), (2, 2.0)]


KINDS: dict[str, Any] = {
    "nothing": None, "text": "x\x1b[31m", "empty": "", "list": [1], "nan": math.nan,
    "inf": math.inf,
    "-1": -1, "huge": 10**400, "part": 0.5, "bool": True, "tensor": torch.zeros(3), "dict": {1: 2},
    "bytes": b"x\0",
}  # fmt: skip
FIELDS = {  # and the kinds that each may have
    "iter_num": [],
    "best_val_loss": ["inf", "-1", "part"],
    "model_args": [],
    "model_args n_layer": [],
    "model_args vocab_size": [],
    "model_args dropout": ["part"],
    "model_args bias": [],  # of bool, but there are no biases in `model`
    "model": [],
    "config": ["dict"],
    "fastgpt": ["dict"],
    "fastgpt characters": ["nothing"],
    "fastgpt seconds": ["part"],
    "fastgpt data": ["nothing", "text", "empty"],
    "fastgpt run": ["nothing", "text", "empty"],
    "fastgpt losses": ["nothing"],
    "fastgpt validated_at": ["-1"],
    "fastgpt scaler": ["nothing"],
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_kind_is_refused(trained, field):
    saved = checkpoint.load_checkpoint(trained / "out/ckpt.pt")
    *inside, name = field.split()
    for kind, value in KINDS.items():
        changed = {**saved, "model_args": {**saved["model_args"]}}
        if inside:
            changed[inside[0]] = {**saved[inside[0]], name: value}
        else:
            changed[name] = value
        try:
            saved_run(checkpoint.checked(changed, Path("ckpt.pt")))
            taken = True
        except (ValueError, OverflowError) as error:
            taken = not str(error)
        assert taken == (kind in FIELDS[field]), kind
