"""An optimizer's state out of a checkpoint: complete, and of numbers that training leaves."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from fastgpt.checkpoint import LARGEST_COUNT
from fastgpt.optim import MOMENTS


def restore(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], stepped: bool) -> None:
    """Steps and moments; settings, as the weight decay, stay the optimizer's own.

    ValueError names what is missing after a run that has `stepped`, or is not finite.
    """
    own = optimizer.state_dict()["param_groups"]
    groups, state = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict):
        raise ValueError("its optimizer lacks a list `param_groups` and a dict `state`")
    if [g["params"] for g in groups] != [g["params"] for g in own]:
        raise ValueError("its optimizer is of other parameters")
    optimizer.load_state_dict({"state": state, "param_groups": own})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in enumerate(parameters):
        parameter_state = optimizer.state.get(p, {})
        if stepped and not parameter_state:
            raise ValueError(f"its optimizer lacks the state of parameter {number}")
        for name in ("step", *MOMENTS) if parameter_state else ():
            if not in_range(name, torch.as_tensor(parameter_state[name])):
                raise ValueError(f"its optimizer's {name} of parameter {number} is out of range")


def in_range(name: str, values: torch.Tensor) -> bool:
    """Whether a moment or count of steps, or by any other name a weight, may have these values."""
    if name in ("step", "steps"):
        values = values.double()
        return bool(((values >= 0) & (values <= LARGEST_COUNT) & (values % 1 == 0)).all())
    least = 0.0 if name == "exp_avg_sq" else -math.inf
    return bool((values.isfinite() & (values >= least)).all())
