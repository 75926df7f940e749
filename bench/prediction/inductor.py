"""torch.compile's side: what inductor generated for nanoGPT's step, read and recorded.

    python -m bench.prediction.inductor --size 124M --batch-size 16

Where torch has a CUDA build, inductor's code for nanoGPT's model.py under bf16 autocast is made as
for an H200, which need not be there (no_gpu.py). On a machine with a GPU TORCH_COMPILE_DEBUG=1
leaves it as output_code.py in two folders: then name these two. Every generated kernel is compiled
in the first configuration that inductor would try, by the torch and Triton installed (they must be
those that generated it), and counted like fastgpt's. Products and attention are counted from
their calls. What the step runs outside of the graph stands in `outside`. The record, inductor.json,
is what predictions compare with, on any machine.
"""

import argparse
import ast
import importlib.util
import json
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.harness.roofline import Shape, attention, shape_of
from bench.harness.timeline import OTHER, by_words, matmul_groups
from bench.peers import models
from bench.peers.models import SIZES
from bench.prediction import ir, machine_code, no_gpu
from bench.prediction.kernel import ATEN, ATTENTION, GEMM, Kernel

RECORDS = Path(__file__).with_name("inductor.json")
ARCH = 90  # what generated kernels are compiled for; on other GPUs they are taken to be alike
FOREACH = 7  # launches of a foreach op over 124M's 75 tensors, in the record of an H200
Sizes = dict[str, tuple[int, ...]]


def recorded(size: str, B: int) -> dict[str, Any] | None:
    """{"torch", "triton", "date", "source", "kernels": [Kernel]} of this step, if there is one."""
    for record in records():
        if (record["size"], record["B"]) == (size, B):
            return record | {"kernels": [Kernel(**row) for row in record["kernels"]]}
    return None


def generated(size: str, B: int) -> dict[str, Any]:
    """The same as `recorded`, of the torch and Triton that are installed, in a minute or more.
    ValueError says why it cannot be.
    """
    if problem := no_gpu.problem() or _no_nanogpt():
        raise ValueError(problem)
    with tempfile.TemporaryDirectory() as folder:
        done = no_gpu.run("bench.prediction.generate", folder, size, str(B))
        if done.returncode:
            raise ValueError(f"inductor's code cannot be generated: {done.stderr[-1000:]}")
        files = [Path(folder) / f"{name}.py" for name in ("forward", "backward")]
        source = f"output code for nanoGPT's {models.versions()['nanogpt']} under bf16 autocast, "
        return record(files, size, B, f"{source}generated without a GPU: {_STUBS}")


_STUBS = "stubs answered for the CUDA of an H200"


def _no_nanogpt() -> str | None:
    try:
        models.load_nanogpt()
    except models.Absent as absent:
        return str(absent)
    return None


def record(files: list[Path], size: str, B: int, source: str) -> dict[str, Any]:
    import triton

    shape = shape_of(size, B, SIZES[size][4], "bfloat16")
    return {
        "size": size,
        "B": B,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "arch": ARCH,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "source": source,
        "kernels": kernels(files, shape),
    }


def records() -> list[dict[str, Any]]:
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else []


def kernels(files: list[Path], shape: Shape) -> list[Kernel]:
    """All of the step, those alike counted together."""
    counts: Counter[Kernel] = Counter()
    for path, phase in zip(files, ("forward", "backward"), strict=True):
        counts.update(_of_graph(path.read_text(), phase, shape))
    return [replace(kernel, launches=n) for kernel, n in counts.items()] + outside(shape)


def outside(shape: Shape) -> list[Kernel]:
    """By hand: what train.py's step runs besides the graph, with logits that get a gradient."""
    P = 4.0 * shape.parameters()
    logits = 2.0 * shape.B * shape.T * shape.vocab_size
    return [
        Kernel("zeros as the logits' gradient", "loss", ATEN, 1, logits),
        Kernel("clip_grad_norm_, norms", "optimizer", ATEN, 1, P, parts=FOREACH),
        Kernel("clip_grad_norm_, scaling", "optimizer", ATEN, 1, 2 * P, parts=FOREACH),
        Kernel("AdamW, fused", "optimizer", ATEN, 1, 7 * P, parts=FOREACH),
    ]


def _of_graph(code: str, phase: str, shape: Shape) -> Iterator[Kernel]:
    """The calls in inductor's output code, in order."""
    compiled = _generated(code)
    tokens, groups, heads = shape.B * shape.T, matmul_groups(shape), shape.n_embd // shape.n_head
    attended = attention(shape.B, shape.n_head, shape.T, heads, 2)[phase == "backward"]
    sizes: Sizes = {}
    for target, called, operands in _calls(code, sizes):
        shapes = [_shape_of(operand, sizes) for operand in operands]
        if called.endswith(".run"):
            yield _triton(compiled[called.removesuffix(".run")], operands, shapes)
        elif called == "extern_kernels.mm":
            (M, K), (_, N) = shapes[:2]
            role = "wgrad" if tokens == K else ("forward" if phase == "forward" else "dgrad")
            group = groups.get(tuple(sorted((M, K, N))), OTHER)
            moved, flops = 2.0 * (M * K + K * N + M * N), 2.0 * M * K * N
            yield Kernel(f"{M}x{K}x{N}", group, GEMM, 1, moved, flops=flops, phase=role)
        elif called.startswith("torch.ops.aten._scaled_dot_product_cudnn_attention"):
            name, parts = f"cudnn_attention {phase}", 3 if phase == "backward" else 1
            yield Kernel(
                name, "attention", ATTENTION, 1, attended.bytes, parts, attended.flops, phase
            )
        elif called.startswith(("extern_kernels.", "torch.ops.")):
            raise ValueError(f"nobody counts {called}, which makes {target}")


