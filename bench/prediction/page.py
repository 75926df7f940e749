"""docs/prediction.md: predictions, and what a GPU said, side by side.

python -m bench.prediction.page
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import predict
from bench.harness import record
from bench.harness.record import Record
from bench.harness.timeline import OTHER, by_words
from bench.harness.training_variant import MAX_NAME
from bench.predict import Prediction
from bench.prediction import model
from bench.prediction.kernel import GEMM, TRITON, Kernel
from bench.prediction.model import GPUS
from bench.reports.markdown import table

PATH = Path(__file__).parents[2] / "docs" / "prediction.md"
SIZE, B, GPU = "124M", 16, "H200"
GOALS = {("124M", 16): 1.20, ("124M", 4): 1.25, ("1.5B", 16): 1.10}  # of torch.compile's step
VARIANTS = ("fastgpt-step-graph", "nanogpt-compile")
PRODUCTS = "matrix products"
SHOWN = 5e7  # bytes a step, below which a kernel has no row
HEAD = f"""# Prediction

Made by `python -m bench.prediction.page`: change nothing here by hand. What a training step of
{SIZE} at B={B} would take, from counting: our step is run on meta tensors, so that every kernel and
op is known with its shapes, our kernels are compiled for the GPU, and the bytes, instructions and
registers are read from what came out. None of it needs a GPU. `python -m bench.predict` prints the
same for other sizes and GPUs.

| figure | how it comes about |
| --- | --- |
| launches | counted; of what libraries add, only attention's and sort's, as a GPU's record has it |
| bytes of our kernels and inductor's | counted in Triton's IR, times programs, times loops' trips |
| bytes of PyTorch's ops and of matrix products | counted: every operand once, every result once |
| instructions an element | counted in the machine code, loops times their trips |
| registers, shared memory, widths | counted: the assembler's |
| programs per SM, live bytes | computed from these and the datasheet |
| microseconds, ms, ratio | modelled, by the rules and constants at the end |
| measured | on the GPU, by torch.profiler in one step; the step's time without it |
"""
GOALS_NOTE = """Ms of ours. Products are libraries' on both sides, and so is attention, but for our
backward where it was measured as faster. At the power limit one of them costs {draw} of a step and
one of everything else {draw_else}, so that a goal leaves everything else (torch.compile's step /
goal - {draw} * products and attention) / {draw_else}. The floor is what its bytes take at the
bandwidth that these passes reach.

**{size} at B={B}: {goal:.2f} is out of reach of what is counted here.** Products and attention are
{drawn:.1f} of the {wanted:.1f} ms that such a step may take, and leave {left:.1f} for passes that
take {passes:.1f}: {floor:.1f} if they were nothing but their bytes, and then the ratio would be
{ratio:.2f}. More needs tensors that are not moved at all, or products that draw less.

