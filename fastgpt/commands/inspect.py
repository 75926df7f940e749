"""`fastgpt inspect`: compile every kernel ahead of time and read what came out. Needs no GPU.

The kernels are collected by running the launchers themselves, forward and backward, on meta tensors
of GPT-2's shapes while launches are recorded instead of started. So what is compiled is what would
be launched: the same constants, the same specialisation on strides and divisibility.

Per kernel, configuration and architecture: registers per thread, spill instructions (local loads
and stores in the SASS), shared memory, which tensor-core instruction the PTX issues, and how many
address computations would wrap around beyond 2**31 elements (narrow_offsets.py).
"""

import argparse
import json
import os
import re
import subprocess
import textwrap
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from fastgpt.commands.narrow_offsets import narrow_offsets
from fastgpt.commands.sass import machine_code, spills, tools

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100")
# float16 code differs from bfloat16's in instruction names only
DTYPES = ("bfloat16", "tf32", "float32")
SHARED_LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes
_TENSOR_CORE = {"tcgen05": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync"}
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


class Specimen(NamedTuple):
    """One distinct compilation: a kernel, its specialised signature and its options."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]  # argument -> type or "constexpr"
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # indices of arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]
    arch: int

    @property
    def name(self) -> str:
        return f"{self.module.rsplit('.', 1)[-1]}.{self.kernel.strip('_')}"


def specimens(arch: int, dtypes: Iterable[str]) -> list[Specimen]:
    """Every distinct compilation that GPT-2's shapes lead to on this architecture."""
    from fastgpt.kernels import _launch

    if _launch.INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1 replaces the compiler; unset it to inspect kernels")
    before = torch.get_float32_matmul_precision()
    try:
        with _launch.record(arch) as launches:
            for dtype in dtypes:
                torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
                _run_launchers(torch.float32 if dtype == "tf32" else getattr(torch, dtype))
    finally:
        torch.set_float32_matmul_precision(before)
    return list(dict.fromkeys(specimen_of(launch, arch) for launch in launches))


def _run_launchers(dtype: torch.dtype) -> None:
    """Call every launcher once per shape that changes what is compiled."""
    from fastgpt.kernels import (
        _launch,
        adamw,
        attention,
        cross_entropy,
        decode,
        embedding,
        gelu,
        gemm_gelu,
        layer_norm,
    )

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    M, C, H = 4096, 768, 12
    x, w, seed = meta(M, C), meta(C), meta(1, dtype=torch.int64)
    _launch.launch(_launch._probe_kernel, 1, meta(1, dtype=torch.int32))
    _, mean, rstd = layer_norm.forward(x, w, w, 1e-5, dtype)
    layer_norm.backward(x, None, x, w, mean, rstd, True, dtype)
    stream, gain = meta(M, C, dtype=torch.float32), meta(C, dtype=torch.float32)
    layer_norm.add_forward(x, stream, gain, None, 1e-5, torch.float32)  # as under autocast
    layer_norm.backward(stream, stream, stream, gain, mean, rstd, False, dtype)
    gemm_gelu.forward(x, meta(4 * C, C), None, False)
    for tanh in (False, True):
        h, _ = gemm_gelu.forward(x, meta(4 * C, C), meta(4 * C), tanh)
        gelu.gelu_forward(h, tanh)
        gelu.gelu_backward(h, h, tanh, True, True)
        gemm_gelu.dgrad(x, meta(C, 4 * C), h, tanh, True, True)
    gemm_gelu.forward(meta(M, C + 1), meta(4 * C, C + 1), meta(4 * C), False)  # nothing for TMA
    heads = [(64, 0.0)]
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "high":
        heads += [(128, 0.0), (256, 0.0)]  # minutes of compilation in plain fp32, for no news
    if dtype != torch.float32:  # what these change compiles slowly, and alike in every dtype
        heads += [(64, 0.1), (80, 0.0), (100, 0.0)]
        wide, gain = meta(M, layer_norm.MAX_WIDTH), meta(layer_norm.MAX_WIDTH)
        layer_norm.forward(wide, gain, gain, 1e-5, dtype)
        layer_norm.backward(wide, None, wide, gain, mean, rstd, True, dtype)
    for D, dropout_p in heads:
        qkv, replay = meta(4, 1024, 3 * H * D), seed if dropout_p else None
        y, lse = attention.packed_forward(qkv, H, replay, dropout_p)
        attention.packed_backward(y, qkv, y, lse, replay, H, dropout_p)
    attention.dropout_mask(seed, 1, H, 1024, 0.1)
    for V in (65, 50304):
        logits, targets, scale = meta(M, V), meta(M, dtype=torch.int64), meta(dtype=torch.float32)
        _, top, total = cross_entropy.forward(logits, targets, -1)
        cross_entropy.backward(logits, targets, top, total, scale, None, -1)
        cross_entropy.cross_entropy_(logits, targets, -1, scale)
    cross_entropy.rescale_(x, scale)
    table, chunks = meta(148, 6, dtype=torch.int64), meta(M, 2, dtype=torch.int64)
    clip, decay, corrections = (meta(*s, dtype=torch.float32) for s in ((), (148,), (148, 2)))
    adamw.sum_of_squares(table, chunks)
    adamw.launch_update(table, chunks, clip, corrections, decay, 6e-4, (0.9, 0.95), 1e-8, dtype)
    _run_decoding(decode, dtype)
    embedding.add_rows_(meta(50304, C, dtype=torch.float32), meta(M, dtype=torch.int64), x)


def _run_decoding(decode: Any, dtype: torch.dtype) -> None:
    """A step's launchers for one row and for several."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    C, H, S, V = 768, 12, 1024, 50304
    for B in (1, 8):
        x, gain = meta(B, C), meta(C)
        ids, positions = meta(B, dtype=torch.int64), meta(B, dtype=torch.int32)
        decode.embed(x, ids, positions, meta(V, C), meta(S, C))
        decode.linear(meta(B, 3 * C), x, meta(3 * C, C, dtype=dtype), meta(3 * C), (gain, gain))
        decode.linear(meta(B, V), x, meta(V, C, dtype=dtype), None, (gain, None))
        hidden = meta(B, 4 * C)
        for approximate in ("none", "tanh"):
            fc = meta(4 * C, C, dtype=dtype)
            decode.linear(hidden, x, fc, meta(4 * C), (gain, gain), None, approximate)
        decode.linear(x, hidden, meta(C, 4 * C, dtype=dtype), gain, None, x)
        for D in (64, 80):
            cache = meta(B, H, S, D, dtype=dtype)
            weight = meta(C, H * D, dtype=dtype)
            for bucket in (256, S):
                decode.attend_project(
                    x, meta(B, 3 * H * D), cache, cache, positions, bucket, weight, gain
                )


def specimen_of(launch: Any, arch: int) -> Specimen:
    """Specialise a launch as triton.jit would: on None, on 1 and on multiples of 16."""
    names = launch.kernel.arg_names
    signature, constants, divisible = {}, {}, []
    for i, (name, arg) in enumerate(zip(names, launch.args, strict=False)):
        signature[name] = _type(arg)
        if signature[name] == "constexpr":
            constants[name] = arg
        elif isinstance(arg, torch.Tensor) or (isinstance(arg, int) and arg % 16 == 0):
            divisible.append(i)
    options = {}
    for name, value in launch.options.items():
        if name in names:
            signature[name], constants[name] = "constexpr", value
        else:
            options[name] = value
    kernel = launch.kernel.fn
    return Specimen(
        kernel.__module__, kernel.__name__, tuple(signature.items()), tuple(constants.items()),
        tuple(divisible), tuple(options.items()), arch,
    )  # fmt: skip


def _type(arg: Any) -> str:
    if isinstance(arg, torch.Tensor):
        return "*" + _TYPES[arg.dtype]
    if isinstance(arg, float):
        return "fp32"
    if arg is None or arg == 1:
        return "constexpr"
    return "i32" if -(2**31) <= arg < 2**31 else "i64"


def compile_specimen(specimen: Specimen) -> dict[str, Any]:
    """Compile to machine code and measure it: one row of the report."""
    compiled = compiled_kernel(specimen)
    code = machine_code(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    core = next((name for name, text in _TENSOR_CORE.items() if re.search(text, ptx)), None)
    return {
        "kernel": specimen.name,
        "config": _config(specimen),
        "arch": f"sm_{specimen.arch}",
        "registers": code.registers,
        "spills": spills(code.instructions),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": core,
        "narrow_offsets": len(narrow_offsets(compiled.asm["ttir"])),
    }


def compiled_kernel(specimen: Specimen) -> Any:
    """As Triton keeps it: `asm` by stage, `metadata`."""
    import importlib

    import triton
    from triton.backends import compiler
    from triton.compiler import ASTSource

    attributes: Any = {(i,): [["tt.divisibility", 16]] for i in specimen.divisible}
    if hasattr(compiler, "AttrsDescriptor"):  # before Triton 3.3
        attributes = compiler.AttrsDescriptor.from_hints(dict.fromkeys(specimen.divisible, 16))
    source = ASTSource(
        getattr(importlib.import_module(specimen.module), specimen.kernel),
        dict(specimen.signature),
        dict(specimen.constants),
        attributes,
    )
    return triton.compile(
        source, target=compiler.GPUTarget("cuda", specimen.arch, 32), options=dict(specimen.options)
    )


def _config(specimen: Specimen) -> dict[str, Any]:
    """What tells this compilation from the kernel's others: dtypes, constants, launch options."""
    pointers = [t[1:] for _, t in specimen.signature if t.startswith("*")]
    constants = {
        name: value for name, value in specimen.constants if name.isupper() or value is None
    }
    return {"dtypes": ",".join(dict.fromkeys(pointers)), **constants, **dict(specimen.options)}


def compilable() -> list[str]:
    """What the assemblers that come with this Triton know: 3.2's end at sm_90."""
    helps = [
        subprocess.run([tool, "--help"], capture_output=True, text=True, check=True).stdout
        for tool in tools().glob("ptxas*")
    ]
    return [f"sm_{arch}" for arch in SHARED_LIMITS if f"'sm_{arch}'" in "".join(helps)]


def rows(
    archs: Iterable[str], dtypes: Iterable[str] = DTYPES, kernels: Iterable[str] = ("",)
) -> list[dict[str, Any]]:
    """One per compilation of the kernels whose names contain one of `kernels`."""
    work = [
        specimen
        for arch in archs
        for specimen in specimens(_parse_arch(arch), dtypes)
        if any(text in specimen.name for text in kernels)
    ]
    if not work:
        raise ValueError(f"no kernel's name contains {' or '.join(kernels)}; try without --kernel")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_specimen, work))


