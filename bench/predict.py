"""What a training step will take on a GPU that is not here, ours beside torch.compile's.

    python -m bench.predict --size 124M --batch-size 16 --gpu H200
    python -m bench.predict --size 124M --token 512    # of sampling, after so many

Needs triton and no GPU. Our launches and ops are counted by running the step on meta tensors; each
kernel is compiled for the GPU, and its bytes, instructions, registers and widths are read from what
came out. torch.compile's side is what inductor generates for nanoGPT's model: a recorded count, or
where that is of another PyTorch, and this one has a CUDA build, generated and counted here, which
takes a minute. Microseconds are a model (bench/prediction/model.py); docs/prediction.md says how
good it is.
"""

import argparse
import json
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bench.peers.models import SIZES, config_of
from bench.prediction import inductor, machine_code, model, token
from bench.prediction.kernel import Kernel
from bench.prediction.model import GPUS, Gpu
from bench.prediction.step import training_step, with_products
from fastgpt.kernels import _tuned


class Prediction(NamedTuple):
    size: str
    B: int
    gpu: Gpu
    ours: list[Kernel]
    recorded: dict[str, Any] | None  # inductor.recorded() or generated()

    @property
    def ours_ms(self) -> float:
        return model.step_ms(self.ours, self.gpu)

    @property
    def compile_ms(self) -> float | None:
        return model.step_ms(self.recorded["kernels"], self.gpu) if self.recorded else None

    @property
    def ratio(self) -> float | None:
        """How many times as fast as torch.compile's our step is."""
        return None if self.compile_ms is None else self.compile_ms / self.ours_ms


def predict(size: str, B: int, gpu: Gpu, generate: bool = False) -> Prediction:
    """ValueError where the kernels cannot be compiled. With `generate` torch.compile's are of the
    PyTorch that is installed, where they can be.
    """
    from fastgpt.kernels import _launch

    if _launch.INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1 replaces the compiler; unset it to predict")
    measured = _tuned.SHIPPED.get(gpu.name, {"configs": {}, "implementations": {}})
    attention = measured["implementations"].get("packed_causal_attention", "cudnn")
    with ExitStack() as stack:
        for key, config in measured["configs"].items():
            stack.enter_context(_tuned.trying(key, config))
        launches, ops = training_step(config_of(size), B, gpu.arch, gpu.processors, attention)
    kernels = Counter(
        with_products(machine_code.kernel_of(name, l, gpu.arch), l) for name, l in launches
    )
    ours = [replace(kernel, launches=n) for kernel, n in kernels.items()] + ops
    return Prediction(size, B, gpu, ours, _compiled(size, B, generate))


def _compiled(size: str, B: int, generate: bool) -> dict[str, Any] | None:
    recorded = inductor.recorded(size, B)
    if not generate or (recorded and recorded["torch"] == torch.__version__):
        return recorded
    try:
        return inductor.generated(size, B)
    except ValueError as problem:
        print(f"torch.compile's kernels are not generated here: {problem}", file=sys.stderr)
        return recorded


def row(kernel: Kernel, gpu: Gpu) -> dict[str, Any]:
    """For --json. All but `launches` is of one of them; None is what a library does not tell.
    A library's may be several kernels: `parts`.
    """
    own = kernel.grid > 0
    return {
        "kernel": kernel.name,
        "component": kernel.component,
        "kind": kernel.kind,
        "bytes": round(model.moved(kernel, gpu)),
        "flops": kernel.flops,
        "instructions_per_element": round(kernel.instructions_per_element(), 1) if own else None,
        "registers": kernel.registers if own else None,
        "spills": kernel.spills if own else None,
        "vector_bits": min(kernel.widths()) if own else None,
        "load_bits": kernel.load_bits if own else None,
        "store_bits": kernel.store_bits if own else None,
        "shared_bytes": kernel.shared_bytes if own else None,
        "programs_per_sm": model.programs_per_processor(kernel, gpu) if own else None,
        "live_bytes": round(model.live_bytes(kernel, gpu)) if own else None,
        "launches": kernel.launches,
        "parts": kernel.parts,
        "microseconds": round(model.microseconds(kernel, gpu), 1),
    }


def rows(kernels: list[Kernel], gpu: Gpu) -> list[dict[str, Any]]:
    """What takes longest in the step first."""
    order = sorted(kernels, key=lambda k: -k.launches * model.microseconds(k, gpu))
    return [row(kernel, gpu) for kernel in order]


def as_json(p: Prediction) -> dict[str, Any]:
    theirs = p.recorded or {}
    return {
        "ratio": p.ratio,
        "ours_ms": p.ours_ms,
        "compile_ms": p.compile_ms,
        "kernels": rows(p.ours, p.gpu),
        "compile_kernels": rows(theirs.get("kernels", []), p.gpu),
        "compile_source": {k: v for k, v in theirs.items() if k != "kernels"} or None,
        "settings": {"size": p.size, "B": p.B, "gpu": p.gpu.name, "arch": f"sm_{p.gpu.arch}"},
    }


