"""Everything that decides the next step of a run, and its checkpoint.

out/ckpt.pt is a dict as nanoGPT writes it: its sample.py and `train.py --init_from=resume` load it.
Under "fastgpt" it also holds whatever else decides the next step. Batches and dropout are drawn
from seed, step and micro-batch alone: an interrupted and resumed run gives the bits of one that was
left alone, and one on another number of processes its losses.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import checkpoint, data
from fastgpt.config import GPTConfig
from fastgpt.devices import autocast, pick_device, pick_dtype
from fastgpt.model import GPT
from fastgpt.optim import MOMENTS
from fastgpt.storage.printable import first_line
from fastgpt.train_step import TrainStep
from fastgpt.training import optimizer_state, start
from fastgpt.training.batches import Batches, moved, seed_of, windows
from fastgpt.training.config import TrainConfig
from fastgpt.training.saved_run import saved_run
from fastgpt.training.schedule import learning_rate
from fastgpt.training.sharded import ShardedStep
from fastgpt.training.world import World


@dataclass(frozen=True)
class Losses:
    train: float
    val: float


class Trainer:
    """A process's part of a run. `saved` is the checkpoint that config.resume goes on from, None to
    read it; `explicit` names the settings that somebody asked for.
    """

    def __init__(
        self,
        config: TrainConfig,
        saved: Mapping[str, Any] | None = None,
        world: World | None = None,
        explicit: frozenset[str] = frozenset(),
    ):
        self.config, self.world = config, world or World(config.device)
        self._check_shares()
        self.device = pick_device(self.world.device(config.device))
        self.dtype = pick_dtype(self.device, config.dtype)
        self.tokenizer, self.splits, self.data_identity = data.open_data(
            Path(config.data), verify=self.world.first
        )
        self.world.check_same("data", self.data_identity)
        if config.resume and saved is None:
            saved = checkpoint.load_checkpoint(Path(config.out) / "ckpt.pt")
        begin = self._begin(saved, explicit)
        self.model_args = begin.model_args
        # nobody looks at the logits here, and the head needs less memory if it need not return them
        memory = {"return_logits": False, "checkpoint_blocks": config.checkpoint_blocks}
        gpt_config = GPTConfig(**self.model_args | memory)
        start.check_fits(gpt_config, config, self.device)
        self._check_lengths(gpt_config.block_size)

        torch.manual_seed(config.seed)
        self.model = GPT(gpt_config)
        if begin.weights is not None:
            self.model.load_state_dict(begin.weights)
        self.model.to(self.device)
        self.step = self._make_step()
        self.optimizer = self.step.optimizer
        self.take_step: Callable[..., Tensor] = self.step
        mine = self.world.share(config.grad_accum)
        train, sizes = self.splits["train"], (config.batch_size, gpt_config.block_size)
        self.batches = Batches(train, *sizes, config.seed, mine, self.device)
        self.steps_done = 0
        self.best_val_loss = math.inf
        self.losses: Losses | None = None  # at `validated_at`
        self.validated_at = -1
        self.saved_at = 0
        self.other_data = False  # than the checkpoint was trained on
        self.run = ""
        self.started = time.perf_counter()
        self.agreed_seconds: float | None = None
        if saved is not None:
            self._restore(saved)
        self.world.check_same("checkpoint", self.steps_done)

    def _check_shares(self) -> None:
        count, size = self.config.grad_accum, self.world.size
        if count % size:
            raise ValueError(
                f"grad_accum={count} micro-batches cannot be shared evenly among {size} processes; "
                f"try --grad-accum {math.ceil(count / size) * size}, or another number of processes"
            )

    def _check_lengths(self, block_size: int) -> None:
        for split in self.splits.values():
            if len(split) <= block_size:
                raise ValueError(
                    f"{split.path} of {len(split)} tokens has no window of {block_size} and the "
                    "token after it; use a smaller --block-size or more text"
                )

    def _begin(self, saved: Mapping[str, Any] | None, explicit: frozenset[str]) -> start.Start:
        if saved is not None:
            return start.resumed(self.config, self.tokenizer, saved)
        if self.config.init_from is not None:
            return start.initialised(self.config, self.tokenizer, explicit)
        return start.new(self.config, self.tokenizer)

    def _make_step(self) -> TrainStep | ShardedStep:
        cfg = self.config
        betas = (cfg.beta1, cfg.beta2)
        how = (self.model, cfg.weight_decay, cfg.lr, betas, cfg.grad_clip, self.dtype)
        if cfg.shard:
            return ShardedStep(*how, self.world, cfg.compile, bool(cfg.capture))
        shared = self.world.size > 1
        capture = self._may_capture() if cfg.capture is None else cfg.capture
        return TrainStep(*how, capture=capture, compile=cfg.compile, data_parallel=shared)

    def _may_capture(self) -> bool:
        """All batches have one shape. Checkpointing asks for the state of the random numbers, which
        a graph under capture does not give.
        """
        alone = self.device.type == "cuda" and self.world.size == 1
        return alone and not (self.config.compile or self.config.checkpoint_blocks)

    def seconds(self) -> float:
        """Of training, as all processes have agreed at the last step."""
        if self.agreed_seconds is not None and self.world.size > 1:
            return self.agreed_seconds
        return time.perf_counter() - self.started

    def tokens_per_step(self) -> int:
        cfg = self.config
        return cfg.batch_size * cfg.grad_accum * self.model.config.block_size

    def mfu(self, seconds: float) -> float:
        """Of this process's part of a step of so many seconds."""
        sequences = self.config.batch_size * self.config.grad_accum // self.world.size
        return self.model.estimate_mfu(sequences, seconds)

    def fraction(self) -> float:
        """How much of the run is done, 1 or more at its end."""
        limit = self.config.minutes
        if limit is not None:
            return self.seconds() / (60 * limit)
        return self.steps_done / self.config.steps

    def learning_rate(self) -> float:
        return learning_rate(self.config, self.steps_done, self.fraction())

    def train_step(self) -> Tensor:
        """One optimizer step. Its loss stays on the device: reading it would wait for the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        batches = self.batches.of_step(self.steps_done)
        loss = self.take_step(batches, self._dropout_seeds())
        self.steps_done += 1  # the weights have taken it, whatever becomes of its loss
        if isinstance(self.step, TrainStep):
            self.step.updating = False
        return self.world.sum(loss) / self.world.size

    def _dropout_seeds(self) -> Sequence[int] | None:
        if not self.model.config.dropout:
            return None
        cfg, step = self.config, self.steps_done
        return [seed_of("dropout", cfg.seed, step, m) for m in self.world.share(cfg.grad_accum)]

    def validate(self, stop: Callable[[], bool] = lambda: False) -> Losses | None:
        """Mean losses over random windows, the same ones at every call; None where `stop` says so,
        which all processes must answer alike.
        """
        means = []
        for name in ("train", "val"):
            mean = self._mean_loss(name, stop)
            if mean is None:
                return None
            means.append(mean)
        if not all(map(math.isfinite, means)):
            raise FloatingPointError(self._not_finite("losses are", means))
        self.losses, self.validated_at = Losses(*means), self.steps_done
        return self.losses

    def check_finite(self) -> None:
        """FloatingPointError for weights and moments that must not take a checkpoint's place."""
        bad = float(not all(bool(t.isfinite().all()) for t in self._tensors()))
        if self.config.shard:  # of its parts each process knows
            bad = self.world.largest([bad])[0]
        if bad:
            raise FloatingPointError(self._not_finite("weights or their moments are", "not finite"))

    def _tensors(self) -> Iterable[Tensor]:
        """What this process has of weights and moments."""
        if isinstance(self.step, ShardedStep):
            return self.step.parts().values()
        moments = (state[m] for state in self.optimizer.state.values() for m in MOMENTS if state)
        return [*self.model.parameters(), *moments]

    def _not_finite(self, what: str, value: object) -> str:
        return (
            f"the model's {what} {value} after step {self.steps_done}, which is not saved; try a "
            "lower --lr or a longer --warmup. A checkpoint that was saved is from before that"
        )

    @torch.no_grad()
    def _mean_loss(self, name: str, stop: Callable[[], bool]) -> float | None:
        cfg, world, T = self.config, self.world, self.model.config.block_size
        was_training = self.model.training
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.model.eval()
        try:
            for first in range(0, cfg.eval_iters, world.size):
                if stop():
                    return None
                number = first + world.rank  # sharded weights need everyone in every forward
                seed = seed_of("validation", name, number % cfg.eval_iters)
                rows = windows(self.splits[name], cfg.batch_size, T, seed)
                x, y = moved(rows, self.device)
                with autocast(self.device, self.dtype):
                    loss = self.model(x, y)[1]
                if number < cfg.eval_iters:
                    total += loss
        finally:
            self.model.train(was_training)
        return (world.sum(total) / cfg.eval_iters).item()

    def measured(self) -> Losses | None:
        """Of the weights as they are, if they were validated."""
        return self.losses if self.validated_at == self.steps_done else None

    def is_best(self) -> bool:
        measured = self.measured()
        return measured is not None and measured.val == self.best_val_loss

    def state(self) -> dict[str, Any]:
        """A checkpoint, in nanoGPT's format; without weights if these are sharded."""
        extras = {
            "characters": self.tokenizer.characters,
            "seconds": self.seconds(),
            "scaler": self.step.scaler.state_dict(),
            "data": self.data_identity,
            "run": self.run,
            "validated_at": self.validated_at,
            "losses": None if self.losses is None else [self.losses.train, self.losses.val],
        }
        saved = {
            "model_args": self.model_args,
            "iter_num": self.steps_done,
            "best_val_loss": self.best_val_loss,
            "config": asdict(self.config) | {"dataset": _dataset(Path(self.config.data))},
            "fastgpt": extras,
        }
        if self.config.shard:
            return saved
        weights = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**weights, **saved}

    def _restore(self, saved: Mapping[str, Any]) -> None:
        try:
            before = saved_run(saved)
            self.steps_done = self.saved_at = before.steps
            if not self.config.shard:
                # under fp16 the first steps are skipped, and leave no state
                stepped = self.steps_done > 0 and before.scaler is None
                optimizer_state.restore(self.optimizer, saved["optimizer"], stepped)
            self.best_val_loss = before.best_val_loss
            self.started -= before.seconds
            self.other_data = before.data not in (None, self.data_identity)
            self.run = before.run
            if before.losses is not None:
                self.losses, self.validated_at = Losses(*before.losses), before.validated_at
            if before.scaler is not None:
                self.step.scaler.load_state_dict(dict(before.scaler))
        except Exception as error:  # whatever a malformed one leads to
            name = Path(self.config.out) / "ckpt.pt"
            reason = first_line(error)
            if isinstance(error, KeyError):
                reason = f"it lacks {reason}"
            raise ValueError(
                f"{name} cannot be resumed from: {reason}; --init-from starts from its weights"
            ) from None


def _dataset(folder: Path) -> str:
    """The folder as nanoGPT's sample.py looks for it, which joins this to "data"."""
    return folder.name if folder.parent == Path("data") else str(folder.resolve())