def _parse_arch(name: str) -> int:
    known = compilable()
    if name not in known:
        raise ValueError(f"unknown arch {name!r}; this Triton compiles for {', '.join(known)}")
    return int(name.removeprefix("sm_"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", action="append", help=f"repeatable; default {', '.join(ARCHS)}")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable; default all")
    parser.add_argument("--kernel", action="append", help="a part of its name; repeatable")
    parser.add_argument("--json", action="store_true", help="print a list of records, not a table")


def main(args: argparse.Namespace) -> int:
    archs = args.arch or [arch for arch in ARCHS if arch in compilable()]
    compiled = rows(archs, args.dtype or DTYPES, args.kernel or ("",))
    if args.json:
        print(json.dumps(compiled, indent=1))
        return 0
    for row in compiled:
        config = " ".join(f"{k}={v}" for k, v in row["config"].items() if v is not None)
        print(row["kernel"], row["arch"])
        print(textwrap.fill(config, 60, initial_indent="  ", subsequent_indent="  "))
        print(
            f"  {row['registers']} registers, {row['spills']} spills, "
            f"{row['shared_bytes']} B shared, {row['tensor_core'] or 'no tensor core'}"
        )
        if row["narrow_offsets"]:
            print(f"  {row['narrow_offsets']} offsets of 32 bits")
    return 0
