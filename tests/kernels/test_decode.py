"""A decoding step's functions: in Triton, in C and in PyTorch, against float64."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt import reference
from fastgpt.decoding import eager, step_in_c
from fastgpt.kernels import decode, decode_linear
from tests.close import DEVICE, EPS_BUDGET, randn

pytestmark = pytest.mark.ops("decode")

ROOT = Path(__file__).parents[2]
RUNS = {"triton": decode, "eager": eager}
if DEVICE == "cpu" and step_in_c.unsupported((torch.empty(1),), 16) is None:
    RUNS = {"native": step_in_c} | RUNS  # the soonest done, and the soonest to show what is wrong


@pytest.fixture(params=RUNS)
def run(request):
    return RUNS[request.param]


@pytest.fixture
def low(run, dtype) -> torch.dtype:
    """Of weights, caches and embeddings."""
    if run is step_in_c and dtype == torch.float16:
        return torch.bfloat16
    return dtype


def assert_close(ours: Tensor, truth: Tensor, low: torch.dtype, eager_rounds: bool) -> None:
    """Activations are fp32, or two numbers of the weights' dtype; PyTorch's matmuls take one."""
    assert ours.dtype == torch.float32
    error, scale = (ours.double() - truth).abs().max(), truth.abs().max() + 1
    eps, exact = torch.finfo(low).eps, 8 * EPS_BUDGET[torch.float32] * 1.2e-7
    limit = 4 * eps if eager_rounds else max(exact, eps**2)
    assert error <= limit * scale, (error, scale)


def settle() -> None:
    """Weights and caches are read while kernels in front still run; a step's `embed` waits for all
    that was before.
    """
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def rounds(run, rows: int) -> bool:
    """Whether PyTorch's matmuls run, or rows are normed into the weights' dtype."""
    most = min(decode_linear.MAX_NORMED_ROWS, decode_linear.most_rows(torch.float16))
    return run is eager or (run is decode and rows > most)


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


LINEARS = {  # norm, bias of both, residual, GELU
    "plain": (False, False, False, None),
    "norm": (True, True, False, None),
    "norm without bias": (True, False, False, None),
    "norm, gelu": (True, True, False, "none"),
    "norm, tanh": (True, True, False, "tanh"),
    "residual": (False, True, True, None),
}


@pytest.mark.parametrize("case", LINEARS)
@pytest.mark.parametrize(
    "M, N, K", [(1, 7, 5), (3, 33, 100), (1, 130, 257), (8, 9, 300), (40, 20, 33), (65, 9, 20)]
)
def test_linear(run, low, case, M, N, K):
    with_norm, with_bias, with_residual, approximate = LINEARS[case]
    x, weight = 3 + randn(M, K), randn(N, K, dtype=low, scale=K**-0.5)
    bias = randn(N) if with_bias else None
    norm = (1 + randn(K, scale=0.1), randn(K) if with_bias else None) if with_norm else None
    residual = randn(M, N) if with_residual else None
    truth = reference.decode_linear(
        x.double(), weight.double(), *double(bias),
        None if norm is None else tuple(double(*norm)), *double(residual), approximate,
    )  # fmt: skip
    out = torch.full((M, N), math.nan, device=DEVICE) if residual is None else residual
    given = [t.clone() for t in (x, weight)]
    settle()
    run.linear(out, x, weight, bias, norm, residual, approximate)
    assert torch.equal(x, given[0]) and torch.equal(weight, given[1])
    assert_close(out, truth, low, rounds(run, M) and low != torch.float32)


def in_8_bits(N: int, K: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A weight, and what it stands for."""
    values = torch.randint(-127, 128, (N, K), device=DEVICE, dtype=torch.int8)
    scales = randn(N, scale=0.01).abs().bfloat16().float()
    return (values, scales), values.double() * scales.double()[:, None]


