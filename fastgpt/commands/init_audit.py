"""Is every parameter drawn as init.py specifies?

A parameter of n independent draws from N(0, s) has a mean from N(0, s/sqrt(n)) and, to first order,
a deviation from N(s, s/sqrt(2n)): both become z-scores. Its shape is judged by the Kolmogorov-
Smirnov distance D to N(0, s), which exceeds e with probability 2 exp(-2 n e^2) at most, for any n
(Dvoretzky, Kiefer, Wolfowitz; Massart). The limits share the risk of a false alarm between all
tests on a model (Bonferroni), so that CONFIDENCE is that of the whole verdict.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt import init
from fastgpt.model import GPT

CONFIDENCE = 0.999  # that a model drawn as specified passes every test
_BINS = 1000  # of the empirical distribution, equally likely; fewer points only make D smaller


class Row(NamedTuple):
    """What one parameter should be, what it is, and how far apart the two are."""

    name: str
    shape: tuple[int, ...]
    specified: tuple[float, float]  # mean and deviation
    measured: tuple[float, float]
    deviations: tuple[float, float, float]  # see `deviations`
    ok: bool


def specified(model: GPT) -> dict[str, tuple[float, float]]:
    """Mean and deviation of every parameter as init.py specifies them. Deviation 0: a constant."""
    linear, residual = init.linear_std(model.config), init.residual_std(model.config)
    drawn = {"wte": init.EMBEDDING_STD, "wpe": init.EMBEDDING_STD}
    drawn |= {"c_attn": linear, "c_fc": linear, "c_proj": residual}
    expected = {}
    for name, _ in model.named_parameters():
        layer, kind = name.split(".")[-2:]
        mean = 1.0 if layer.startswith("ln_") and kind == "weight" else 0.0
        expected[name] = mean, drawn.get(layer, 0.0) if kind == "weight" else 0.0
    return expected


def deviations(x: Tensor, std: float) -> tuple[float, float, float]:
    """How far x is from draws of N(0, std): z of its mean, z of its deviation, sqrt(n) * D."""
    x, n = x.detach().flatten().double(), x.numel()
    z_mean = x.mean().item() / std * math.sqrt(n)
    z_std = (x.std().item() / std - 1) * math.sqrt(2 * n)
    at = torch.linspace(1 / _BINS, 1, _BINS, dtype=torch.float64)
    below = torch.histc(torch.special.ndtr(x / std), bins=_BINS, min=0, max=1).cumsum(0) / n
    distance = (below - at).abs().max().item()
    return z_mean, z_std, math.sqrt(n) * distance


def limits(parameters: int) -> tuple[float, float, float]:
    """The largest |deviations| that `parameters` drawn tensors may show at CONFIDENCE."""
    alpha = (1 - CONFIDENCE) / (3 * parameters)
    z = NormalDist().inv_cdf(1 - alpha / 2)
    return z, z, math.sqrt(math.log(2 / alpha) / 2)


def audit(model: GPT) -> list[Row]:
    """Every parameter against its specification, constants exactly."""
    expected, rows = specified(model), []
    bounds = limits(sum(std > 0 for _, std in expected.values()))
    for name, p in model.named_parameters():
        mean, std = expected[name]
        if std:
            far = deviations(p, std)
            ok = all(abs(d) <= bound for d, bound in zip(far, bounds, strict=True))
        else:
            far, ok = (0.0, 0.0, 0.0), bool((p == mean).all())
        x = p.detach().double()
        measured = x.mean().item(), x.std(correction=0).item()
        rows.append(Row(name, tuple(p.shape), (mean, std), measured, far, ok))
    return rows
