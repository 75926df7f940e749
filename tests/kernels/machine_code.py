"""What the compiler makes of the hot kernels at 124M, B=16, T=1024, bf16: a record each, as JSON.

    python -m tests.kernels.machine_code [sm_90]

Launches are recorded, not started: no GPU is needed. `loops` are the instructions of each innermost
loop, `all` those of the whole kernel, per element that a thread has in its
block; `walks` is what these loops load with.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from fastgpt.commands import sass
from fastgpt.commands.inspect import compiled_kernel, specimen_of
from fastgpt.kernels import _launch, adamw, attention, cross_entropy, gelu, layer_norm

M, C, V, PARAMETERS = 16 * 1024, 768, 50304, 75
WALKS = ("LDG", "LDGSTS")  # loads that a thread waits for, and others


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def calls() -> dict[tuple[str, ...], Callable[[], Any]]:
    """The names of what each launches first."""
    wide, long = torch.float32, torch.int64
    x, s, w, h = meta(M, C), meta(M, C, dtype=wide), meta(C, dtype=wide), meta(M, 4 * C)
    rows, one, targets = meta(M, dtype=wide), meta(dtype=wide), meta(M, dtype=long)
    table, chunks = meta(PARAMETERS, 6, dtype=long), meta(15_000, 2, dtype=long)
    scales = one, meta(PARAMETERS, 2, dtype=wide), meta(PARAMETERS, dtype=wide)
    update = *scales, 6e-4, (0.9, 0.95), 1e-8, torch.bfloat16
    y, qkv, lse = meta(16, 1024, C), meta(16, 1024, 3 * C), meta(16, 12, 1024, dtype=wide)
    norm = x, s, s, w, rows, rows, False, torch.bfloat16
    return {
        ("gelu",): lambda: gelu.gelu_forward(h, False),
        ("gelu backward",): lambda: gelu.gelu_backward(h, h, False, False, False),
        ("gelu backward, output",): lambda: gelu.gelu_backward(h, h, False, False, True),
        ("cross entropy",): lambda: cross_entropy.cross_entropy_(meta(M, V), targets, -1, one),
        ("cross entropy, odd",): lambda: cross_entropy.cross_entropy_(
            meta(M, V - 47), targets, -1, one
        ),
        ("cross entropy, padded",): lambda: cross_entropy.cross_entropy_(
            meta(M, V)[:, :-47], targets, -1, one
        ),
        ("norm backward",): lambda: layer_norm.backward(*norm),
        ("squares",): lambda: adamw.sum_of_squares(table, chunks),
        ("attention",): lambda: attention.packed_forward(qkv, 12, None, 0.0),
        ("attention dq", "attention dk dv"): lambda: attention.packed_backward(
            y, qkv, y, lse, None, 12, 0.0
        ),
        ("adamw",): lambda: adamw.launch_update(table, chunks, *update),
    }


def record(launch: _launch.Launch, arch: int) -> dict[str, Any]:
    specimen = specimen_of(launch, arch)
    compiled = compiled_kernel(specimen)
    registers, code = sass.machine_code(compiled.asm["cubin"])
    sizes = {k: v for k, v in launch.options.items() if k in ("BLOCK", "BLOCK_M", "BLOCK_N")}
    elements = 1
    for size in sizes.values():
        elements *= size
    threads = 32 * launch.options.get("num_warps", 4)
    per_thread = elements / threads
    loads = [i.name for i in code if i.name.split(".")[0] in sass.LOADS]
    bodies = [code[first : last + 1] for first, last in innermost(sass.loops(code))]
    return {
        "registers": registers,
        "blocks": 65536 // (-(-registers // 8) * 8 * threads),  # on a multiprocessor, by registers
        "spills": sass.spills(code),
        "widest_load": max(map(sass.width, loads)),
        "all": len(code) / per_thread,
        "loops": [len(body) / per_thread for body in bodies],
        "walks": sorted({i.name.split(".")[0] for body in bodies for i in body} & set(WALKS)),
    }


def innermost(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that have no other inside."""
    return [
        (first, last)
        for first, last in loops
        if not any((first <= a and b < last) or (first < a and b <= last) for a, b in loops)
    ]


def main() -> None:
    arch = int(sys.argv[1].removeprefix("sm_")) if sys.argv[1:] else 90
    records = {}
    for names, call in calls().items():
        with _launch.record(arch) as launches:
            call()
        for name, launch in zip(names, launches, strict=False):
            records[name] = record(launch, arch)
    print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
