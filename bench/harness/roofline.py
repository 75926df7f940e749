"""What a GPT-2 training step must cost: per op its FLOPs, its bytes, and the time under which no
implementation gets.

    floor = max(FLOPs / matmul rate, bytes / copy bandwidth)

Bytes are those that a perfectly fused step still moves: every activation is written once and read
once, nothing is cast, copied or recomputed, and kernels do not overlap. Causal attention counts
half of its matrix products. Weight gradients and AdamW's state are fp32. Both rates are measured on
the device, or stand in KNOWN.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.harness.ceilings import copy_ceiling, matmul_ceiling
from bench.peers.models import SIZES
from fastgpt import weights


class Ceilings(NamedTuple):
    """What a device reaches on the work that suits it best."""

    flops: float  # FLOP/s of a large matrix product
    bandwidth: float  # bytes/s of a copy, read and written bytes together
    source: str


KNOWN = {  # bf16; for devices that are not at hand
    "NVIDIA H200": Ceilings(780e12, 4.3e12, "8192^3 bf16 matmul and a device copy on an H200"),
}


@dataclass(frozen=True)
class Work:
    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bandwidth)


class Op(NamedTuple):
    group: str  # what a profile is held against
    name: str
    times: int  # per step
    work: Work  # of one

    def floor(self, ceilings: Ceilings) -> float:
        return self.times * self.work.seconds(ceilings)


class Shape(NamedTuple):
    """A GPT without biases, trained on B sequences of T tokens."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    B: int
    T: int
    itemsize: int = 2  # bytes of an activation

    def parameters(self) -> int:
        return weights.count_parameters(self.n_layer, self.n_embd, self.vocab_size, self.T)


def shape_of(size: str, B: int, T: int, dtype: str) -> Shape:
    """Of a size's name and a dtype's, as records have them."""
    n_layer, n_head, n_embd, vocab_size, _ = SIZES[size]
    itemsize = 2 if dtype in ("bfloat16", "float16") else 4
    return Shape(n_layer, n_head, n_embd, vocab_size, B, T, itemsize)


def gemm(M: int, K: int, N: int, itemsize: int, out_itemsize: int = 0) -> Work:
    """(M, K) @ (K, N); the output's itemsize is the operands' unless given."""
    read, written = itemsize * (M * K + K * N), (out_itemsize or itemsize) * M * N
    return Work(2.0 * M * K * N, read + written)


def attention(B: int, H: int, T: int, D: int, itemsize: int) -> tuple[Work, Work]:
    """Forward (2 products) and backward (5 products), each half of T x T."""
    product, tensor, row = B * H * T * T * D, itemsize * B * H * T * D, 4 * B * H * T
    forward = Work(2.0 * product, 4 * tensor + row)  # q, k, v -> y, lse
    return forward, Work(5.0 * product, 8 * tensor + 2 * row)  # and dy -> dq, dk, dv


def training_step(shape: Shape) -> Iterator[Op]:
    """Every op of forward, backward and AdamW with clipping."""
    L, H, C, V, B, T, size = shape
    N, P = B * T, shape.parameters()
    tensor = size * N * C  # bytes of one activation as wide as the model

    def linear(
        group: str, name: str, K: int, M: int, times: int, keeps: int = 0, recalls: int = 0
    ) -> Iterator[Op]:
        """(N, K) -> (N, M) and its gradients; bytes that its forward writes and its dgrad reads
        besides the operands."""
        yield Op(group, f"{name} forward", times, gemm(N, K, M, size) + Work(bytes=keeps))
        yield Op(group, f"{name} dgrad", times, gemm(N, M, K, size) + Work(bytes=recalls))
        yield Op(group, f"{name} wgrad", times, gemm(M, N, K, size, 4))

    yield Op("embedding", "gather and add", 1, Work(bytes=2 * tensor))
    yield Op("embedding", "scatter-add", 1, Work(bytes=tensor + 2 * 4 * N * C))
    yield Op("norm", "norm", 1, Work(bytes=2 * tensor))
    yield Op("norm", "add and norm", 2 * L, Work(bytes=4 * tensor))
    yield Op("norm", "last norm backward", 1, Work(bytes=3 * tensor))
    yield Op("norm", "norm backward and add", 2 * L, Work(bytes=4 * tensor))
    yield from linear("qkv and proj", "qkv", C, 3 * C, L)
    yield from linear("qkv and proj", "proj", C, C, L)
    forward, backward = attention(B, H, T, C // H, size)
    yield Op("attention", "attention forward", L, forward)
    yield Op("attention", "attention backward", L, backward)
    # GELU and dGELU ride along: fc keeps the pre-activation, proj2's dgrad reads it
    yield from linear("mlp", "fc", C, 4 * C, L, keeps=4 * tensor)
    yield from linear("mlp", "proj2", 4 * C, C, L, recalls=4 * tensor)
    yield from linear("head", "head", C, V, 1)
    yield Op("loss", "logits to dlogits", 1, Work(bytes=2 * size * N * V))
    copy = size * P if size < 4 else 0  # of the weights, for the next step's matrix products
    yield Op("optimizer", "gradient norm", 1, Work(bytes=4 * P))
    yield Op("optimizer", "AdamW", 1, Work(bytes=7 * 4 * P + copy))


def by_group(ops: list[Op], ceilings: Ceilings) -> dict[str, float]:
    """Seconds per step under which no implementation of a group gets."""
    floors: dict[str, float] = {}
    for op in ops:
        floors[op.group] = floors.get(op.group, 0.0) + op.floor(ceilings)
    return floors


def measure(device: torch.device, dtype: torch.dtype, seconds: float) -> Ceilings:
    """The device's rates now, for the fractions of a ceiling in the same run."""
    return Ceilings(
        matmul_ceiling(device, dtype, seconds / 2),
        copy_ceiling(device, seconds / 2),
        f"{str(dtype).removeprefix('torch.')} matmul and copy measured in this run",
    )


def table(shape: Shape, ceilings: Ceilings) -> str:
    ops = list(training_step(shape))
    lines = [f"{'op':<24}{'times':>6}{'GFLOP':>9}{'MB':>9}{'floor us':>10}{'sum ms':>9}  bound by"]
    for op in ops:
        compute = op.work.flops / ceilings.flops > op.work.bytes / ceilings.bandwidth
        lines.append(
            f"{op.name:<24}{op.times:6d}{op.work.flops / 1e9:9.1f}{op.work.bytes / 1e6:9.1f}"
            f"{1e6 * op.work.seconds(ceilings):10.1f}{1e3 * op.floor(ceilings):9.3f}"
            f"  {'compute' if compute else 'memory'}"
        )
    floors = by_group(ops, ceilings)
    lines += ["", *(f"{group:<24}{1e3 * seconds:9.3f} ms" for group, seconds in floors.items())]
    total = sum(floors.values())
    tokens = shape.B * shape.T / total
    lines.append(f"{'step':<24}{1e3 * total:9.3f} ms, {tokens:,.0f} tokens/s at most")
    lines.append(f"ceilings: {ceilings.flops / 1e12:.3g} TFLOP/s, "
                 f"{ceilings.bandwidth / 1e9:.4g} GB/s ({ceilings.source})")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.harness.roofline", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", choices=KNOWN, help="not this machine's, measured now")
    args = parser.parse_args()
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if here.type == "cpu" and not args.device else torch.bfloat16
    ceilings = KNOWN[args.device] if args.device else measure(here, dtype, 2.0)
    name = str(dtype).removeprefix("torch.")
    print(table(shape_of(args.size, args.batch_size, SIZES[args.size][4], name), ceilings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
