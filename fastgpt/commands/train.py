"""`fastgpt train`: a GPT trained on one device, with nanoGPT's data, checkpoints and schedule.

out/ckpt.pt is a dict as nanoGPT writes it: its sample.py and `train.py --init_from=resume` load it.
Under "fastgpt" it also holds whatever else decides the next step (RNG states, clock, loss scale):
an interrupted and resumed run gives the bits of one that was left alone.
"""

import argparse
import math
import signal
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import checkpoint, data
from fastgpt.commands.progress import Progress
from fastgpt.devices import DTYPES, autocast, pick_device, pick_dtype
from fastgpt.model import GPT, GPTConfig
from fastgpt.train_step import Batch, TrainStep


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. Each field is also the command-line option of its name."""

    data: str = _setting(MISSING, "folder that `fastgpt prepare` wrote")
    out: str = _setting("out", "folder of ckpt.pt")
    n_layer: int = _setting(6, "blocks")
    n_head: int = _setting(6, "attention heads per block")
    n_embd: int = _setting(384, "model width")
    block_size: int = _setting(256, "tokens of context")
    dropout: float = _setting(0.0, "dropout probability")
    bias: bool = _setting(False, "biases in linears and LayerNorms")
    batch_size: int = _setting(32, "sequences per forward")
    grad_accum: int = _setting(1, "forwards per optimizer step")
    steps: int = _setting(5000, "optimizer steps in all")
    minutes: float | None = _setting(None, "train for so long instead of --steps")
    lr: float = _setting(1e-3, "highest learning rate")
    min_lr: float = _setting(1e-4, "learning rate at the end of the cosine")
    warmup: int = _setting(100, "steps of rising learning rate")
    weight_decay: float = _setting(0.1, "AdamW's, for matrices only")
    grad_clip: float = _setting(1.0, "largest gradient norm, 0 for any")
    eval_every: int = _setting(250, "steps between validations; each saves a checkpoint")
    eval_iters: int = _setting(20, "batches per validation")
    dtype: str | None = _setting(None, "of autocast; default: what suits it", choices=DTYPES)
    device: str | None = _setting(None, "cuda, cuda:1, cpu, ...; default: a GPU if there is one")
    seed: int = _setting(1337, "of weights, batches and dropout")
    compile: bool = _setting(False, "torch.compile the model")
    capture: bool = _setting(False, "replay a CUDA graph, for small batches")
    checkpoint_blocks: bool = _setting(False, "save memory: compute blocks again in the backward")
    resume: bool = _setting(False, "go on from the checkpoint in --out, with its model")

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accum", "steps", "eval_every", "eval_iters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes} must be positive")


@dataclass(frozen=True)
class Result:
    model: GPT
    step: int
    val_loss: float
    interrupted: bool


def train(config: TrainConfig) -> Result:
    """Train until `config` is met or Ctrl-C. What is returned is also saved."""
    trainer = Trainer(config)
    progress = Progress(trainer.tokens_per_step(), trainer.fraction())
    with _ctrl_c_noted() as pressed:
        while True:
            over = trainer.fraction() >= 1 or bool(pressed)
            if over or trainer.steps_done % config.eval_every == 0:
                # first: a loss that is not finite must not be saved
                progress.show(trainer.steps_done, trainer.fraction())
                val_loss = trainer.validate()
                progress.note(f"step {trainer.steps_done:,}: validation loss {val_loss:.4f}")
                if trainer.steps_done > 0:
                    trainer.save()
            if over:
                return Result(trainer.model, trainer.steps_done, val_loss, bool(pressed))
            loss = trainer.train_step()
            progress.add(loss, trainer.steps_done, trainer.fraction())


class Trainer:
    """Everything that decides the next step."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.path = Path(config.out) / "ckpt.pt"
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(self.device, config.dtype)
        self.train_ids = data.load_split(Path(config.data), "train")
        self.val_ids = data.load_split(Path(config.data), "val")
        self.tokenizer = data.load_tokenizer(Path(config.data))
        saved = checkpoint.load_checkpoint(self.path) if config.resume else None

        torch.manual_seed(config.seed)
        self.data_rng = torch.Generator().manual_seed(config.seed)
        self.model_args = self._model_args(saved)
        # nobody looks at the logits here, and the head needs less memory if it need not return them
        memory = {"return_logits": False, "checkpoint_blocks": config.checkpoint_blocks}
        self.model = GPT(GPTConfig(**self.model_args | memory)).to(self.device)
        betas, max_norm = (0.9, 0.95), config.grad_clip
        step = TrainStep(
            self.model,
            config.weight_decay,
            config.lr,
            betas,
            max_norm,
            self.dtype,
            capture=config.capture,
            compile=config.compile,
        )
        self.optimizer, self.scaler = step.optimizer, step.scaler
        self.take_step: Callable[[Sequence[Batch]], Tensor] = step
        self.steps_done = 0
        self.best_val_loss = math.inf
        self.started = time.perf_counter()
        if saved is not None:
            self._restore(saved)

    def _model_args(self, saved: dict[str, Any] | None) -> dict[str, Any]:
        cfg, vocab_size = self.config, self.tokenizer.vocab_size
        if saved is None:
            shape = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")
            return {"vocab_size": vocab_size} | {name: getattr(cfg, name) for name in shape}
        args = dict(saved["model_args"], dropout=cfg.dropout)
        if args["vocab_size"] < vocab_size:
            raise ValueError(
                f"{cfg.data} has a vocabulary of {vocab_size}, the checkpoint in {cfg.out} one of "
                f"{args['vocab_size']}; resume with the data it was trained on"
            )
        return args

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def tokens_per_step(self) -> int:
        cfg = self.config
        return cfg.batch_size * cfg.grad_accum * self.model.config.block_size

    def fraction(self) -> float:
        """How much of the run is done, 1 or more at its end."""
        limit = self.config.minutes
        if limit is not None:
            return self.seconds() / (60 * limit)
        return self.steps_done / self.config.steps

    def learning_rate(self) -> float:
        """Linear warm-up under a cosine from lr to min_lr."""
        cfg = self.config
        cosine = 0.5 * (1 + math.cos(math.pi * min(self.fraction(), 1)))
        warmup = min((self.steps_done + 1) / (cfg.warmup + 1), 1)
        return warmup * (cfg.min_lr + cosine * (cfg.lr - cfg.min_lr))

    def train_step(self) -> Tensor:
        """One optimizer step. Its loss stays on the device: reading it would wait for the step."""
        cfg, lr, T = self.config, self.learning_rate(), self.model.config.block_size
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.take_step(
            [
                data.random_batch(self.train_ids, cfg.batch_size, T, self.data_rng, self.device)
                for _ in range(cfg.grad_accum)
            ]
        )
        self.steps_done += 1
        return loss

    def validate(self) -> float:
        cfg = self.config
        loss = validation_loss(self.model, self.val_ids, cfg.batch_size, cfg.eval_iters, self.dtype)
        self.best_val_loss = min(self.best_val_loss, loss)
        return loss

    def save(self) -> None:
        on_cuda = self.device.type == "cuda"
        ours = {
            "characters": self.tokenizer.characters,
            "seconds": self.seconds(),
            "scaler": self.scaler.state_dict(),
            "data_rng": self.data_rng.get_state(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_cuda else None,
        }
        saved = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "model_args": self.model_args,
            "iter_num": self.steps_done,
            "best_val_loss": self.best_val_loss,
            "config": asdict(self.config) | {"dataset": _dataset(Path(self.config.data))},
            "fastgpt": ours,
        }
        checkpoint.save_checkpoint(saved, self.path)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.optimizer.copy_weights()
        self.steps_done, self.best_val_loss = saved["iter_num"], float(saved["best_val_loss"])
        if (ours := saved.get("fastgpt")) is None:
            return  # nanoGPT's own: batches and dropout start from our seed
        self.started -= ours["seconds"]
        self.data_rng.set_state(ours["data_rng"])
        torch.set_rng_state(ours["cpu_rng"])
        if self.device.type == "cuda" and ours["cuda_rng"] is not None:
            torch.cuda.set_rng_state(ours["cuda_rng"], self.device)
        if ours["scaler"]:
            self.scaler.load_state_dict(ours["scaler"])


