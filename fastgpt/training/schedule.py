"""The learning rate: a linear warm-up, then one of three ways to the end."""

import math

from fastgpt.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, fraction: float) -> float:
    """Of the step after `step`, the run being `fraction` done: which counts under --minutes.

    cosine: as nanoGPT's, from lr after the warm-up to min_lr at lr_decay_steps, and min_lr on.
    constant-then-decay: lr, and linearly to min_lr in the last decay_fraction before that.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return config.lr
    ratio = _decayed(config, step) if config.minutes is None else min(fraction, 1.0)
    if config.schedule == "cosine":
        weight = 0.5 * (1 + math.cos(math.pi * ratio))
    else:
        weight = min(1.0, (1 - ratio) / config.decay_fraction)
    return config.min_lr + weight * (config.lr - config.min_lr)


def _decayed(config: TrainConfig, step: int) -> float:
    """How far from the end of the warm-up to that of the decay."""
    end = config.lr_decay_steps or config.steps
    return min((step - config.warmup) / (end - config.warmup), 1.0) if step < end else 1.0
