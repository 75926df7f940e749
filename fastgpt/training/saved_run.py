"""What a resumed run takes from a checkpoint besides tensors and settings, each of its kind."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SavedRun:
    steps: int
    best_val_loss: float
    seconds: float = 0.0
    data: str | None = None  # what identifies it
    run: str = ""
    losses: tuple[float, float] | None = None  # to train and validate, at `validated_at`
    validated_at: int = -1
    scaler: Mapping[str, Any] | None = None  # a GradScaler's state, of a run in fp16


def saved_run(saved: Mapping[str, Any]) -> SavedRun:
    """ValueError names what is missing or malformed. nanoGPT's checkpoints lack "fastgpt"."""
    if "iter_num" not in saved:
        raise ValueError("it lacks `iter_num`")
    extras = saved.get("fastgpt", {})
    steps = int(saved["iter_num"])  # a number, as is best_val_loss: checkpoint.py has looked
    run = SavedRun(
        steps,
        float(saved.get("best_val_loss", math.inf)),
        _number("seconds", extras.get("seconds", 0.0)),
        _text("data", extras.get("data")),
        _text("run", extras.get("run")) or "",
        _losses(extras.get("losses")),
        extras.get("validated_at", -1),
        _scaler(extras.get("scaler")),
    )
    if type(run.validated_at) is not int or not -1 <= run.validated_at <= steps:
        raise ValueError(f"`validated_at` is {run.validated_at!r:.40}, at `iter_num` {steps}")
    return run


def _number(name: str, value: Any, above: bool = False) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf or (above and value == 0):
        kind = "a finite number above 0" if above else "a finite number of at least 0"
        raise ValueError(f"`{name}` is {value!r:.40}, not {kind}")
    return float(value)


def _text(name: str, value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise ValueError(f"`{name}` is {value!r:.40}, not a text")
    return value


def _losses(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"`losses` is {value!r:.40}, not two numbers")
    return _number("losses", value[0]), _number("losses", value[1])


_SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval")


def _scaler(value: Any) -> Mapping[str, Any] | None:
    if value is None or value == {}:  # of a run that needed none
        return None
    if not isinstance(value, dict) or set(value) != {*_SCALER, "_growth_tracker"}:
        raise ValueError(f"`scaler` is {value!r:.60}, not a GradScaler's state")
    for name in _SCALER:
        _number(f"scaler's {name}", value[name], above=True)
    _number("scaler's _growth_tracker", value["_growth_tracker"])
    return value
