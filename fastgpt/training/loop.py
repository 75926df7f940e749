"""A training run from its first step to its last, or to an interruption: nothing done is lost."""

import math
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt.decoding import pool
from fastgpt.devices import autocast
from fastgpt.model import GPT
from fastgpt.train_step import TrainStep
from fastgpt.training import sharded_folder
from fastgpt.training.config import TrainConfig
from fastgpt.training.folder import RunFolder
from fastgpt.training.interrupts import Interrupts
from fastgpt.training.log import Log, draw
from fastgpt.training.progress import Progress
from fastgpt.training.trainer import Losses, Trainer
from fastgpt.training.watch import LostProcess
from fastgpt.training.world import World


@dataclass(frozen=True)
class Result:
    model: GPT
    step: int
    val_loss: float  # the last that was measured, NaN before any
    interrupted: int  # the signal, 0 for a run that came to its end


def train(
    config: TrainConfig,
    saved: Mapping[str, Any] | None = None,
    explicit: frozenset[str] = frozenset(),
) -> Result:
    """Train until `config` is met, or Ctrl-C or SIGTERM. What is returned is also saved.

    `saved` is the checkpoint to resume from, if it is read already; `explicit` names the settings
    that somebody asked for.
    """
    with World(config.device) as world:
        folder: RunFolder | None = None
        if world.first:
            folder = RunFolder(Path(config.out), config.keep, config.resume, config.force)
        try:
            return _train(config, saved, explicit, world, folder)
        except RuntimeError as error:
            explanation = world.explained(error)
            if explanation is error:
                raise
            raise explanation from None
        finally:
            if folder is not None:
                folder.release()


def _train(
    config: TrainConfig,
    saved: Mapping[str, Any] | None,
    explicit: frozenset[str],
    world: World,
    folder: RunFolder | None,
) -> Result:
    if config.resume and saved is None:
        saved = sharded_folder.load(Path(config.out), config.shard)
    trainer = Trainer(config, saved, world, explicit)
    if config.resume and config.shard:
        sharded_folder.restore(trainer)
    run = Run(trainer, folder)
    try:
        return run.to_the_end()
    finally:
        run.close()


