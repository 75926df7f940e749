"""What is read of the GPU's clocks, whatever nvidia-smi does, and that records have it."""

import contextlib
import os
import signal
import time

import pytest

from bench import decode
from bench.harness import machine, nvidia_smi, record

SMI = {  # what nvidia-smi does -> what is read
    "echo '1980, 2619, 45, 321.50'": {
        "sm_mhz": 1980.0, "memory_mhz": 2619.0, "celsius": 45.0, "watts": 321.5,
    },
    "printf '1980, 2619, 45, 321.50\\n1, 2, 3, 4\\n'": {
        "sm_mhz": 1980.0, "memory_mhz": 2619.0, "celsius": 45.0, "watts": 321.5,
    },
    "echo '1980, [N/A], 45, [Not Supported]'": {"sm_mhz": 1980.0, "celsius": 45.0},
    "echo 'nan, inf, -, 45'": {"watts": 45.0},
    "echo 'No devices were found'": {},
    "printf '\\377\\376, \\000, 1'": {},
    "true": {},
    "echo '1980, 2619, 45, 321.50'; exit 1": {},
}  # fmt: skip


@pytest.fixture
def fake_smi(tmp_path, monkeypatch):
    """A program of that name, first on PATH."""
    monkeypatch.setattr(nvidia_smi, "_hung", False)
    monkeypatch.setattr(nvidia_smi, "_which_gpu", lambda: [])
    path = tmp_path / "bin" / "nvidia-smi"
    path.parent.mkdir()
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)

    def write(script: str) -> None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return write


@pytest.mark.parametrize("script", SMI)
def test_clocks_temperature_and_power(fake_smi, script):
    fake_smi(script)
    assert nvidia_smi.reading() == SMI[script]
    both = {"before": SMI[script], "after": SMI[script]}
    assert nvidia_smi.since(SMI[script]) == (both if SMI[script] else {})


def test_a_hanging_nvidia_smi_costs_two_seconds_once_and_is_ended(fake_smi, tmp_path):
    fake_smi(f"trap '' TERM; echo $$ > {tmp_path}/pid; sleep 600; echo '1, 2, 3, 4'")
    start = time.monotonic()
    assert nvidia_smi.reading() == nvidia_smi.reading() == {}
    assert time.monotonic() - start < 2.5
    pid = int((tmp_path / "pid").read_text())
    with contextlib.suppress(ChildProcessError):  # subprocess may have collected it already
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_without_nvidia_smi_nothing_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(nvidia_smi, "_hung", False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi.reading() == nvidia_smi.since({}) == {}


def test_a_record_has_the_clocks_before_and_after(fake_smi, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "read_ceiling", lambda device: 1e10)
    monkeypatch.setattr(machine, "check", lambda **_: {"load": 0.0, "busy": 0.0, "spread": 0.0})
    fake_smi(f"echo x >> {tmp_path}/n; echo $((1000 + $(wc -l < {tmp_path}/n))), 2619, 45, 321.5")
    command = "--size char --device cpu --prompt 4 --new-tokens 2 --rounds 1 --variants eager"
    assert decode.main([*command.split(), "--out", str(tmp_path / "out")]) == 0
    (found,) = record.load_all(tmp_path / "out")
    clocks = {when: reading["sm_mhz"] for when, reading in found["gpu"].items()}
    assert clocks == {"before": 1001.0, "after": 1002.0}
