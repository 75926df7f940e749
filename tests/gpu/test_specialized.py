"""Does the fused GEMM with specialised warps have a race? The compiler builds it for sm_90 without
having promised to: a result would differ now and then, or a run hang. So it runs after all others.
"""

import pytest
import torch

from fastgpt.kernels import _tuned, gemm_tma
from tests.close import randn
from tests.gpu.here import HALF, ON_GPU

RUNS = 50


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device; this machine has none")
def test_warps_that_only_load_keep_in_step():
    M, C = 16384, 768
    x, w, b = (randn(*shape, dtype=HALF) for shape in ((M, C), (4 * C, C), (4 * C,)))
    if not gemm_tma.takes(x, w):
        pytest.skip("this GPU has no TMA")
    plain = gemm_tma.fc(x, w * C**-0.5, b, False)
    with _tuned.trying("gemm_tma_fc", gemm_tma.SPECIALIZED):
        first = gemm_tma.fc(x, w * C**-0.5, b, False)
        for _ in range(RUNS):
            again = gemm_tma.fc(x, w * C**-0.5, b, False)
            assert all(map(torch.equal, again, first))
    for a, b in zip(first, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