@pytest.mark.parametrize("case", ["plain", "norm, gelu", "residual"])
@pytest.mark.parametrize(
    "M, N, K", [(1, 7, 5), (3, 33, 100), (5, 16, 64), (40, 20, 33), (65, 16, 64)]
)
def test_linear_of_int8(run, case, M, N, K):
    with_norm, with_bias, with_residual, approximate = LINEARS[case]
    x, (weight, dense) = 3 + randn(M, K), in_8_bits(N, K)
    bias = randn(N) if with_bias else None
    norm = (1 + randn(K, scale=0.1), randn(K)) if with_norm else None
    residual = randn(M, N) if with_residual else None
    wide = None if norm is None else tuple(double(*norm))
    truth = reference.decode_linear(
        x.double(), dense, *double(bias), wide, *double(residual), approximate
    )
    out = torch.full((M, N), math.nan, device=DEVICE) if residual is None else residual
    settle()
    run.linear(out, x, weight, bias, norm, residual, approximate)
    assert_close(out, truth, torch.bfloat16, rounds(run, M))


@pytest.mark.skipif("native" not in RUNS, reason="there is no C compiler")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_row_in_c_gives_the_same_bits_alone(kind):
    """What prompt lookup's tokens being the same ones rests on."""
    for N, K in ((7, 100), (9, 257), (1, 5)):
        x, dense = randn(6, K), randn(N, K, dtype=getattr(torch, kind.replace("int8", "float32")))
        weight = in_8_bits(N, K)[0] if kind == "int8" else dense
        for rows in (2, 4, 6):
            together, alone = torch.empty(rows, N), torch.empty(1, N)
            step_in_c.linear(together, x[:rows], weight, None)
            for row, found in zip(x[:rows], together, strict=True):
                step_in_c.linear(alone, row[None], weight, None)
                assert torch.equal(alone[0], found)


def test_definition_of_int8():
    (weight, dense), x, bias, residual = in_8_bits(6, 9), randn(2, 9), randn(6), randn(2, 6)
    wide = double(x, bias, residual)
    found = reference.decode_linear(wide[0], weight, wide[1], None, wide[2])
    expected = reference.decode_linear(wide[0], dense, wide[1], None, wide[2])
    torch.testing.assert_close(found, expected)


def test_attention_projected_by_int8(run):
    qkv, x, bias, (weight, dense) = randn(2, 3 * 32), randn(2, 32), randn(32), in_8_bits(32, 32)
    keys, values = (randn(2, 2, 9, 16) for _ in range(2))
    positions = torch.tensor([4, 8], device=DEVICE, dtype=torch.int32)
    y = reference.decode_attention_(keys.double(), values.double(), qkv.double(), positions)
    truth = x.double() + y @ dense.t() + bias.double()
    settle()
    run.attend_project(x, qkv, keys, values, positions, 9, weight, bias)
    assert_close(x, truth, torch.bfloat16, rounds(run, 2))


ATTENTIONS = [  # texts, heads, capacity, head dim, tokens of each text, one after the other
    (1, 1, 1, 16, 1),
    (1, 1, 4, 16, 4),
    (1, 1, 65, 8, 1),  # full, its last chunk has one position
    (2, 3, 70, 50, 3),
    (1, 3, 140, 50, 1),  # one row, whose chunks its projection joins
    (3, 2, 140, 64, 1),
    (1, 2, 300, 7, 5),
    (1, 1, 150, 128, 1),
    (2, 1, 90, 200, 2),  # smaller chunks of a wide head
    (1, 1, 1100, 8, 1),  # more chunks than the projection joins
    (17, 1, 70, 8, 1),  # two blocks of rows
]


