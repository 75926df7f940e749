"""Mistakes are refused with the value that was wrong and what to do about it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig, ops, use_backend
from tests.close import DEVICE

V, BLOCK_SIZE = 23, 8
SIZES: dict[str, Any] = dict.fromkeys(("n_layer", "n_head"), 2)
SIZES |= {"block_size": BLOCK_SIZE, "vocab_size": V, "n_embd": 16}
IDS = torch.arange(10).view(2, 5)


def model(**changes) -> GPT:
    return GPT(GPTConfig(**{**SIZES, **changes}))


def attention(**how) -> Tensor:
    return ops.packed_causal_attention(torch.randn(1, 3, 96), 2, **how)


def linear_gelu(**how) -> Tensor:
    return ops.linear_gelu(torch.randn(3, 8), torch.randn(4, 8), **how)


def mlp(**how) -> Tensor:
    return ops.mlp(torch.randn(3, 8), torch.randn(4, 8), None, torch.randn(8, 4), None, **how)


class Mistake(NamedTuple):
    make: Callable[[], Any]
    error: type[Exception]
    value: str  # what the message says was wrong
    remedy: str  # and what it says instead


MISTAKES = {
    "too many tokens": Mistake(
        lambda: model()(torch.zeros(1, 9).long()), ValueError, "T=9", "crop .* block_size"
    ),
    "an id beyond the vocabulary": Mistake(
        lambda: model()(torch.tensor([[1, V]])),
        IndexError,
        "ids from 1 to 23",
        "0 to 22.*tokenizer",
    ),
    "a negative id": Mistake(
        lambda: model()(torch.tensor([[-1, 2]])), IndexError, "ids from -1 to 2", "0 to 22"
    ),
    "a target beyond the vocabulary": Mistake(
        lambda: model()(IDS, IDS + 20), IndexError, "Target 23", r"\[0, 23\)"
    ),
    "a negative target": Mistake(
        lambda: model()(IDS, IDS - 2), IndexError, "Target -2", "ignore_index=-1"
    ),
    "fewer targets than tokens": Mistake(
        lambda: model()(IDS, IDS[:, :3]), ValueError, r"\(6,\)", r"must be \(10,\)"
    ),
    "float ids": Mistake(lambda: model()(IDS.float()), TypeError, "float32", r"\.long\(\)"),
    "complex ids": Mistake(
        lambda: model()(IDS.to(torch.complex64)), TypeError, "complex64", r"\.long\(\)"
    ),
    "byte ids": Mistake(lambda: model()(IDS.byte()), TypeError, "uint8", r"\.long\(\)"),
    "int32 targets": Mistake(
        lambda: model()(IDS, IDS.int()), TypeError, "int32", r"targets .*\.long\(\)"
    ),
    "targets that want a gradient": Mistake(  # PyTorch's own refusal
        lambda: model()(IDS, IDS.clone().requires_grad_()),
        RuntimeError,
        "require gradients",
        "floating point",
    ),
    "targets on another device": Mistake(
        lambda: model()(IDS, IDS.to("meta")), RuntimeError, "targets is on meta", r"\.to\(\)"
    ),
    "ids without a batch": Mistake(
        lambda: model()(IDS[0]), ValueError, r"shape \(5,\)", r"idx\[None\]"
    ),
    "nothing to continue": Mistake(
        lambda: model()(IDS[:, :0]), IndexError, r"\(2, 0\)", "at least one token"
    ),
    "nothing to sample from": Mistake(
        lambda: model().generate(IDS[:, :0], 1), IndexError, r"\(2, 0\)", "at least one token"
    ),
    "a float prompt": Mistake(
        lambda: model().generate(IDS.float(), 1), TypeError, "float32", r"\.long\(\)"
    ),
    "a prompt without a batch": Mistake(
        lambda: model().generate(IDS[0], 1), ValueError, r"shape \(5,\)", r"idx\[None\]"
    ),
    "n_head": Mistake(lambda: model(n_head=3), ValueError, "n_head=3", "try n_embd=18"),
    "no vocabulary": Mistake(
        lambda: model(vocab_size=0), ValueError, "vocab_size=0", "an integer of at least 1"
    ),
    "a fractional width": Mistake(
        lambda: model(n_embd=16.0), ValueError, r"n_embd=16\.0", "an integer of at least 1"
    ),
    "gelu": Mistake(lambda: model(gelu="relu"), ValueError, "gelu='relu'", "'none'.*'tanh'"),
    "dropout": Mistake(lambda: model(dropout=1.5), ValueError, "1.5", "between 0 and 1"),
    "crop to more": Mistake(
        lambda: model().crop_block_size(9), ValueError, "block_size=9", "use 1 to 8"
    ),
    "crop to nothing": Mistake(
        lambda: model().crop_block_size(0), ValueError, "block_size=0", "use 1 to 8"
    ),
    "linear_gelu's approximate": Mistake(
        lambda: linear_gelu(approximate="erf"), ValueError, "'erf'", "'none'.*'tanh'"
    ),
    "mlp's approximate": Mistake(
        lambda: mlp(approximate="erf"), ValueError, "'erf'", "'none'.*'tanh'"
    ),
    "attention's dropout": Mistake(
        lambda: attention(dropout_p=-0.1), ValueError, r"dropout_p=-0\.1", r"in \[0, 1\]"
    ),
    "attention's width": Mistake(
        lambda: ops.packed_causal_attention(torch.randn(1, 3, 95), 2),
        ValueError,
        r"\(1, 3, 95\)",
        r"multiple of n_head=2",
    ),
    "attention's dimensions": Mistake(
        lambda: ops.packed_causal_attention(torch.randn(5, 48), 2), ValueError, r"5, 48", "B, T, 3C"
    ),
    "no heads": Mistake(
        lambda: ops.packed_causal_attention(torch.randn(1, 3, 96), 0), ValueError, "n_head=0", "3C"
    ),
    "the head's width": Mistake(
        lambda: ops.linear_cross_entropy(
            torch.randn(3, 8), torch.randn(5, 7), torch.zeros(3).long()
        ),
        ValueError,
        r"weight is \(5, 7\)",
        r"must be \(5, 8\)",
    ),
    "a contradiction": Mistake(
        lambda: use_backend("triton", mlp="torch"), ValueError, 'mlp="torch"', 'use "auto"'
    ),
    "backend": Mistake(
        lambda: use_backend("cuda"), ValueError, "'cuda'", "one of auto, triton, torch"
    ),
    "op": Mistake(lambda: use_backend("auto", conv="triton"), ValueError, "'conv'", "layer_norm"),
    "implementation": Mistake(
        lambda: use_backend("auto", mlp="flash-attn"), ValueError, "'flash-attn' of mlp", "cublas"
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_with_its_value_and_the_remedy(mistake):
    make, error, value, remedy = MISTAKES[mistake]
    with pytest.raises(error) as caught:
        make()
    message = str(caught.value)
    assert re.search(value, message) and re.search(remedy, message, re.DOTALL), message


def test_an_unknown_backend_in_the_environment():
    run = subprocess.run(
        [sys.executable, "-c", "import fastgpt"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "FASTGPT_BACKEND": "nonsense"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "'nonsense' in FASTGPT_BACKEND; use one of auto, triton, torch" in run.stderr


ROWS, ONES = torch.randn(6, 16, device=DEVICE), torch.ones(16, device=DEVICE)
TARGETS = torch.zeros(6, dtype=torch.long, device=DEVICE)
MISMATCHED: dict[str, Callable[[], Any]] = {
    "a weight too short": lambda: ops.layer_norm(ROWS, ONES[:8]),
    "a weight too long": lambda: ops.layer_norm(ROWS[:, :8], ONES),
    "a bias too short": lambda: ops.layer_norm(ROWS, ONES, ONES[:8]),
    "add: a weight too short": lambda: ops.add_layer_norm(ROWS, ROWS, ONES[:8]),
    "add: too few residual rows": lambda: ops.add_layer_norm(ROWS, ROWS[:3], ONES),
    "too few targets": lambda: ops.cross_entropy(ROWS, TARGETS[:4]),
    "too many targets": lambda: ops.cross_entropy(ROWS[:4], TARGETS),
    "fc weight": lambda: ops.linear_gelu(ROWS, ROWS[:4, :8]),
    "k of other heads": lambda: ops.causal_attention(
        ROWS.view(1, 2, 3, 16), ROWS.view(1, 3, 2, 16), ROWS.view(1, 3, 2, 16)
    ),
}


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("what", MISMATCHED)
def test_shapes_that_do_not_match_are_refused(what, mode):
    """A kernel that believed them would read memory that is not the tensor's."""
    with use_backend(mode), pytest.raises((ValueError, RuntimeError)):
        MISMATCHED[what]()


def test_sizes_from_numpy_are_integers_too():
    """As in `vocab_size = data.max() + 1` on a memory map of token ids."""
    sizes: dict[str, Any] = {name: numpy.int64(size) for name, size in SIZES.items()}
    logits, _ = GPT(GPTConfig(**sizes))(IDS)
    assert logits.shape == (2, 1, V)
