"""What a GPU session runs, as a table: most valuable first, our own never-run kernels last.

A stage is one command, `python -m` and its words. Those in braces come from REAL or TOY; {out} is
the stage's folder, {seconds} most of the time it is given, {data} a folder of tokens, {compile} the
compiled rival: nanoGPT where a checkout was carried. A command need not know of this kit: what
counts is records in {out} and lines of JSON on stdout (results.py), however it ended.
"""

import dataclasses
import shlex
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    command: str
    seconds: float  # at most
    least: float  # with less it is not started, and waits for the next call
    last: bool = False  # never before a stage of the table is untried that isn't
    needs: str = ""  # a value: without it the stage is left out
    gpu: bool = False  # nothing to rehearse on a CPU
    fine: tuple[int, ...] = (0,)  # exit codes of a stage that has done its work

    def argv(self, values: dict[str, object]) -> list[str]:
        """Split before the values come in: a folder's name may hold spaces."""
        words = [word.format(**values) for word in shlex.split(self.command)]
        return [sys.executable, "-m", *words]

    def out(self, work: Path) -> Path:
        return work / self.name


REAL: dict[str, object] = {
    "size": "124M", "large": 16, "small": 4, "T": 1024, "rounds": 4, "steps": 10,
    "tokens": 16384, "width": 768, "vocabulary": 50304, "parameters": 124_000_000, "sampling": 6,
}  # fmt: skip
TOY: dict[str, object] = {
    "size": "char", "large": 2, "small": 1, "T": 16, "rounds": 1, "steps": 1,
    "tokens": 16, "width": 64, "vocabulary": 97, "parameters": 30_000, "sampling": 0.1,
}  # fmt: skip

SUITE = "tests.gpu --resume --out {out} --budget {seconds} --part"
TRAIN = "bench.train --out {out}/records --size {size} --block-size {T}"
B16 = f"{TRAIN} --batch-size {{large}} --rounds {{rounds}} --steps {{steps}} --variants"
B4 = f"{TRAIN} --batch-size {{small}} --rounds {{rounds}} --steps {{steps}} --variants"
OWN = "fastgpt-step-graph fastgpt-step-overlap fastgpt fastgpt-step fastgpt-nologits"
# the record is written after every variant: what is cut off comes last
COMPILED = "{compile} fastgpt-step-graph fastgpt-step fastgpt fastgpt-compile fastgpt-compile-ops"
MORE = "nanogpt fastgpt-nologits liger-fused"  # so that one record shows all there is
PROFILE = "bench.profiler --out {out} --size {size} --batch-size {large} --variant"
OPS = (
    "bench.ops --results {out}/records --tokens {tokens} --width {width} --vocabulary {vocabulary}"
)
OPS += " --seconds {sampling} --op"
BESIDE = "bench.kernels_alone --tokens {tokens} --width {width} --parameters {parameters}"
BESIDE += " --seconds {sampling} --op"


def _op(name: str, *, last: bool = False) -> Stage:
    return Stage(f"op-{name}", f"{OPS} {name}", seconds=75, least=25, last=last)


def _peers(name: str, op: str, own: str) -> Stage:
    """An op without our kernel that has never met a GPU."""
    return Stage(f"peers-{name}", f"{OPS} {op} --without '{own}'", seconds=75, least=25)


PREFLIGHT = Stage("preflight", "bench.gpu.preflight --out {out}", seconds=20, least=0)
STAGES = (
    Stage("suite", f"{SUITE} ops", 190, 60, fine=(0, 1)),
    Stage("gemm", "bench.gpu.gemms --tokens {tokens} --width {width} --vocabulary {vocabulary}"
          " --seconds {sampling}", 30, 12),
    Stage("train-b16", f"{B16} eager {{compile}} {OWN} nanogpt liger-fused", 170, 60),
    Stage("train-b16-compiled", f"{B16} eager {COMPILED} {MORE}", 340, 140),
    Stage("suite-huge", f"{SUITE} huge", 120, 40, fine=(0, 1)),
    Stage("profile-step", f"{PROFILE} fastgpt-step", 60, 25),
    Stage("profile-compile", f"{PROFILE} {{compile}}", 120, 60),
    Stage("train-b4", f"{B4} eager nanogpt {OWN}", 80, 30),
    Stage("train-b4-compiled", f"{B4} eager {COMPILED}", 300, 120),
    *map(_op, ("layer_norm", "add_layer_norm", "cross_entropy", "linear_cross_entropy")),
    _peers("mlp", "mlp", "fastgpt, own GEMM"),
    _peers("attention", "packed_causal_attention", "fastgpt"),
    Stage("adamw", f"{BESIDE} adamw", 40, 15),
    Stage("curves", "bench.curves --data {data} --size {size} --batch-size {large} --block-size {T}"
          " --steps 1000 --out {out}/records", 300, 150, needs="data"),
    # what has never met a GPU, and may hang or fault
    Stage("own-gemm", f"{BESIDE} wgrad fc dgrad", 45, 20, last=True),
    Stage("suite-races", f"{SUITE} races", 60, 20, last=True, gpu=True, fine=(0, 1)),
    Stage("specialized", f"{BESIDE} specialized", 45, 20, last=True, gpu=True),
    *(_op(name, last=True) for name in (
        "linear_gelu", "mlp", "causal_attention", "packed_causal_attention")),
    Stage("tune", "fastgpt tune --seconds {seconds}", 330, 60, last=True, gpu=True),
)  # fmt: skip


def named(names: list[str], stages: tuple[Stage, ...] = STAGES) -> list[Stage]:
    """ValueError names the stages there are."""
    known = {stage.name: stage for stage in stages}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no stage {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]
