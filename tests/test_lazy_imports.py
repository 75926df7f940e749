"""torch is all that fastgpt needs: the rest may be missing, and is imported when it is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.marks import slow

# What everyone does with a model, on a CPU.
TRAIN_AND_SAMPLE = """
import torch
import fastgpt
from fastgpt import GPT, GPTConfig

model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8))
idx = torch.randint(11, (2, 5))
logits, loss = model(idx, idx)
loss.backward()
assert all(p.grad is not None for p in model.parameters())
tokens = model.generate(idx, 6, top_k=3)
assert tokens.shape == (2, 11)
assert len(fastgpt.backend_report()) == len(fastgpt.backend.OPS)
print("trained and sampled")
"""

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run_python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(
    "missing", ["triton", *map(slow, ("flash_attn", "tiktoken", "transformers", "numpy"))]
)
def test_trains_and_samples_without(missing):
    out = run_python(WITHOUT.format(missing=missing) + TRAIN_AND_SAMPLE)
    assert out.endswith("trained and sampled\n")


def test_an_import_of_fastgpt_brings_torch_and_nothing_else():
    """Compared with `import torch`, which brings in what it likes of them; sympy at once or, in
    some releases, with its own modules that come later.
    """
    code = "import sys, torch; before = set(sys.modules); import fastgpt;"
    new = run_python(f"{code} print(*sorted(set(sys.modules) - before))").split()
    assert "fastgpt.model" in new
    allowed = {"fastgpt", "torch", "sympy", "mpmath", *sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in new} <= allowed


def test_an_import_computes_nothing_and_asks_the_machine_nothing():
    """No op of PyTorch's, and no file but Python's: what a CPU needs waits for its first use."""
    code = """
import sys, torch
from torch.utils._python_dispatch import TorchDispatchMode
seen = []

class Ops(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        seen.append(str(op))
        return op(*args, **(kwargs or {}))

def opened(event, details):
    if event == "open" and str(details[0]).startswith("/proc"):
        seen.append(details[0])

sys.addaudithook(opened)
with Ops():
    import fastgpt
    print(*seen, "at import")
    model = fastgpt.GPT(fastgpt.GPTConfig(4, 5, n_layer=1, n_head=1, n_embd=4))
    seen.clear()
    idx = torch.zeros(1, 4, dtype=torch.int64)
with fastgpt.use_backend("auto"):
    model(idx, idx)
print("/proc/cpuinfo" in seen)
"""
    imported, used = run_python(code).splitlines()[0::2]
    assert imported == "at import"
    assert used == str(sys.platform == "linux")


def test_a_missing_triton_is_the_reason_that_is_given():
    code = """
import torch, fastgpt
from tests.marks import slow
fastgpt.use_backend("triton")
print(fastgpt.backend_report()["mlp"].reason)
"""
    out = run_python(WITHOUT.format(missing="triton") + code)
    assert "cannot run mlp" in out and "No module named 'triton'" in out
