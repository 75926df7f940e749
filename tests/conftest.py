"""Where the tests run: on a CUDA device in every dtype, else on the CPU in Triton's interpreter.

TRITON_INTERPRET is read while triton is imported, and torch imports triton, so whether there is a
GPU has to be asked of the driver before anything else is imported.
"""

import ctypes
import os


def _has_gpu() -> bool:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return (
        cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    )


if not _has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from fastgpt import backend, use_backend  # noqa: E402
from tests import interpreter  # noqa: E402

interpreter.patch_once()
torch.set_num_threads(1)  # the tensors are small: a second thread would cost more than it gives

# The interpreter computes bf16 wrongly in every release so far (fastgpt refuses it): bf16 is for
# GPUs.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    """An op that a test is marked with has to exist."""
    marks = (mark for item in items for mark in item.iter_markers("ops"))
    if unknown := {name for mark in marks for name in mark.args} - backend.OPS.keys():
        raise pytest.UsageError(f"pytest.mark.ops: backend.OPS has no {', '.join(unknown)}")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def matmul_precision(request):
    """Of float32: a test names it as a parameter of this fixture."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _fresh():
    """Every test starts from the same seed and backend."""
    torch.manual_seed(0)
    with use_backend("auto"):
        yield