def by_component(kernels: list[Kernel], gpu: Gpu) -> dict[str, float]:
    """Milliseconds of the kernels."""
    groups = {k.component: [o for o in kernels if o.component == k.component] for k in kernels}
    sums = {name: model.kernels_ms(group, gpu) for name, group in groups.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def table(p: Prediction) -> str:
    lines = [f"{p.size}, B={p.B}, on {p.gpu.name} (sm_{p.gpu.arch}); us are of one launch"]
    for title, kernels in _sides(p):
        found = rows(kernels, p.gpu)
        small = [r for r in found if r["registers"] is None and r["microseconds"] < 2 * model.START]
        shown = [_line(r) for r in found if r not in small]
        sums = by_component(kernels, p.gpu)
        lines += [
            "", title, _HEAD, *shown,
            f"and {sum(r['launches'] for r in small)} of PyTorch's smallest kernels",
            ", ".join(f"{name} {ms:.2f} ms" for name, ms in sums.items()),
            f"step: {model.step_ms(kernels, p.gpu):.2f} ms in {model.launches(kernels)} launches, "
            f"of which kernels {model.kernels_ms(kernels, p.gpu):.2f}; at the power limit "
            f"{model.drawn_ms(kernels, p.gpu):.2f}",
        ]  # fmt: skip
    if p.ratio is None:
        known = ", ".join(f"{r['size']} at B={r['B']}" for r in inductor.records())
        lines.append(f"\nno ratio: torch.compile's kernels are recorded for {known}")
    else:
        lines.append(f"\nratio: {p.ratio:.3f}, torch.compile's step over ours")
    return "\n".join(lines)


def _sides(p: Prediction) -> list[tuple[str, list[Kernel]]]:
    sides = [("fastgpt-step-graph, counted now", p.ours)]
    if p.recorded:
        r = p.recorded
        title = f"nanogpt-compile, counted {r['date']} with torch {r['torch']}: {r['source']}"
        sides.append((title, r["kernels"]))
    return sides


_HEAD = (f"{'kernel':44} {'component':12} {'MB':>8} {'instr/el':>8} {'bits':>7} {'regs':>4} "
         f"{'shared':>6} {'per SM':>6} {'live MB':>7} {'times':>5} {'us':>8}")  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    name, code = row["kernel"], " " * 43
    if len(name) > 44:
        name = f"{name[:20]}..{name[-22:]}"
    if row["registers"] is not None:
        bits = f"{row['load_bits']}/{row['store_bits']}"
        code = (f"{row['instructions_per_element']:8.1f} {bits:>7} {row['registers']:4} "
                f"{row['shared_bytes']:6} {row['programs_per_sm']:6} "
                f"{1e-6 * row['live_bytes']:7.0f}")  # fmt: skip
    return (f"{name:44} {row['component']:12} {1e-6 * row['bytes']:8.1f} {code} "
            f"{row['launches']:5} {row['microseconds']:8.1f}")  # fmt: skip


def _token(size: str, context: int, gpu: Gpu, as_json: bool) -> int:
    """Print what a token of sampling costs by count. ValueError as of `predict`."""
    from fastgpt.kernels import _launch

    if _launch.INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1 replaces the compiler; unset it to predict")
    if not 0 < context < config_of(size).block_size:
        raise ValueError(f"--token {context} must be below {config_of(size).block_size}")
    found = token.kernels(config_of(size), context, gpu)
    said = token.summary(found, config_of(size), context, gpu)
    if as_json:
        print(json.dumps({"kernels": rows(found, gpu), **said}, indent=1))
        return 0
    print(f"a token of {size} after {context}, batch 1, bf16, on {gpu.name}; us are of one launch")
    print("\n".join([_HEAD, *map(_line, rows(found, gpu))]))
    print(f"{said['launches']} launches, {1e-6 * said['bytes']:.1f} MB, {said['over_least']:.3f} "
          f"of weights and cache; {said['microseconds']:.0f} us of kernels")  # fmt: skip
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--token", type=int, metavar="CONTEXT", help="not of training: a token")
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--json", action="store_true", help="print an object, not tables")
    args = parser.parse_args()
    try:
        if args.token is not None:
            return _token(args.size, args.token, GPUS[args.gpu], args.json)
        p = predict(args.size, args.batch_size, GPUS[args.gpu], generate=True)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    print(json.dumps(as_json(p), indent=1) if args.json else table(p))
    return 0


if __name__ == "__main__":
    sys.exit(main())