def _dataset(folder: Path) -> str:
    """The folder as nanoGPT's sample.py looks for it, which joins this to "data"."""
    return folder.name if folder.parent == Path("data") else str(folder.resolve())


@torch.no_grad()
def validation_loss(
    model: GPT, ids: Tensor, batch_size: int, iters: int, dtype: torch.dtype = torch.float32
) -> float:
    """Mean loss over random windows, the same ones at every call."""
    was_training, device = model.training, model.lm_head.weight.device
    generator = torch.Generator().manual_seed(0)
    losses = []
    model.eval()
    for _ in range(iters):
        x, y = data.random_batch(ids, batch_size, model.config.block_size, generator, device)
        with autocast(device, dtype):
            losses.append(model(x, y)[1])
    model.train(was_training)
    return torch.stack(losses).mean().item()


@contextmanager
def _ctrl_c_noted() -> Iterator[list[int]]:
    """A list that the first Ctrl-C fills, so that its step is finished; the second interrupts."""
    pressed: list[int] = []

    def press(number: int, _: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    hints = typing.get_type_hints(TrainConfig)
    for setting in fields(TrainConfig):
        hint = hints[setting.name]
        kind = next(iter(typing.get_args(hint)), hint)  # T | None -> T
        options = dict(setting.metadata, required=setting.default is MISSING)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kind
        if setting.default is not MISSING and setting.default is not None:
            options |= {"default": setting.default, "help": f"{options['help']} (%(default)s)"}
        parser.add_argument("--" + setting.name.replace("_", "-"), **options)


def main(args: argparse.Namespace) -> int:
    settings = {setting.name: getattr(args, setting.name) for setting in fields(TrainConfig)}
    result = train(TrainConfig(**settings))
    print(f"saved {args.out}/ckpt.pt")
    if result.interrupted:
        print("interrupted; --resume goes on from there")
        return 130
    return 0
