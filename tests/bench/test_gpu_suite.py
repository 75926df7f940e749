"""The GPU suite (tests/gpu) where there is no GPU: it says so, collects anywhere, and rehearses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.close import DEVICE
from tests.gpu import __main__ as suite
from tests.gpu.__main__ import HUGE, KERNELS, RACES, SHARED
from tests.gpu.shard import outcomes

ROOT = Path(__file__).parents[2]
OPTIONAL = ("hypothesis", "pytest_benchmark", "transformers", "matplotlib", "flash_attn")


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, *args], {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_collects_with_torch_triton_and_pytest_only():
    files = [HUGE, RACES, *SHARED, *(f"tests/{name}.py" for name in KERNELS)]
    code = f"import sys, pytest; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
    code += f"sys.exit(pytest.main(['--collect-only', *{files}]))"
    done = run("-c", code, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout[-2000:]
    assert all(f"{name}::" in done.stdout for name in files)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a GPU")
def test_without_a_gpu_nothing_passes():
    whole = run("-m", "tests.gpu", FASTGPT_REHEARSAL="0")
    assert whole.returncode == 2 and "No CUDA device" in whole.stdout
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


def test_nobody_waits_for_a_test_that_is_left_out(tmp_path):
    file, log = tmp_path / "test_slow.py", tmp_path / "outcomes-0.jsonl"
    file.write_text("import pytest\n@pytest.mark.slow\ndef test_a(): pass\ndef test_b(): pass\n")
    command = ["pytest", "-c", "pyproject.toml", "-m", "not slow", "-p", "tests.gpu.shard"]
    done = run("-m", *command, "--outcomes", str(log), str(file))
    assert done.returncode == 0, done.stdout
    assert [line["outcome"] for line in outcomes(tmp_path).values()] == ["passed"]


BAD_TESTS = """
import os, signal, time, pytest

@pytest.mark.parametrize("i", range(6))
def test_layer_norm(i):
    if i == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if i == 3:
        time.sleep(600)
    if i == 5:
        pytest.skip("not here")
    assert i != 4
"""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="a rehearsal")
def test_a_crash_or_a_hang_costs_one_test(tmp_path, monkeypatch, capfd):
    """The first run finds them all; with --resume nothing is run again."""
    file = tmp_path / "test_bad.py"
    file.write_text(BAD_TESTS)
    monkeypatch.setenv("FASTGPT_REHEARSAL", "1")
    for name, value in {"SHARED": [str(file)], "HUNG": 3.0, "MAX_PROCESSES": 2}.items():
        monkeypatch.setattr(suite, name, value)
    command = ["tests.gpu", "--part", "ops", "--out", str(tmp_path / "out"), "--budget"]
    monkeypatch.setattr(sys, "argv", [*command, "60"])
    assert suite.main() == 1
    found = outcomes(tmp_path / "out")
    ends = ["passed", "crashed", "passed", "hung", "failed", "skipped"]
    assert [line["outcome"] for _, line in sorted(found.items())] == ends
    said = capfd.readouterr().out
    assert "SIGSEGV" in said and "no end within 3 s" in said and "assert 4 != 4" in said
    monkeypatch.setattr(sys, "argv", [*command, "60", "--resume"])
    assert suite.main() == 1 and outcomes(tmp_path / "out") == found
    monkeypatch.setattr(sys, "argv", [*command, "0.1"])
    assert suite.main() == 3  # anew, and out of time
