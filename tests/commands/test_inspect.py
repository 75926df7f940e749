"""Every kernel compiles ahead of time, without a GPU, into code worth launching."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt.commands.inspect import SHARED_LIMITS, compilable
from tests.marks import slow

triton = pytest.importorskip("triton", reason="the compiler under test")

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
DESCRIPTORS = hasattr(triton.language, "make_tensor_descriptor")

ROOT = Path(__file__).parents[2]
KERNELS = {  # file.kernel -> whether its work is matrix products
    "_launch.probe_kernel": False,
    "adamw.adamw_kernel": False,
    "adamw.square_kernel": False,
    "attention.mask_kernel": False,
    "attention_backward.dkdv_kernel": True,
    "attention_backward.dq_kernel": True,
    "attention_forward.forward_kernel": True,
    "cross_entropy.backward_kernel": False,
    "cross_entropy.forward_kernel": False,
    "cross_entropy.in_place_kernel": False,
    "cross_entropy.rescale_kernel": False,
    "decode.attend_kernel": False,
    "decode.embed_kernel": False,
    "decode.join_kernel": False,
    "decode.project_kernel": False,
    "decode_linear.row_kernel": False,
    "decode_linear.rows_kernel": True,
    "embedding.add_rows_kernel": False,
    "gelu.gelu_backward_kernel": False,
    "gelu.gelu_kernel": False,
    "gemm_gelu.gemm_gelu_kernel": True,
    "gemm_tma.dgrad_kernel": True,
    "gemm_tma.fc_kernel": True,
    "layer_norm.backward_kernel": False,
    "layer_norm.forward_kernel": False,
    "layer_norm.sum_kernel": False,
}
TMA = {name for name in KERNELS if name.startswith("gemm_tma.")}  # sm_90 on, 16-bit operands
NEWER = TMA | {"decode_linear.rows_kernel"}  # than Triton 3.3
NEW = [arch for arch in ("sm_100",) if arch in compilable()]  # none for Triton 3.2


def inspect(*args: str, root: Path = ROOT) -> list[dict]:
    """In a process of its own: here the interpreter may have taken the compiler's place."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgpt", "inspect", "--json", *args]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["bf16 on sm_90", slow("every dtype and GPU")])
def compiled(request):
    """Every kernel. Of sm_80, which gets sm_89's instructions and has more shared memory, some."""
    bf16 = "--dtype", "bfloat16"
    if request.param == "bf16 on sm_90":
        return inspect("--arch", "sm_90", *bf16)
    everywhere = inspect("--arch", "sm_90") + inspect("--arch", "sm_80", *bf16, "--kernel", "gemm")
    return everywhere + inspect("--arch", "sm_89", *(f"--arch={arch}" for arch in NEW), *bf16)


def on_hopper(compiled):
    return [row for row in compiled if row["arch"] == "sm_90"]


def test_every_kernel_is_compiled(compiled):
    """The list above is complete: it is every @triton.jit function that ends in _kernel."""
    sources = {
        f"{path.stem}.{line.split('(')[0].removeprefix('def _')}"
        for path in (ROOT / "kernels").glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    }
    assert sources == set(KERNELS)
    for arch in {row["arch"] for row in compiled} - {"sm_80"}:
        missing = (TMA if arch == "sm_89" else set()) if DESCRIPTORS else NEWER
        expected = set(KERNELS) - missing
        assert {row["kernel"] for row in compiled if row["arch"] == arch} == expected


def test_shared_memory_fits(compiled):
    for row in compiled:
        limit = SHARED_LIMITS[int(row["arch"].removeprefix("sm_"))]
        assert row["shared_bytes"] <= limit, row


def may_spill(row: dict) -> bool:
    """The exceptions."""
    if row["kernel"] == "gemm_gelu.gemm_gelu_kernel":  # off tensor cores, K masked
        return row["config"]["PRECISION"] == "ieee" and not row["config"]["EVEN_K"]
    if row["kernel"] == "layer_norm.backward_kernel":
        return row["config"]["BLOCK_N"] > 8192  # dw and db of such a row fill half the registers
    if row["kernel"] == "decode.attend_kernel":  # three instructions, which hold masks
        return TRITON >= (3, 8) and row["spills"] < 4
    if row["kernel"] == "decode_linear.row_kernel":
        return TRITON < (3, 6) and row["spills"] < 10
    # Triton 3.2 takes more registers than later ones for five of the same sources
    return row["kernel"].startswith("attention_") and TRITON < (3, 6) and row["spills"] < 100


def test_hopper_code_does_not_spill(compiled):
    assert [row for row in on_hopper(compiled) if row["spills"] and not may_spill(row)] == []


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["every dtype and GPU"], indirect=True)
def test_tf32_runs_on_tensor_cores(compiled):
    rows = [row for row in on_hopper(compiled) if row["config"].get("PRECISION") == "tf32"]
    assert {row["kernel"] for row in rows} == {n for n, dots in KERNELS.items() if dots} - (
        TMA if DESCRIPTORS else NEWER
    )
    assert all(row["tensor_core"] in ("mma", "wgmma") for row in rows)


def test_offsets_hold_more_than_32_bits(compiled):
    assert [row for row in compiled if row["narrow_offsets"]] == []


@pytest.mark.slow
def test_an_offset_of_32_bits_is_noticed(tmp_path):
    """In a copy of the kernels whose rows and program ids are never widened."""
    shutil.copytree(ROOT / "fastgpt", tmp_path / "fastgpt", symlinks=True)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    for path in (tmp_path / "kernels").glob("*.py"):
        path.write_text(path.read_text().replace(".to(tl.int64)", ""))
    kernels = "--kernel", "gelu.gelu_kernel", "--kernel", "attention_forward"  # flat; strides
    rows = inspect("--arch", "sm_90", "--dtype", "bfloat16", *kernels, root=tmp_path)
    assert {row["kernel"] for row in rows} == {
        "gelu.gelu_kernel",
        "attention_forward.forward_kernel",
    }
    assert all(row["narrow_offsets"] for row in rows)


def test_matrix_products_run_on_tensor_cores(compiled):
    """In 16 bits; fp32 is IEEE by default and stays off them."""
    for row in compiled:
        if not KERNELS[row["kernel"]] or row["config"]["dtypes"].startswith("fp32"):
            continue
        if row["arch"] != "sm_90":
            assert row["tensor_core"] in ("mma", "tcgen05"), row
        elif row["kernel"].startswith("attention_backward") and row["config"]["D"] > 128:
            # tiles that do not spill are too small for wgmma
            assert row["tensor_core"] == "mma", row
        else:
            assert row["tensor_core"] == "wgmma", row


@pytest.mark.slow
def test_the_page_fits_60_columns():
    """Without --json; a row is a few lines."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgpt", "inspect", "--arch", "sm_90"]
    command += ["--dtype", "bfloat16", "--kernel", "gelu.gelu_kernel"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "gelu.gelu_kernel sm_90" and " registers, 0 spills, " in lines[2]
    assert max(map(len, lines)) <= 60


def test_unknown_arch_names_the_known_ones():
    command = [sys.executable, "-m", "fastgpt", "inspect", "--arch", "sm_70"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sm_70" in done.stderr and "sm_90" in done.stderr