def _calls(code: str, sizes: Sizes) -> Iterator[tuple[str, str, list[ast.expr]]]:
    """(what is assigned to, called function, arguments) of `call`; `sizes` gets the buffers'."""
    nodes = ast.walk(ast.parse(code))
    function = next(n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == "call")
    statements = [n for n in ast.walk(function) if isinstance(n, (ast.Assign, ast.Expr))]
    for statement in sorted(statements, key=lambda n: (n.lineno, n.col_offset)):
        value = statement.value
        target = ast.unparse(statement.targets[0]) if isinstance(statement, ast.Assign) else ""
        if isinstance(value, ast.Name) and value.id in sizes:
            sizes[target] = sizes[value.id]
        if not isinstance(value, ast.Call):
            continue
        called = ast.unparse(value.func)
        if called == "assert_size_stride":
            sizes[ast.unparse(value.args[0])] = ast.literal_eval(value.args[1])
        elif called.startswith("empty_strided_"):
            sizes[target] = ast.literal_eval(value.args[0])
        elif called == "reinterpret_tensor":
            sizes[target] = ast.literal_eval(value.args[1])
        else:
            yield target, called, value.args


def _shape_of(operand: ast.expr, sizes: Sizes) -> tuple[int, ...]:
    if isinstance(operand, ast.Call):  # reinterpret_tensor(buffer, shape, strides, offset)
        return ast.literal_eval(operand.args[1])
    return sizes.get(ast.unparse(operand), ())


def _triton(kernel: "_Generated", operands: list[ast.expr], shapes: list[Any]) -> Kernel:
    numbers: dict[str, Any] = {
        name: operand.value
        for name, operand in zip(kernel.signature, operands, strict=False)
        if isinstance(operand, ast.Constant)
    }
    of = dict(zip(kernel.signature, shapes, strict=False))
    names = [name for name, kind in kernel.signature.items() if kind != "constexpr"]
    args = [numbers.get(name) for name in names]
    room = [
        math.prod(of[name]) * ir.itemsize(kernel.signature[name]) if of[name] else 0
        for name in names
    ]
    grid = 1
    for axis in "xyz":
        block = kernel.config.get("RSPLIT_SIZE", kernel.config.get(f"{axis.upper()}BLOCK"))
        if f"{axis}numel" in numbers and block:
            grid *= math.ceil(numbers[f"{axis}numel"] / block)
    component = "attention" if "_cat_" in f"{kernel.name}_" else by_words(kernel.name) or OTHER
    return machine_code.counted(kernel.name, component, kernel.code, grid, kernel.warps, args, room)


class _Generated(NamedTuple):
    """A Triton kernel of inductor's, in the first configuration that it would try."""

    name: str
    signature: dict[str, str]
    config: dict[str, int]
    warps: int
    code: machine_code.Code


def _generated(code: str) -> dict[str, _Generated]:
    compiled = {}
    pattern = r"(triton_\w+) = async_compile\.triton\('\1', '''(.*?)''', device_str"
    with tempfile.TemporaryDirectory() as folder:
        for name, source in re.findall(pattern, code, re.S):
            path = Path(folder) / f"{name}.py"
            path.write_text(source.replace("triton_helpers.set_driver_to_gpu()", ""))
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None  # for any path that ends in .py
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module  # where Triton looks for what a kernel calls
            spec.loader.exec_module(module)
            compiled[name] = _compiled(name, getattr(module, name))
    return compiled


def _compiled(name: str, tuner: Any) -> _Generated:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config, meta = tuner.configs[0], tuner.triton_meta
    constants = {**meta.get("constants", {}), **config.kwargs}
    source = ASTSource(tuner.fn, meta["signature"], constants, meta["configs"][0])
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    kernel = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
    code = machine_code.read(kernel.asm["ttir"], kernel.asm["cubin"], kernel.metadata.shared)
    return _Generated(name, meta["signature"], dict(config.kwargs), config.num_warps, code)


def _told(kernel: Kernel) -> dict[str, Any]:
    """Without what is 0 or as usual."""
    usual = {field.name: field.default for field in fields(Kernel)}
    return {name: value for name, value in asdict(kernel).items() if value != usual[name]}


def _text(all_records: list[dict[str, Any]]) -> str:
    """As JSON, a kernel a line."""
    texts = []
    for record in all_records:
        facts = json.dumps({name: value for name, value in record.items() if name != "kernels"})
        rows = ",\n".join(map(json.dumps, record["kernels"]))
        texts.append(f'{facts[:-1]}, "kernels": [\n{rows}\n]}}')
    return "[\n" + ",\n".join(texts) + "\n]\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.prediction.inductor",
                                     description=__doc__)  # fmt: skip
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="forward, backward")
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--source", default="", help="how given files came to be, in a line")
    args = parser.parse_args()
    if len(args.files) not in (0, 2) or (args.files and not args.source):
        parser.error("give none, or two files, forward and backward, and their --source")
    how = args.size, args.batch_size
    try:
        new_record = record(args.files, *how, args.source) if args.files else generated(*how)
    except ValueError as error:
        parser.error(str(error))
    new_record["kernels"] = [_told(kernel) for kernel in new_record["kernels"]]
    others = [r for r in records() if (r["size"], r["B"]) != how]
    RECORDS.write_text(_text([*others, new_record]))
    print(f"{len(new_record['kernels'])} kernels of {args.size}, B={args.batch_size}, in {RECORDS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
