"""Every op once, forward and backward, on small shapes: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python -m tests.gpu.small
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import use_backend
from tests.gpu.cases import SMALL, cases
from tests.gpu.here import HALF


def main() -> None:
    with use_backend("triton"):
        for name, make in cases().items():
            for dtype in (torch.float32, HALF):
                with sdpa_kernel(SDPBackend.MATH):  # racecheck finds races in cuDNN's attention
                    case = make(SMALL, dtype)
                for t in case.run():
                    assert t.isfinite().all(), name
    print(f"{len(cases())} ops ran")


if __name__ == "__main__":
    main()
