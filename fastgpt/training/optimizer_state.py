"""An optimizer's state out of a checkpoint: complete, and of numbers that training leaves."""

from collections.abc import Mapping
from typing import Any

import torch

from fastgpt.training.sharded import MOMENTS


def restore(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], stepped: bool) -> None:
    """Steps and moments; settings, as the weight decay, stay the optimizer's own.

    ValueError names what is missing after a run that has `stepped`, or is not finite.
    """
    own = optimizer.state_dict()["param_groups"]
    if [g["params"] for g in saved["param_groups"]] != [g["params"] for g in own]:
        raise ValueError("its optimizer is of other parameters")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in enumerate(parameters):
        state = optimizer.state.get(p, {})
        if stepped and not state:
            raise ValueError(f"its optimizer lacks the state of parameter {number}")
        for name in ("step", *MOMENTS) if state else ():
            values = torch.as_tensor(state[name])
            if not values.isfinite().all() or (name != "exp_avg" and (values < 0).any()):
                raise ValueError(f"its optimizer's {name} of parameter {number} is out of range")
