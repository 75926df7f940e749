"""Every op at the sizes of a training step, in bf16: against float64, and against itself."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import backend, ops, reference, use_backend
from fastgpt.examples import example
from tests.close import DEVICE, assert_as_accurate, randn
from tests.gpu.cases import DROPOUT, GPT2, SMALL, cases
from tests.gpu.here import HALF, ON_GPU, needs_gpu, size

pytestmark = needs_gpu
ROOT = Path(__file__).parents[2]
REAL = size(GPT2, SMALL)
# D and T: padded in registers, beside a block's edge in time
HEAD_DIMS = size((40, 64, 72, 80, 96, 100, 128, 160, 200, 256), (40,))
LENGTHS = size((1023, 1024, 1025), (31, 33))
RUNS = size(50, 2)
CASES = cases()
NAMES = [pytest.param(n, marks=pytest.mark.ops(case.args[0])) for n, case in CASES.items()]
BOTH_ATTENTIONS = pytest.mark.ops("causal_attention", "packed_causal_attention")


@pytest.mark.parametrize("name", [name for name in NAMES if name.values != (DROPOUT,)])
def test_real_sizes(name):
    case = CASES[name](REAL, HALF)
    assert_as_accurate(case.ours, case.ref, *case.inputs, grads=case.grads)


@BOTH_ATTENTIONS
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_dims(D, T):
    H = 2
    qkv, grads = randn(1, T, 3 * H * D, dtype=HALF), [randn(1, T, H * D, dtype=HALF)]
    ours, ref = (functools.partial(m.packed_causal_attention, n_head=H) for m in (ops, reference))
    assert_as_accurate(ours, ref, qkv, grads=grads)


@BOTH_ATTENTIONS
@pytest.mark.parametrize("name", ["cudnn", "flash", "hybrid", "flash-attn"])
def test_attention_of_others(name):
    """SDPA held to one backend, also under our backward, and flash-attn: dispatch may take them."""
    H, T, D = 4, LENGTHS[1], 64
    qkv, grads = randn(2, T, 3 * H * D, dtype=HALF), [randn(2, T, H * D, dtype=HALF)]
    facts = {"head_dim": D, "dropout_p": 0.0}
    problem = backend.why_not("packed_causal_attention", name, (qkv,), facts)
    if problem is not None:
        pytest.skip(f"{name}: {problem}")
    held = backend.implementation("packed_causal_attention", name)
    theirs = held.packed_causal_attention
    ours, ref = (
        functools.partial(f, n_head=H) for f in (theirs, reference.packed_causal_attention)
    )
    assert_as_accurate(ours, ref, qkv, grads=grads)


@pytest.mark.skipif(not ON_GPU, reason="a CPU has one kind of attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_block_is_fused_in_every_dtype(dtype):
    (qkv,), _, facts = example("block", GPT2, DEVICE, dtype)
    choice = backend.explain("block", (qkv,), facts)
    assert choice.implementation == "triton", choice.reason


@pytest.mark.parametrize("name", NAMES)
def test_fifty_runs_give_the_same_bits(name):
    """A race, or a sum in the order of arrival, would show sooner or later."""
    case = CASES[name](REAL, HALF)
    with use_backend("triton"):
        first = case.run()
        for _ in range(RUNS - 1):
            assert all(torch.equal(a, b) for a, b in zip(case.run(), first, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_on_the_second_gpu_while_the_first_is_current(name):
    """That every launch enters its tensors' device is tested in test_backend.py."""
    if ON_GPU and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    there = size("cuda:1", "cpu")
    case = CASES[name](SMALL, torch.float32)
    moved = case._replace(
        inputs=[t if t is None else t.to(there) for t in case.inputs],
        grads=[g.to(there) for g in case.grads],
    )
    with use_backend("triton"):
        expected, found = case.run(), moved.run()
    assert all(t.device == torch.device(there) for t in found)
    torch.testing.assert_close([t.to(DEVICE) for t in found], expected)


@pytest.mark.parametrize("tool", size(("memcheck", "racecheck"), ("none",)))
def test_compute_sanitizer(tool):
    """memcheck: accesses out of bounds. racecheck: unordered accesses to shared memory."""
    sanitizer = shutil.which("compute-sanitizer")
    if ON_GPU and sanitizer is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not on PATH")
    watched = [sanitizer, "--tool", tool, "--error-exitcode", "9"] if sanitizer else []
    command = [*watched, sys.executable, "-m", "tests.gpu.small"]
    # one allocation per tensor: else what lies beyond one's end is memory of PyTorch's too
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"{len(CASES)} ops ran" in done.stdout
