"""The examples are files that run, and each says at its end what it has shown."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

EXAMPLES = ROOT / "docs/examples"
SHOWN = {  # file -> what it needs, and the last thing that it prints
    "finetune.py": ("transformers", "transformers has a loss of"),
    "lora.py": ("torch", "with the adapters merged into the weights"),
    "own_transformer.py": ("torch", "after 30 steps on one batch"),
    "one_kernel.py": ("triton", "nothing goes to local memory"),
}


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHOWN)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_it_runs(name, tmp_path):
    package, said = SHOWN[name]
    pytest.importorskip(package, reason=f"{name} needs {package}")
    done = run(EXAMPLES / name, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout.splitlines()[-1]


def run(path: Path, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
