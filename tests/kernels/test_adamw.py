"""AdamW's kernels alone, against float64: whole blocks and what is beyond them, at any address."""

import pytest
import torch

from fastgpt.kernels import adamw
from tests.close import DEVICE, LAYOUTS, randn

pytestmark = pytest.mark.ops("adamw")

SIZES = [1, 1023, 1024, 8192, 8193, 20_000]
LR, BETAS, EPS, SCALE = 1e-2, (0.9, 0.95), 1e-8, 0.3
TENSORS = ("p", "m", "v", "copy", "grad")


def given(misaligned=None):
    """p, m, v, copy or None, grad of every size; those of one name at no multiple of 16 bytes."""
    rows = []
    for i, size in enumerate(SIZES):
        row = dict(zip(TENSORS, (randn(size) for _ in TENSORS), strict=True))
        row["v"].abs_()
        row["copy"] = row["copy"].half()
        if misaligned:
            row[misaligned] = LAYOUTS["offset"](row[misaligned])
        if i == 2:
            row["copy"] = None
        rows.append(row)
    return rows


def tables(rows):
    numbers = adamw.table([tuple(row[name] for name in TENSORS) for row in rows])
    table = torch.tensor(numbers, device=DEVICE).view(-1, 6)
    return table, adamw.chunks([row["p"] for row in rows])


@pytest.mark.parametrize("misaligned", [None, *TENSORS])
def test_update(misaligned):
    rows = given(misaligned)
    decay = torch.linspace(0, 0.5, len(rows), device=DEVICE)
    corrections = torch.rand(len(rows), 2, device=DEVICE) + 0.1
    truth = []
    for row, wd, (c1, c2) in zip(rows, decay.double(), corrections.double(), strict=True):
        p, m, v, g = (row[name].double() for name in ("p", "m", "v", "grad"))
        g = g * SCALE
        m, v = m + (1 - BETAS[0]) * (g - m), BETAS[1] * v + (1 - BETAS[1]) * g * g
        truth.append((p * (1 - LR * wd) - LR / c1 * m / ((v / c2).sqrt() + EPS), m, v))
    scale = torch.tensor(SCALE, device=DEVICE)
    grads = [row["grad"].clone() for row in rows]
    adamw.launch_update(
        *tables(rows), scale, corrections, decay, LR, BETAS, EPS, torch.float16
    )  # fmt: skip
    for row, (p, m, v), grad in zip(rows, truth, grads, strict=True):
        for ours, exact in ((row["p"], p), (row["m"], m), (row["v"], v)):
            torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-6)
        assert torch.equal(row["grad"], grad)
        assert row["copy"] is None or torch.equal(row["copy"], row["p"].half())


@pytest.mark.parametrize("misaligned", [None, "grad"])
def test_sum_of_squares(misaligned):
    rows = given(misaligned)
    exact = sum(row["grad"].double().square().sum() for row in rows)
    ours = adamw.sum_of_squares(*tables(rows))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)


def test_a_scale_of_nan_changes_nothing():
    rows = given()
    before = [{name: t.clone() for name, t in row.items() if t is not None} for row in rows]
    ones = torch.ones(len(rows), 2, device=DEVICE)
    nan = torch.tensor(float("nan"), device=DEVICE)
    adamw.launch_update(*tables(rows), nan, ones, ones[:, 0], LR, BETAS, EPS, torch.float16)
    for row, was in zip(rows, before, strict=True):
        assert all(torch.equal(row[name], t) for name, t in was.items())
