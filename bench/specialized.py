"""The fused GEMM with and without warp specialisation, in a process that can be killed.

    python -m bench.specialized --tokens 16384 --width 768

The compiler builds it for sm_90 without having promised to: a race between its warps would show as
a result that differs now and then, or as a hang. Prints a JSON line per variant.
"""

import argparse
import functools
import json
import statistics
import sys
from typing import Any

import torch

from bench.harness.ceilings import in_turns
from fastgpt.commands.tune import distance
from fastgpt.kernels import _tuned, gemm_tma

Row = dict[str, Any]
REPEATS = 50


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.specialized", description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(json.dumps({"variant": "specialized", "problem": "needs a CUDA GPU"}))
        return 0
    M, C = args.tokens, args.width
    x, w, b = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((M, C), (4 * C, C), (4 * C,))
    )
    plain = functools.partial(gemm_tma.fc, x, w * C**-0.5, b, False)

    def special() -> tuple[torch.Tensor, torch.Tensor]:
        with _tuned.trying("gemm_tma_fc", gemm_tma.SPECIALIZED):
            return plain()

    first = special()
    differ = sum(not all(map(torch.equal, special(), first)) for _ in range(REPEATS))
    checked: Row = {"error": distance(first, plain()), "differ": differ, "of_runs": REPEATS}
    times = in_turns({"plain": plain, "specialized": special}, torch.device("cuda"), args.seconds)
    for variant, samples in times.items():
        row: Row = {"op": "fc + GELU", "variant": variant}
        row["microseconds"] = 1e6 * statistics.median(samples)
        print(json.dumps(row | (checked if variant == "specialized" else {})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