@pytest.mark.parametrize("B, H, S, D, new", ATTENTIONS)
@pytest.mark.parametrize("filled", ["nothing", "some", "all"])
def test_attention_and_its_projection(run, low, B, H, S, D, new, filled):
    """Memory behind the positions is NaN: it must not be read, nor written to but at them."""
    furthest = {"nothing": 0, "some": (S - new) // 2, "all": S - new}[filled]
    first = torch.tensor([max(0, furthest - 3 * b) for b in range(B)], device=DEVICE)
    positions = (first[:, None] + torch.arange(new, device=DEVICE)).flatten().int()
    qkv, C = 2 * randn(B * new, 3 * H * D), H * D
    keys, values = (randn(B, H, S, D, dtype=low) for _ in range(2))
    for cache in (keys, values):
        for b, position in enumerate(first.tolist()):
            cache[b, :, position:] = math.nan
    weight, bias, x = randn(C, C, dtype=low, scale=C**-0.5), randn(C), randn(B * new, C)
    wide_keys, wide_values = keys.double(), values.double()
    rounded = qkv.clone()
    rounded[:, C:] = qkv[:, C:].to(low)
    y = reference.decode_attention_(wide_keys, wide_values, rounded.double(), positions)
    truth = x.double() + y @ weight.double().t() + bias.double()
    settle()
    run.attend_project(x, qkv, keys, values, positions, furthest + new, weight, bias)
    assert_close(x, truth, low, rounds(run, len(x)) and low != torch.float32)
    torch.testing.assert_close(keys.double(), wide_keys, equal_nan=True)
    torch.testing.assert_close(values.double(), wide_values, equal_nan=True)


def test_attention_is_sdpa(dtype):
    """The definition, of a full cache."""
    keys, values, qkv = randn(2, 3, 9, 8), randn(2, 3, 9, 8), randn(2, 72)
    y = reference.decode_attention_(keys, values, qkv, torch.tensor([8, 8], device=DEVICE))
    q, k, v = reference.split_heads(qkv[:, None], 3)
    assert torch.equal(keys[:, :, -1:], k) and torch.equal(values[:, :, -1:], v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
    torch.testing.assert_close(y, expected.transpose(1, 2).reshape(2, 24))


def test_embedding(run, low):
    wte, wpe = randn(11, 24, dtype=low), randn(9, 24, dtype=low)
    ids = torch.tensor([3, 10, 0], device=DEVICE)
    positions = torch.tensor([0, 8, 2], device=DEVICE, dtype=torch.int32)
    out = torch.full((3, 24), math.nan, device=DEVICE)
    settle()
    run.embed(out, ids, positions, wte, wpe)
    assert torch.equal(out, wte[ids].float() + wpe[positions.long()].float())


@pytest.mark.parametrize("run", ["triton"], indirect=True)
def test_an_id_outside_the_vocabulary_is_nan(run):
    """What follows is NaN then, and is noticed; nothing is read from outside the table."""
    ids = torch.tensor([11, 3, -1, 2**40], device=DEVICE)
    positions, out = torch.zeros(4, device=DEVICE, dtype=torch.int32), randn(4, 24)
    settle()
    run.embed(out, ids, positions, randn(11, 24), randn(9, 24))
    assert out.isnan().all(1).tolist() == [True, False, True, True]


def test_positions_go_on_up_to_the_last(run):
    positions = torch.tensor([0, 7, 8, 3], device=DEVICE, dtype=torch.int32)
    last = torch.tensor([8, 8, 8, 3], device=DEVICE, dtype=torch.int32)
    settle()
    run.advance(positions, last)
    assert positions.tolist() == [1, 8, 8, 3]


def test_weights_are_read_before_the_wait():
    """Where kernels start early: else that gains nothing. What is not a weight, or of an earlier
    step, is read and written behind it. On other GPUs there is no waiting.
    """
    pytest.importorskip("triton.language.extra.cuda.gdc", reason="Triton 3.4's early starts")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.early_starts"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for name, (before, _, stores) in found["sm_90"].items():
        assert stores == 0 and bool(before) == (name != "_join_kernel"), (name, before, stores)
    assert {name: after for name, (_, after, _) in found["sm_90"].items() if not after} == {}
    assert set(found["sm_80"].values()) == {None}
    assert found["sm_90"].keys() == found["sm_80"].keys() - {"_embed_kernel"}
