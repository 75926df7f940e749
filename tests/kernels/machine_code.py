"""What the compiler makes of the hot kernels at 124M, B=16, T=1024, bf16: a record each, as JSON.

    python -m tests.kernels.machine_code [sm_90]

Launches are recorded, not started: no GPU is needed. `loops` are the instructions of each innermost
loop, `all` those of the whole kernel, per element that a thread has in its block.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from fastgpt.commands.inspect import compiled_kernel, machine_code, specimen_of
from fastgpt.kernels import _launch, adamw, cross_entropy, gelu, layer_norm

M, C, V, PARAMETERS = 16 * 1024, 768, 50304, 75
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)\s*([^;\n]*);")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def calls() -> dict[str, Callable[[], Any]]:
    wide, long = torch.float32, torch.int64
    x, s, w, h = meta(M, C), meta(M, C, dtype=wide), meta(C, dtype=wide), meta(M, 4 * C)
    rows, one, targets = meta(M, dtype=wide), meta(dtype=wide), meta(M, dtype=long)
    table, chunks = meta(PARAMETERS, 6, dtype=long), meta(15_000, 2, dtype=long)
    scales = one, meta(PARAMETERS, 2, dtype=wide), meta(PARAMETERS, dtype=wide)
    update = *scales, 6e-4, (0.9, 0.95), 1e-8, torch.bfloat16
    norm = x, s, s, w, rows, rows, False, torch.bfloat16
    return {
        "gelu": lambda: gelu.gelu_forward(h, False),
        "gelu backward": lambda: gelu.gelu_backward(h, h, False, False, False),
        "gelu backward, output": lambda: gelu.gelu_backward(h, h, False, False, True),
        "cross entropy": lambda: cross_entropy.cross_entropy_(meta(M, V), targets, -1, one),
        "cross entropy, odd": lambda: cross_entropy.cross_entropy_(
            meta(M, V - 47), targets, -1, one
        ),
        "cross entropy, padded": lambda: cross_entropy.cross_entropy_(
            meta(M, V)[:, :-47], targets, -1, one
        ),
        "norm backward": lambda: layer_norm.backward(*norm),
        "squares": lambda: adamw.sum_of_squares(table, chunks),
        "adamw": lambda: adamw.launch_update(table, chunks, *update),
    }


def record(launch: _launch.Launch, arch: int) -> dict[str, Any]:
    specimen = specimen_of(launch, arch)
    compiled = compiled_kernel(specimen)
    registers, sass = machine_code(compiled.asm["cubin"])
    found = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(sass)]
    counts = Counter(name for _, name, _ in found if name != "NOP")
    sizes = {k: v for k, v in launch.options.items() if k in ("BLOCK", "BLOCK_M", "BLOCK_N")}
    elements = 1
    for size in sizes.values():
        elements *= size
    threads = 32 * launch.options.get("num_warps", 4)
    per_thread = elements / threads
    loads = [name for name in counts if re.match(r"LDG(STS)?\b", name)]
    return {
        "registers": registers,
        "blocks": 65536 // (-(-registers // 8) * 8 * threads),  # on a multiprocessor, by registers
        "spills": sum(n for name, n in counts.items() if re.match(r"LDL|STL", name)),
        "widest_load": max(int(m[1]) if (m := re.search(r"\.(64|128)\b", name)) else 32
                           for name in loads),
        "all": sum(counts.values()) / per_thread,
        "loops": [n / per_thread for n in loops(found)],
    }  # fmt: skip


def loops(found: list[tuple[int, str, str]]) -> list[int]:
    """Instructions between a backward branch and its target, of loops without another inside."""
    spans = []
    for at, name, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    inner = [(a, b) for a, b in spans if not any(a <= c and d < b for c, d in spans)]
    return [sum(a <= at <= b and name != "NOP" for at, name, _ in found) for a, b in inner]


def main() -> None:
    arch = int(sys.argv[1].removeprefix("sm_")) if sys.argv[1:] else 90
    records = {}
    for name, call in calls().items():
        with _launch.record(arch) as launches:
            call()
        records[name] = record(launches[0], arch)
    print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
