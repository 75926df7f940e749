"""Training: checkpoints nanoGPT can load, bitwise resumption, and the data a run starts from."""

import errno
import os
import pickle
import re
import signal
from pathlib import Path

import pytest
import torch

from fastgpt import checkpoint, data
from fastgpt.commands.prepare import prepare
from fastgpt.training.config import TrainConfig
from fastgpt.training.loop import train
from fastgpt.training.trainer import Trainer

NANOGPT_FIELDS = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    prepare("".join(chr(97 + i * i % 23) for i in range(2000)), tmp_path / "data")
    return TrainConfig(
        data=str(tmp_path / "data"),
        out=str(tmp_path / "out"),
        n_layer=2,
        n_head=2,
        n_embd=16,
        block_size=8,
        batch_size=4,
        grad_accum=2,
        dropout=0.1,
        steps=10,
        warmup=3,
        eval_iters=2,
        device="cpu",
    )


def changed(config: TrainConfig, **changes) -> TrainConfig:
    return TrainConfig(**{**vars(config), **changes})


def saved_by(config: TrainConfig) -> dict:
    return checkpoint.load_checkpoint(Path(config.out) / "ckpt.pt")


def assert_same(a, b):
    """Equal bit for bit, through nested dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_checkpoint_has_nanogpts_format(config):
    result = train(config)
    saved = torch.load(Path(config.out) / "ckpt.pt", weights_only=True)
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"} < set(saved)
    assert set(saved["model_args"]) == NANOGPT_FIELDS
    assert saved["iter_num"] == result.step == 10
    assert os.path.join("data", saved["config"]["dataset"]) == os.path.realpath(config.data)
    assert_same(saved["model"], dict(result.model.state_dict()))
    files = {name for name in os.listdir(config.out) if not name.startswith(".")}
    assert files - {"loss.png"} == {"best.pt", "ckpt.pt", "log.jsonl"}


def test_ctrl_c_saves_and_resume_gives_the_same_bits(config, tmp_path, monkeypatch):
    train(config)
    whole = saved_by(config)

    config = changed(config, out=str(tmp_path / "interrupted"))
    step = Trainer.train_step

    def step_then_ctrl_c(trainer):
        loss = step(trainer)
        if trainer.steps_done == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_then_ctrl_c)
        assert train(config).interrupted
    assert saved_by(config)["iter_num"] == 5
    torch.manual_seed(99)  # nothing may depend on what a new process would start from
    assert not train(changed(config, resume=True)).interrupted

    resumed = saved_by(config)
    for key in ("model", "optimizer", "iter_num"):
        assert_same(whole[key], resumed[key])


def test_resumes_nanogpts_checkpoint(config):
    train(config)
    saved = saved_by(config)
    del saved["fastgpt"]
    saved["best_val_loss"] = torch.tensor(3.0)
    saved["model"] = {f"_orig_mod.{name}": w for name, w in saved["model"].items()}
    checkpoint.save_checkpoint(saved, Path(config.out) / "ckpt.pt")
    assert train(changed(config, steps=12, resume=True)).step == 12


def test_minutes_decide_over_steps(config):
    trainer = Trainer(changed(config, minutes=10.0, steps=1, warmup=0))
    trainer.train_step()
    assert trainer.fraction() < 0.5
    trainer.started -= 600
    assert trainer.fraction() >= 1
    assert trainer.learning_rate() == pytest.approx(config.min_lr)


def test_learns(config):
    trainer = Trainer(config)
    before = trainer.validate().val
    after = train(changed(config, steps=40, lr=1e-2, dropout=0.0)).val_loss
    assert after < before - 0.3


def test_validation_loss_is_repeatable_and_leaves_no_trace(config):
    trainer = Trainer(config)
    state = torch.get_rng_state()
    losses = [trainer.validate() for _ in range(2)]
    assert losses[0] == losses[1]
    assert trainer.model.training and torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_is_not_finite_stops_the_run(config):
    train(config)
    before = saved_by(config)
    before["model"]["transformer.ln_f.weight"].fill_(3e38)
    checkpoint.save_checkpoint(before, Path(config.out) / "ckpt.pt")
    with pytest.raises(FloatingPointError, match="at step 11"):
        train(changed(config, steps=20, resume=True))
    assert saved_by(config)["iter_num"] == 10


def test_a_failed_save_keeps_the_checkpoint_before(config, monkeypatch):
    train(config)

    def full_disk(_, file):
        file.write(b"half a ")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    ckpt = re.escape(f"{config.out}/ckpt.pt")
    with pytest.raises(OSError, match=rf"{ckpt}: No space left on device \(.+ needed, .+ free"):
        train(changed(config, steps=12, resume=True))
    assert saved_by(config)["iter_num"] == 10
    assert not list(Path(config.out).glob(".ckpt*"))


@pytest.mark.parametrize("name", ["batch_size", "grad_accum", "steps", "eval_every", "eval_iters"])
def test_settings_are_checked(config, name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        changed(config, **{name: 0})


def test_clear_errors_before_a_run(config, tmp_path):
    with pytest.raises(ValueError, match="use a smaller --block-size"):
        train(changed(config, block_size=512))
    with pytest.raises(FileNotFoundError, match="fastgpt prepare"):
        train(changed(config, data=str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        train(changed(config, out=str(tmp_path / "none"), resume=True))
    with pytest.raises(ValueError, match="float16 is for CUDA"):
        train(changed(config, dtype="float16"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="autocast and loss scaling need a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_trains_and_resumes_on_a_gpu(config, dtype):
    config = changed(config, device="cuda", dtype=dtype)
    assert train(config).step == 10
    assert train(changed(config, steps=15, resume=True)).step == 15


class TestPrepare:
    def test_files_are_nanogpts(self, tmp_path):
        text = "héllo wörld, " * 10
        tokenizer = prepare(text, tmp_path)
        meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())
        assert meta["vocab_size"] == len(set(text)) == tokenizer.vocab_size
        ids = torch.cat([data.load_split(tmp_path, split) for split in ("train", "val")])
        assert "".join(meta["itos"][i] for i in ids.tolist()) == text
        assert [meta["stoi"][character] for character in text] == ids.tolist()
        assert (tmp_path / "val.bin").stat().st_size == 2 * 13

    def test_ids_above_32767_survive(self, tmp_path):
        text = "".join(map(chr, range(0x100, 0xD000)))
        tokenizer = prepare(text, tmp_path)
        generator = torch.Generator().manual_seed(0)
        ids = data.load_split(tmp_path, "val")
        x, y = data.random_batch(ids, 2, 8, generator, torch.device("cpu"))
        assert x.min() > 32767 and torch.equal(y, x + 1)
        assert x.is_contiguous() and y.is_contiguous()  # nanoGPT takes targets.view(-1)
        assert "".join(tokenizer.stream(x[0].tolist())) in text

    def test_batches_reach_both_ends(self, tmp_path):
        prepare("ab" * 50, tmp_path)
        ids = data.load_split(tmp_path, "val")  # 10 tokens: with a block of 8, 2 windows
        generator = torch.Generator().manual_seed(0)
        x, _ = data.random_batch(ids, 50, 8, generator, torch.device("cpu"))
        assert {tuple(row) for row in x.tolist()} == {(0, 1) * 4, (1, 0) * 4}

    @pytest.mark.parametrize("text", ["", "a", "nineteen characters"])
    def test_too_short(self, tmp_path, text):
        with pytest.raises(ValueError, match="too short"):
            prepare(text, tmp_path)

    def test_too_many_characters(self, tmp_path):
        planes = (c for c in range(0x20, 0x20000) if not 0xD800 <= c < 0xE000)
        with pytest.raises(ValueError, match="use --tokenizer gpt2"):
            prepare("".join(map(chr, planes)), tmp_path)

    def test_undecodable(self, tmp_path):
        (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
        with pytest.raises(ValueError, match="not UTF-8 text: byte 0xef at offset 2"):
            data.read_text(tmp_path / "latin1.txt")

    def test_meta_that_would_run_code_is_refused(self, tmp_path):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": os.system}))
        with pytest.raises(ValueError, match=r"is no meta\.pkl.*wants to import"):
            data.load_tokenizer(tmp_path)

    def test_unknown_characters_are_named(self, tmp_path):
        tokenizer = prepare("ab" * 50, tmp_path)
        with pytest.raises(ValueError, match="without 'c', 'é'"):
            tokenizer.encode("abcé")