At B=4 torch.compile's step waits for the host, which is not modelled: therefore more is measured
than is predicted.
"""
OTHERS_NOTE = """The model's constants are of {name}. That other GPUs reach the same shares of
their peaks is assumed, and that inductor makes the same kernels for them.
"""
MODEL_NOTE = f"""The constants were fitted to all kernels, ours and inductor's, in the record of
{model.MEASURED_ON},
so that neither side is favoured: the sums of its Triton kernels are 1 % from what was measured. The
shares of a peak are those of the first record. The host is not modelled: where the device waits
for it, a step takes longer than predicted.
"""
_LIBRARIES = (  # the more telling first
    (r"cudnn|flash", "attention"),
    (r"nvjet|splitK|gemm|cutlass|^Memset", PRODUCTS),  # memsets are cuBLAS's own
    (r"multi_tensor_apply|lpnorm", "optimizer"),
    (r"FillFunctor<c10::BFloat16>", "loss"),
    (r"CatArrayBatchedCopy_vectorized", "attention"),  # of dq, dk and dv
)


def page(
    p: Prediction, others: Iterable[Prediction], sizes: Iterable[Prediction], records: list[Record]
) -> str:
    """`p` of SIZE and B; `others` on other GPUs; `sizes` of the other steps in GOALS."""
    measured = latest(records, SIZE, B)
    ours, theirs = _rows(measured)
    assert p.recorded is not None  # the page is of a step that is recorded
    compiled = p.recorded["kernels"]
    parts = [HEAD, "## The step\n", _sources(p, measured)]
    parts.append(_step(p, compiled, ours, theirs))
    for title, kernels, row in (
        ("## Our kernels\n", p.ours, ours),
        ("## torch.compile's kernels\n", compiled, theirs),
    ):
        parts += [title, _kernels(kernels, p.gpu, row)]
    parts += ["## Goals\n", _goals([p, *sizes], records)]
    parts += ["## On other GPUs\n", _others([p, *others])]
    parts += ["## The model\n", _model()]
    return "\n".join(parts)


def _rows(measured: Record | None) -> tuple[Any, Any]:
    """Of VARIANTS in a record of training."""
    rows = {row["variant"]: row for row in measured["rows"]} if measured else {}
    ours, theirs = (rows.get(variant) for variant in VARIANTS)
    return ours, theirs


def _sources(p: Prediction, measured: Record | None) -> str:
    r = p.recorded
    assert r is not None
    import triton

    text = (f"Ours is counted from this checkout, compiled by triton {triton.__version__}. "
            f"torch.compile's is recorded: {r['date']}, torch {r['torch']}, triton {r['triton']}, "
            f"{r['source']}.")  # fmt: skip
    if measured:
        torch = measured["environment"]["torch"]
        text += (f" Measured: {measured['date'][:10]}, torch {torch}, commit "
                 f"{measured['commit'][:9]}; where our kernels have changed since, prediction and "
                 "measurement are of different code.")  # fmt: skip
    return text + "\n"


def _step(p: Prediction, compiled: list[Kernel], ours: Any, theirs: Any) -> str:
    """By component, in ms."""
    own = {_in_profiles(k.name): k.component for k in p.ours if k.kind == TRITON}
    columns = [_predicted(p.ours, p.gpu), _measured(ours, own)]
    columns += [_predicted(compiled, p.gpu), _measured(theirs, own)]
    names = sorted({name for column in columns for name in column}, key=lambda n: (n == OTHER, n))
    lines = [[name, *(_ms(column.get(name)) for column in columns)] for name in names]
    lines.append(["kernels", *(_ms(sum(column.values()) or None) for column in columns)])
    drawn = [model.drawn_ms(kernels, p.gpu) for kernels in (p.ours, compiled)]
    lines.append(["at the power limit", _ms(drawn[0]), "", _ms(drawn[1]), ""])
    steps = [p.ours_ms, _seconds(ours), p.compile_ms, _seconds(theirs)]
    lines.append(["step", *map(_ms, steps)])
    launches = [model.launches(p.ours), _launches(ours), model.launches(compiled),
                _launches(theirs)]  # fmt: skip
    lines.append(["launches", *("" if n is None else str(n) for n in launches)])
    ratios = [f"Predicted ratio, torch.compile's step over ours: {p.ratio:.2f}"]
    if steps[1] and steps[3]:
        ratios.append(f"measured: {steps[3] / steps[1]:.2f}")
        ratios.append(f"of the kernels alone, measured: {_over(columns[3], columns[1]):.2f}, "
                      f"predicted: {_over(columns[2], columns[0]):.2f}")  # fmt: skip
    header = ["ms", *(f"{name}, {how}" for name in VARIANTS for how in ("predicted", "measured"))]
    return f"{table(header, lines)}\n\n{'; '.join(ratios)}.\n"


def _over(theirs: dict[str, float], ours: dict[str, float]) -> float:
    return sum(theirs.values()) / sum(ours.values())


def _predicted(kernels: list[Kernel], gpu: model.Gpu) -> dict[str, float]:
    sums: dict[str, float] = {}
    for k in kernels:
        group = PRODUCTS if k.kind == GEMM else k.component
        sums[group] = sums.get(group, 0.0) + model.kernels_ms([k], gpu)
    return sums


def _measured(row: Any, own: dict[str, str]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for kernel in (row or {}).get("kernels", ()):
        group = own.get(kernel["kernel"]) or _component(kernel["kernel"])
        sums[group] = sums.get(group, 0.0) + 1e-3 * kernel["us"]
    return sums


def _component(name: str) -> str:
    if name.startswith("triton_"):
        return "attention" if "_cat_" in name else by_words(name) or OTHER
    return next((group for pattern, group in _LIBRARIES if re.search(pattern, name)), OTHER)


def _kernels(kernels: list[Kernel], gpu: model.Gpu, measured: Any) -> str:
    """Triton's, those of one name together: of most bytes first, shown as the most frequent is."""
    found = {row["kernel"]: row for row in (measured or {}).get("kernels", ())}
    names = dict.fromkeys(k.name for k in kernels if k.kind == TRITON)
    groups = [[k for k in kernels if k.name == name] for name in names]
    groups = [group for group in groups if _bytes(group) >= SHOWN]
    groups.sort(key=lambda group: (-_bytes(group), group[0].name))
    errors, lines = [], []
    for group in groups:
        ms = model.kernels_ms(group, gpu)
        seen = found.get(_in_profiles(group[0].name))
        if seen:
            errors.append(abs(1e3 * ms / seen["us"] - 1))
        lines.append([*_cells(group, gpu), _ms(ms), _ms(1e-3 * seen["us"] if seen else None)])
    header = ["kernel", "times", "MB", "instr/element", "load/store bits", "registers", "shared",
              "per SM", "live MB", "predicted ms", "measured ms"]  # fmt: skip
    close = f"\n\nMedian error of the predictions: {median(errors):.0%}." if errors else ""
    return f"{table(header, lines)}{close}\n"


