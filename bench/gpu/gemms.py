"""TFLOP/s of cuBLAS on every GEMM of a training step: what fastgpt's own GEMMs are held against.

    python -m bench.gpu.gemms --tokens 16384 --width 768 --vocabulary 50304

Weight gradients are written in fp32, as the fused path does. Prints a line of JSON per GEMM.
"""

import argparse
import functools
import json
import statistics
import sys
from typing import Any

import torch

from fastgpt.commands.timing import Variants, in_turns
from fastgpt.implementations.aten import wgrad


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.gemms", description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384, help="M (%(default)s)")
    parser.add_argument("--width", type=int, default=768, help="C (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=50304, help="V (%(default)s)")
    parser.add_argument("--seconds", type=float, default=6, help="of measuring (%(default)s)")
    args = parser.parse_args()
    M, C, V = args.tokens, args.width, args.vocabulary
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers = dict(qkv=(C, 3 * C), proj=(C, C), fc=(C, 4 * C), proj2=(4 * C, C), head=(C, V))
    for name, (K, N) in layers.items():
        x, w, dy = (torch.randn(s, device=device).to(dtype) for s in ((M, K), (N, K), (M, N)))
        calls: Variants = {
            "forward": functools.partial(torch.mm, x, w.t()),
            "dgrad": functools.partial(torch.mm, dy, w),
            "wgrad": functools.partial(wgrad, dy, x, torch.float32),
        }
        for direction, samples in in_turns(calls, device, args.seconds / len(layers)).items():
            median = statistics.median(samples)
            row: dict[str, Any] = {"op": name, "variant": "cuBLAS", "direction": direction}
            row["shape"], row["microseconds"] = [M, K, N], 1e6 * median
            row["teraflops_per_second"] = 2e-12 * M * K * N / median
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
