"""Clocks, temperature and power of the GPU, from nvidia-smi: a record has them before and after.

    sm_mhz, memory_mhz   clocks now; a GPU lowers them when it is hot or at its power limit
    celsius, watts       temperature and power draw now

What nvidia-smi does not say is left out; without nvidia-smi that is everything. One that hangs, as
it does when its driver is in trouble, costs TIMEOUT seconds and is not asked again.
"""

import contextlib
import functools
import math
import os
import signal
import subprocess

import torch

FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
}
TIMEOUT = 2.0
Reading = dict[str, float]
_hung = False


def reading() -> Reading:
    lines = _output().splitlines()
    cells = [cell.strip() for cell in lines[0].split(",")] if lines else []
    if len(cells) != len(FIELDS):
        return {}
    numbers = zip(FIELDS.values(), map(_number, cells), strict=True)
    return {name: number for name, number in numbers if number is not None}


def since(before: Reading) -> dict[str, Reading]:
    """What a record keeps: {"before": ..., "after": ...}, or {} where there is nothing to keep."""
    after = reading()
    return {"before": before, "after": after} if before or after else {}


def _output() -> str:
    """What nvidia-smi prints, a line per GPU; "" if it fails."""
    global _hung
    if _hung:
        return ""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    command += _which_gpu()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:  # not installed
        return ""
    try:
        printed, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        _hung = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # not waited for: the driver may keep it alive
        return ""
    return printed.decode(errors="replace") if process.returncode == 0 else ""


@functools.cache  # called before the run: after a fault PyTorch cannot name its device
def _which_gpu() -> list[str]:
    """The one that PyTorch uses, of several."""
    if not torch.cuda.is_available():
        return []
    return [f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"]


def _number(text: str) -> float | None:
    """None for "[N/A]" and for what is no finite number."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