def _in_profiles(name: str) -> str:
    """Of a kernel: file.name of ours, inductor's as they are, cut off as records do."""
    return f"_{name.split('.')[-1]}" if "." in name else name[:MAX_NAME]


def _bytes(group: list[Kernel]) -> float:
    return sum(k.launches * k.bytes for k in group)


def _cells(group: list[Kernel], gpu: model.Gpu) -> list[str]:
    row = predict.row(max(group, key=lambda k: k.launches), gpu)
    return [
        f"`{row['kernel']}`",
        str(sum(k.launches for k in group)),
        f"{1e-6 * row['bytes']:.1f}",
        f"{row['instructions_per_element']:.1f}",
        f"{row['load_bits']}/{row['store_bits']}",
        str(row["registers"]) + (f", {row['spills']} spills" if row["spills"] else ""),
        str(row["shared_bytes"]),
        str(row["programs_per_sm"]),
        f"{1e-6 * row['live_bytes']:.0f} of {gpu.l2 / 1e6:.0f}" if row["live_bytes"] >= 1e6 else "",
    ]


def _goals(predictions: Sequence[Prediction], records: list[Record]) -> str:
    lines = []
    for p in predictions:
        goal = GOALS[p.size, p.B]
        ours, theirs = map(_seconds, _rows(latest(records, p.size, p.B)))
        measured = f"{theirs / ours:.2f}" if ours and theirs else ""
        shares = [f"{ms:.1f}" for ms in _shares(p, goal)]
        lines.append([f"{p.size}, B={p.B}", f"{goal:.2f}", f"{p.ratio:.2f}", measured, *shares])
    header = ["step, captured", "goal", "predicted", "measured", "products and attention",
              "everything else", "its floor", "what the goal leaves it"]  # fmt: skip
    return f"{table(header, lines)}\n\n{_goals_note(predictions[0])}"


