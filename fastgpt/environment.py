"""What runs here and why: `fastgpt.backend_report()`, and the versions behind it."""

import getpass
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

from fastgpt import backend, devices, examples
from fastgpt.devices import cpu_info
from fastgpt.kernels import _tuned


def backend_report() -> dict[str, backend.Choice]:
    """For every op: (implementation, reason) for GPT-2's shapes on this machine's first device.

    "block" is the fused path of a whole model, "adamw" the optimizer of TrainStep.
    """
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    report = {}
    for op in backend.OPS:
        call = examples.outline(op, examples.Sizes(B=1, T=16), device, dtype)
        tensors = tuple(t for t in call.inputs if t is not None)
        try:
            report[op] = backend.explain(op, tensors, call.facts)
        except RuntimeError as error:  # mode "triton" where it cannot run
            report[op] = backend.Choice("none", str(error))
    return report


def versions() -> dict[str, str]:
    """Device and versions, as every report and benchmark record carries them."""
    on_gpu = torch.cuda.is_available()
    report = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({_cpu()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "flash-attn", "tiktoken", "transformers"):
        try:
            report[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            report[package] = "not installed"
    return report


def hardware() -> dict[str, str]:
    """What a CUDA device can do, and its driver; on a CPU, that there is none."""
    report = {"driver": _driver(), "CUDA of torch": torch.version.cuda or "none: a build for CPUs"}
    if not torch.cuda.is_available():
        nothing = "none: PyTorch sees no CUDA device"
        return report | {"capability": nothing, "peak": "a CPU's is not known"}
    device = torch.device("cuda", torch.cuda.current_device())
    properties, peak = torch.cuda.get_device_properties(device), devices.peak_flops(device)
    known = f"{peak / 1e12:,.0f} TFLOP/s in bf16, dense, by the datasheet"
    return report | {
        "capability": f"{properties.major}.{properties.minor}",
        "GPUs": str(torch.cuda.device_count()),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "peak": known if peak == peak else "not known of this device",
    }


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi on the PATH"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer: {error}"
    answer = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[0]
    return answer if done.returncode == 0 else f"nvidia-smi failed: {answer}"


def c_compiler() -> str:
    """The compiler that Triton builds its launchers with: without one no kernel can start."""
    asked_for = os.environ.get("CC")
    names = [asked_for] if asked_for else ["gcc", "clang", "cc"]
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        return f"none ({', '.join(names)}): Triton and torch.compile need one"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return path if header.exists() else f"{path}, but {header} is missing: install Python's headers"


def caches() -> dict[str, str]:
    """Where compiled and measured things lie; a wrong one is deleted by hand."""
    triton = os.environ.get("TRITON_CACHE_DIR")
    home = Path(os.environ.get("TRITON_HOME", Path.home()))
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    temporary = Path(tempfile.gettempdir(), f"torchinductor_{_user()}")
    tuned = "none: `fastgpt tune` is for a GPU"
    if torch.cuda.is_available():
        path = _tuned.path(torch.cuda.get_device_name())
        tuned = f"{path}" if path.exists() else f"{path}: none, `fastgpt tune` writes it"
    return {
        "tuned": tuned,
        "triton": _describe(Path(triton) if triton else home / ".triton/cache"),
        "inductor": _describe(Path(inductor) if inductor else temporary),
    }


def _describe(path: Path) -> str:
    return f"{path}" if path.exists() else f"{path}: not there yet"


def _user() -> str:
    try:
        return re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())  # as inductor names its folder
    except (KeyError, OSError, ImportError):  # an id without a name, as in containers
        return str(os.getuid())


def _cpu() -> str:
    """Model, instruction set and threads: what two CPUs' times can be compared by."""
    model = platform.processor() or platform.machine()
    if match := re.search(r"^model name\s*: (.+)$", cpu_info(), re.MULTILINE):
        model = match[1].strip()
    threads = torch.get_num_threads()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