class Run:
    """A trainer with its folder, which only the first process has, and what is told of it."""

    def __init__(self, trainer: Trainer, folder: RunFolder | None):
        self.trainer, self.folder, self.world = trainer, folder, trainer.world
        self.config = config = trainer.config
        self.log: Log | None = None
        if config.sample_tokens:
            trainer.tokenizer.encode(trainer.tokenizer.start)  # a missing tokenizer ends it here
        if folder is not None:
            size = 3 * 4 * sum(p.numel() for p in trainer.model.parameters())
            folder.check_room(size)
            if config.resume and trainer.steps_done and not config.shard:
                folder.complete(trainer.steps_done, trainer.is_best())
            self.log = Log(folder.path, config, trainer.steps_done, trainer.run)
            trainer.run = self.log.run
        self.progress = Progress(
            trainer.tokens_per_step(),
            trainer.fraction(),
            trainer.mfu,
            trainer.device,
            self._logged,
            quiet=folder is None,
        )
        self.interrupts = Interrupts()
        self.interrupts.updating, self.interrupts.quiet = self._updating, folder is None

    def _updating(self) -> bool:
        return isinstance(self.trainer.step, TrainStep) and self.trainer.step.updating

    def to_the_end(self) -> Result:
        with self.interrupts:
            try:
                result = self._steps()
            except FloatingPointError:  # such weights are not worth keeping
                raise
            except BaseException as error:
                explanation = None
                if isinstance(error, RuntimeError):
                    explanation = self.world.explained(error)
                if isinstance(explanation, LostProcess):
                    raise self._rescued(explanation) from None
                self._keep(error)
                raise
            if self.folder is not None and self.log is not None:
                self.log.sync()
                self.progress.note(draw(self.log.path, self.folder.path / "loss.png"))
            return result

    def _keep(self, error: BaseException) -> None:
        """Save the last whole step: what failed is data that changed, a disk, memory, a step that
        was not taken, or somebody's patience.
        """
        # weights on shards are saved by all processes, which may not all have failed
        if self.config.shard or self._updating():
            return
        before = self.trainer.saved_at
        expected = isinstance(error, ValueError | OSError)
        with nullcontext() if expected else suppress(Exception):  # a GPU may be beyond reading
            with suppress(OSError):
                self._flush()  # first: after a loss that is not finite nothing is saved
            self._save()
        if self.trainer.saved_at > before:
            self.progress.note(f"step {self.trainer.steps_done:,} is saved")

    def _steps(self) -> Result:
        trainer, config = self.trainer, self.config
        if isinstance(trainer.step, TrainStep) and trainer.step.graph is not None:
            self.progress.note("a CUDA graph replays every forward and backward (--no-capture)")
        if trainer.other_data:
            self.progress.note(f"{config.data} has other data than the run was trained on before")
        if trainer.steps_done and trainer.fraction() >= 1:
            limit = "steps" if config.minutes is None else "minutes"
            self.progress.note(
                f"{config.out} is at step {trainer.steps_done:,} already, which ends the run; a "
                f"higher --{limit} goes on with it"
            )
        while True:
            if self._stop():
                self._flush()
                self._save()
                return self._result(self.interrupts.number)
            over = trainer.fraction() >= 1
            due = over or config.eval_only or trainer.steps_done % config.eval_every == 0
            if due and trainer.validated_at != trainer.steps_done:
                self._flush()  # first: a loss that is not finite must not be saved
                losses = trainer.validate(self._stop)
                if losses is None:
                    continue
                self._note(losses)
                if not config.eval_only:
                    self._save()
                self._sample()
            if over or config.eval_only:
                return self._result(0)
            lr = trainer.learning_rate()
            loss = trainer.train_step()
            self.progress.add(trainer.steps_done, loss, lr, trainer.fraction())

    def _stop(self) -> bool:
        """Whether any process was told to end; all agree on the seconds, too."""
        trainer = self.trainer
        trainer.agreed_seconds = None
        stop, seconds = self.world.largest([float(self.interrupts.number), trainer.seconds()])
        trainer.agreed_seconds = seconds
        self.interrupts.number = int(stop)
        return stop > 0

    def _flush(self) -> None:
        self.progress.show(self.trainer.fraction())

    def _logged(self, lines: list[dict[str, float]]) -> None:
        if self.log is None:
            return
        for line in lines:
            if int(line["step"]) % self.config.log_every == 0:
                self.log.add(**line)  # type: ignore[arg-type]

    def _note(self, losses: Losses) -> None:
        step = self.trainer.steps_done
        text = f"step {step:,}: training loss {losses.train:.4f}, validation loss {losses.val:.4f}"
        self.progress.note(text)
        if self.log is not None:
            self.log.add(step, train_loss=losses.train, val_loss=losses.val)

    def _save(self) -> None:
        """Write the latest checkpoint, also as the best if it is; nothing before the first step."""
        trainer = self.trainer
        if trainer.steps_done == 0 or trainer.saved_at == trainer.steps_done:
            return
        measured, best_before = trainer.measured(), trainer.best_val_loss
        best = measured is not None and measured.val < best_before
        if best and measured is not None:
            trainer.best_val_loss = measured.val
        trainer.check_finite()
        self.interrupts.saving = True
        try:
            with self.world.writing():
                self._write(best)
        except BaseException:
            trainer.best_val_loss = best_before
            raise
        finally:
            self.interrupts.saving = False
        trainer.saved_at = trainer.steps_done

    def _write(self, best: bool) -> None:
        try:
            if self.log is not None:
                self.log.sync()
        finally:  # a checkpoint is worth more than its history
            if self.config.shard:
                sharded_folder.save(self.trainer, self.folder, best)
            elif self.folder is not None:
                self.folder.save(self.trainer.state(), best)

    def _rescued(self, lost: LostProcess) -> LostProcess:
        """After another process was lost, the first saves what it has: the last whole step."""
        trainer = self.trainer
        if self.folder is None or self.config.shard or trainer.steps_done <= trainer.saved_at:
            return lost
        self._flush()
        self._save()
        return LostProcess(f"{lost}, step {trainer.steps_done} is saved")

    def _sample(self) -> None:
        """A text by the model as it is; training goes on as if nothing had been drawn."""
        trainer, count = self.trainer, self.config.sample_tokens
        if not count or (self.folder is None and not self.config.shard):
            return
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        ids = trainer.tokenizer.encode(trainer.tokenizer.start)
        model = trainer.model
        with torch.random.fork_rng(devices), autocast(trainer.device, trainer.dtype):
            torch.manual_seed(trainer.config.seed)
            model.eval()
            idx = torch.tensor([ids], device=trainer.device)
            new = model.generate(idx, count, temperature=0.8, top_k=200)[0, len(ids) :]
            model.train()
        pool.drop(model)  # training needs the memory
        text = "".join(trainer.tokenizer.stream(new.tolist()))
        self.progress.note(f"sample:\n{text}\n")

    def _result(self, interrupted: int) -> Result:
        trainer = self.trainer
        val_loss = math.nan if trainer.losses is None else trainer.losses.val
        return Result(trainer.model, trainer.steps_done, val_loss, interrupted)

    def close(self) -> None:
        self.progress.close()
        self.trainer.batches.close()
        if self.log is not None:
            self.log.close()
