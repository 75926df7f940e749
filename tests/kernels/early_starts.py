"""What the decoding kernels do before they wait for the kernel in front, as JSON.

    python -m tests.kernels.early_starts

Of each architecture's kernels: loads and prefetches in front of the wait, loads and copies behind
it, and stores in front of it; None for a kernel that does not wait. Needs no GPU.
"""

import json

import torch

from fastgpt.commands import sass
from fastgpt.commands.inspect import compiled_kernel, specimen_of
from fastgpt.kernels import _launch, decode

LOADS, STORES = (*sass.LOADS, "CCTL"), sass.STORES
WAIT = "ACQBULK"


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def step(R: int) -> None:
    """A layer's kernels for R texts."""
    C, H, S, low = 256, 4, 256, torch.bfloat16
    x, qkv, gain, positions = meta(R, C), meta(R, 3 * C), meta(C), meta(R, dtype=torch.int32)
    cache = meta(R, H, S, C // H, dtype=low)
    decode.embed(x, meta(R, dtype=torch.int64), positions, meta(9, C), meta(S, C))
    decode.linear(qkv, x, meta(3 * C, C, dtype=low), None, (gain, None))
    decode.attend_project(x, qkv, cache, cache, positions, S, meta(C, C, dtype=low), None)


def counts(launch: _launch.Launch, arch: int) -> tuple[int, int, int] | None:
    code = sass.machine_code(compiled_kernel(specimen_of(launch, arch)).asm["cubin"]).instructions
    names = [instruction.name.split(".")[0] for instruction in code]
    if WAIT not in names:
        return None
    at = names.index(WAIT)
    before, after = names[:at], names[at:]
    return (
        sum(name in LOADS for name in before),
        sum(name in LOADS for name in after),
        sum(name in STORES for name in before),
    )


def main() -> None:
    found = {}
    for arch in (80, 90):
        with _launch.record(arch) as launches:
            step(1)
            step(8)
        counted = {launch.kernel.fn.__name__: counts(launch, arch) for launch in launches}
        if arch == 90:
            assert counted.pop("_embed_kernel") is None  # it starts in the usual way
        found[f"sm_{arch}"] = counted
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
