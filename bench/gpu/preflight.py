"""Checks, in seconds, whether fastgpt's kernels would run here, before minutes are spent.

    python -m bench.gpu.preflight --out DIR

Prints a check's name, then its result as a line of JSON, so that a check that hangs or crashes is
known. The cheapest come first; each needs those before it. Triton builds its launchers with a C
compiler and Python's headers: without them every "fastgpt" row would time PyTorch. Exit code 1: a
check failed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30
MIN_DISK, MIN_MEMORY = 1.0, 8.0  # GiB
SMI_FIELDS = "name,driver_version,memory.total,memory.free,clocks.sm,temperature.gpu,power.draw"
EXTENSION = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastgpt_probe", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_fastgpt_probe(void) { return PyModule_Create(&module); }
"""
Facts = dict[str, Any]


class Refused(Exception):
    """fastgpt's kernels would not run; the message says why, and what to do."""


def packages(out: Path) -> Facts:
    facts = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "pytest", "transformers", "liger-kernel"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            raise Refused(f"{sys.executable} has no {name}: use another with PYTHON=")
    if importlib.util.find_spec("pytest") is None:
        facts["warning"] = "no pytest: the suite cannot run"
    return facts


def disk(out: Path) -> Facts:
    free = {
        str(place): shutil.disk_usage(place).free / GIB for place in (out, tempfile.gettempdir())
    }
    if min(free.values()) < MIN_DISK:
        raise Refused(f"less than {MIN_DISK:g} GiB free: {free}; give another --out or TMPDIR")
    return {"free_gib": free}


def compiler(out: Path) -> Facts:
    """Build and load a Python extension with the C compiler that Triton would use."""
    named = os.environ.get("CC")
    cc = shlex.split(named) if named else [c for c in map(shutil.which, ("gcc", "clang")) if c][:1]
    if not cc:
        raise Refused("no C compiler: Triton needs gcc or clang on PATH, or CC")
    include = sysconfig.get_path("include")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        module = source.with_name("fastgpt_probe.so")
        source.write_text(EXTENSION)
        command = [*cc, "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(module)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Refused(f"the C compiler does not work: {error}") from None
        if done.returncode:
            why = next((s for s in done.stderr.splitlines() if "error" in s), done.stderr[-200:])
            hint = "; install Python's headers (python3-dev)" if "Python.h" in why else ""
            raise Refused(f"{shlex.join(cc)} cannot build a Python extension: {why.strip()}{hint}")
        spec = importlib.util.spec_from_file_location("fastgpt_probe", module)
        assert spec is not None
        importlib.util.module_from_spec(spec)  # loads it
    return {"cc": shlex.join(cc), "headers": include}


def driver(out: Path) -> Facts:
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=8)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"warning": f"nvidia-smi does not answer: {error}"}
    if done.returncode:
        return {"warning": f"nvidia-smi: {(done.stdout + done.stderr).strip()[:200]}"}
    first = done.stdout.splitlines()[0].split(", ")
    return dict(zip(SMI_FIELDS.split(","), first, strict=False))


def device(out: Path) -> Facts:
    import torch

    from bench.harness import record
    from fastgpt.environment import versions

    facts: Facts = {"commit": record.commit(), **versions(), "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        if rehearsing():
            return facts
        raise Refused(f"torch {torch.__version__} sees no GPU; --rehearse runs toy sizes on a CPU")
    free, total = torch.cuda.mem_get_info()
    facts |= {"free_gib": free / GIB, "total_gib": total / GIB}
    facts["capability"] = list(torch.cuda.get_device_capability())
    if free / GIB < MIN_MEMORY:
        raise Refused(f"{free / GIB:.1f} GiB of GPU memory are free: others use this GPU")
    if free < 0.9 * total:
        facts["warning"] = (
            f"{free / GIB:.0f} of {total / GIB:.0f} GiB are free: others use this GPU"
        )
    return facts


def kernel(out: Path) -> Facts:
    """Compile and launch LayerNorm, and compare it with PyTorch's."""
    import torch

    from fastgpt import ops, reference, use_backend
    from fastgpt.storage.printable import first_line

    where = "cuda" if torch.cuda.is_available() else "cpu"
    if where == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        raise Refused("TRITON_INTERPRET=1: kernels would run in Triton's interpreter; unset it")
    x, w = torch.randn(8, 64, device=where), torch.randn(64, device=where)
    try:
        with use_backend("triton"):
            normed = ops.layer_norm(x, w, None)
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error):.200}"
        raise Refused(f"fastgpt's kernels do not launch: {why}") from None
    gap = (normed - reference.layer_norm(x, w, None)).abs().max().item()
    if not gap < 1e-4:
        raise Refused(f"fastgpt's LayerNorm is {gap:.2g} away from PyTorch's")
    return {"error": gap}


def backend(out: Path) -> Facts:
    from fastgpt import backend as table
    from fastgpt import backend_report

    report = backend_report()
    facts = {op: f"{choice.implementation}: {choice.reason}" for op, choice in report.items()}
    # PyTorch is expected for attention where nobody measured, and for what a measurement chose
    expected = [op for op, entry in table.OPS.items() if entry.unmeasured != "torch"]
    missing = [op for op in expected if report[op].implementation in ("torch", "none")]
    missing = [op for op in missing if not report[op].reason.startswith("measured")]
    if missing and not rehearsing():
        raise Refused(f"{missing[0]} would run in PyTorch: {report[missing[0]].reason}")
    return facts


def rehearsing() -> bool:
    return os.environ.get("FASTGPT_REHEARSAL") == "1"


CHECKS: dict[str, Callable[[Path], Facts]] = {
    "packages": packages, "disk": disk, "compiler": compiler, "driver": driver, "device": device,
    "kernel": kernel, "backend": backend,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.preflight", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."), help="where results will be written")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    args = parser.parse_args()
    for name in args.only:
        print(f"checking: {name}", flush=True)
        try:
            print(json.dumps({"check": name, "ok": True, **CHECKS[name](args.out)}), flush=True)
        except Exception as problem:  # an import that fails is no better than a refusal
            why = str(problem) if isinstance(problem, Refused) else repr(problem)[:300]
            print(json.dumps({"check": name, "ok": False, "why": why}), flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