def _shares(p: Prediction, goal: float) -> tuple[float, float, float, float]:
    """Of our step, in ms: products and attention; everything else; what its bytes take; and what
    it might take for the goal.
    """
    libraries = [k for k in p.ours if k.flops]
    passes = [k for k in p.ours if k not in libraries]
    products, rest = (model.kernels_ms(kernels, p.gpu) for kernels in (libraries, passes))
    moved = sum(k.launches * model.moved(k, p.gpu) for k in passes)
    floor = 1e3 * moved / (model.BANDWIDTH * p.gpu.bandwidth)
    assert p.compile_ms is not None  # every step in GOALS is recorded
    left = p.compile_ms / goal - model.DRAW["products"] * products
    return products, rest, floor, left / model.DRAW["the rest"]


def _goals_note(p: Prediction) -> str:
    goal, draw, draw_else = GOALS[p.size, p.B], *model.DRAW.values()
    products, passes, floor, left = _shares(p, goal)
    assert p.compile_ms is not None
    return GOALS_NOTE.format(
        draw=draw, draw_else=draw_else, size=p.size, B=p.B, goal=goal, drawn=draw * products,
        wanted=p.compile_ms / goal, left=left, passes=passes, floor=floor,
        ratio=p.compile_ms / (draw * products + draw_else * floor),
    )  # fmt: skip


def _others(predictions: Sequence[Prediction]) -> str:
    lines = [
        [p.gpu.name, _ms(p.ours_ms), _ms(p.compile_ms), f"{p.ratio or float('nan'):.2f}"]
        for p in predictions
    ]
    header = ["GPU", "ours, predicted ms", "torch.compile, predicted ms", "ratio"]
    name = predictions[0].gpu.name
    return f"{table(header, lines)}\n\n{OTHERS_NOTE.format(name=name)}"


def _model() -> str:
    """The rules and constants where they are used, quoted."""
    rules = [line for line in (model.__doc__ or "").splitlines() if line.startswith("    ")]
    source = Path(model.__file__).read_text()
    named = dict(re.findall(r"^([A-Z_]+) = .*?  # (.*)$", source, re.M))
    lines = [
        [f"`{name}`", str(getattr(model, name)), named.get(name, "of the peak FLOP/s, by phase")]
        for name in ("BANDWIDTH", "ISSUE", "ALONE", "LATENCY", "START", "GAP", "DRAW",
                     "PRODUCTS", "ATTENTION_SHARE", "OWN_ATTENTION")
    ]  # fmt: skip
    constants = table(["constant", "value", "of"], lines)
    return "\n".join(["```", *rules, "```\n", constants, "", MODEL_NOTE])


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _seconds(row: Any) -> float | None:
    return row["ms"]["median"] if row else None


def _launches(row: Any) -> int | None:
    return sum(kernel["launches"] for kernel in row["kernels"]) if row else None


def latest(records: Sequence[Record], size: str, batch: int) -> Record | None:
    """The newest training run of this step on GPU that has both variants' kernels."""
    name = GPUS[GPU].name
    for found in reversed(records):
        settings = found["settings"]
        same = (found["environment"]["device"], found["bench"]) == (name, "train")
        if not same or (settings["size"], settings["B"]) != (size, batch):
            continue
        kernels = {row["variant"] for row in found["rows"] if row.get("kernels")}
        if kernels >= set(VARIANTS):
            return found
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.prediction.page", description=__doc__)
    parser.parse_args()
    predictions = {name: predict.predict(SIZE, B, gpu) for name, gpu in GPUS.items()}
    first = predictions.pop(GPU)
    others = [step for step in GOALS if step != (SIZE, B)]
    sizes = [predict.predict(size, batch, GPUS[GPU]) for size, batch in others]
    PATH.write_text(page(first, predictions.values(), sizes, record.load_all()))
    print(PATH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
