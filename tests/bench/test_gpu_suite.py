"""The GPU suite (tests/gpu) where there is no GPU: it says so, collects anywhere, and rehearses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.close import DEVICE
from tests.gpu.__main__ import HUGE, KERNELS, SHARED

ROOT = Path(__file__).parents[2]
OPTIONAL = ("hypothesis", "pytest_benchmark", "transformers", "matplotlib", "flash_attn")


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, *args], {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_collects_with_torch_triton_and_pytest_only():
    files = [HUGE, *SHARED, *(f"tests/{name}.py" for name in KERNELS)]
    code = f"import sys, pytest; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
    code += f"sys.exit(pytest.main(['--collect-only', *{files}]))"
    done = run("-c", code, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout[-2000:]
    assert all(f"{name}::" in done.stdout for name in files)


@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a GPU")
def test_without_a_gpu_nothing_passes():
    suite = run("-m", "tests.gpu", FASTGPT_REHEARSAL="0")
    assert suite.returncode == 2 and "No CUDA device" in suite.stdout
    alone = run("-m", "pytest", "-rs", "tests/gpu", FASTGPT_REHEARSAL="0")
    assert "needs a CUDA device" in alone.stdout and " passed" not in alone.stdout


@pytest.mark.skipif(
    DEVICE == "cuda" or os.environ.get("FASTGPT_DEEP") != "1",
    reason="a minute; make test-deep runs it, where there is no GPU",
)
def test_rehearsal(tmp_path):
    """Every test's own code runs, at toy sizes in the interpreter."""
    done = run("-m", "tests.gpu", "--out", str(tmp_path), FASTGPT_REHEARSAL="1")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:]
