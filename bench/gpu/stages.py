"""What a GPU session runs, as a table: most valuable first, kernels that may hang last.

A stage is a command, `python -m` and its arguments. Words in braces come from REAL or TOY; {out} is
the stage's folder, {seconds} most of the time it may take, {data} a folder of tokens, {compile} the
compiled model to compare with: nanoGPT where a checkout was brought along. The commands know
nothing of this package: their results are records in {out} and lines of JSON on stdout, which
results.py reads.
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
    least: float  # with less time left it waits for the next call
    last: bool = False  # only after every stage without this flag has been tried
    needs: str = ""  # a name of Inputs.carried: without it the stage is left out
    gpu: bool = False  # left out of a rehearsal on a CPU
    fine: tuple[int, ...] = (0,)  # exit codes that mean it has done its work

    def argv(self, values: dict[str, object]) -> list[str]:
        """The command's words, split before values are put in: a folder's name may hold spaces."""
        words = [word.format(**values) for word in shlex.split(self.command)]
        return [sys.executable, "-m", *words]

    def out(self, work: Path) -> Path:
        return work / self.name


REAL: dict[str, object] = {
    "size": "124M", "large": 16, "small": 4, "T": 1024, "rounds": 4, "steps": 10,
    "tokens": 16384, "width": 768, "vocabulary": 50304, "parameters": 124_000_000, "sampling": 6,
    "prompt": 224, "new": 128,
}  # fmt: skip
TOY: dict[str, object] = {
    "size": "char", "large": 2, "small": 1, "T": 16, "rounds": 1, "steps": 1,
    "tokens": 16, "width": 64, "vocabulary": 97, "parameters": 30_000, "sampling": 0.1,
    "prompt": 4, "new": 2,
}  # fmt: skip

SUITE = "tests.gpu --resume --out {out} --budget {seconds} --part"
TRAIN = "bench.train --out {out}/records --size {size} --block-size {T}"
B16 = f"{TRAIN} --batch-size {{large}} --rounds {{rounds}} --steps {{steps}} --variants"
B4 = f"{TRAIN} --batch-size {{small}} --rounds {{rounds}} --steps {{steps}} --variants"
OWN = "fastgpt-step-overlap fastgpt-step-graph fastgpt fastgpt-step fastgpt-nologits"
# the record is written after every variant: what is cut off comes last
COMPILED = "{compile} fastgpt-step-graph fastgpt-step fastgpt fastgpt-compile fastgpt-compile-ops"
# so that one record has every variant
MORE = "nanogpt fastgpt-nologits fastgpt-compile-eager-logits liger-fused"
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
    """An op's peers alone, without `own`, the kernel of fastgpt's that may hang."""
    return Stage(f"peers-{name}", f"{OPS} {op} --without '{own}'", seconds=75, least=25)


PREFLIGHT = Stage("preflight", "bench.gpu.preflight --out {out}", seconds=20, least=0)
STAGES = (
    Stage("suite", f"{SUITE} ops", 190, 60, fine=(0, 1)),
    Stage("gemm", "bench.gpu.gemms --tokens {tokens} --width {width} --vocabulary {vocabulary}"
          " --seconds {sampling}", 30, 12),
    Stage("train-b16", f"{B16} eager {{compile}} {OWN} nanogpt liger-fused", 170, 60),
    Stage("train-b16-compiled", f"{B16} eager {COMPILED} {MORE}", 360, 140),
    Stage("suite-huge", f"{SUITE} huge", 120, 40, fine=(0, 1)),
    Stage("profile-step", f"{PROFILE} fastgpt-step", 60, 25),
    Stage("profile-compile", f"{PROFILE} {{compile}}", 120, 60),
    Stage("train-b4", f"{B4} eager nanogpt {OWN}", 80, 30),
    Stage("train-b4-compiled", f"{B4} eager {COMPILED}", 300, 120),
    *map(_op, ("layer_norm", "add_layer_norm", "cross_entropy", "linear_cross_entropy")),
    _peers("mlp", "mlp", "fastgpt, own GEMM"),
    _peers("attention", "packed_causal_attention", "fastgpt"),
    Stage("adamw", f"{BESIDE} adamw", 40, 15),
    # fastgpt's decoding kernels have run on a GPU; batches too large for them run PyTorch's
    Stage("decode", "bench.decode --out {out}/records --size {size} --batch 1 8 64"
          " --prompt {prompt} --new-tokens {new} --rounds {rounds}"
          " --variants eager fastgpt nanogpt hf hf-static", 150, 60),
    Stage("curves", "bench.curves --data {data} --size {size} --batch-size {large} --block-size {T}"
          " --steps 1000 --out {out}/records", 300, 150, needs="data"),
    # kernels that may hang or fault
    Stage("own-gemm", f"{BESIDE} wgrad fc dgrad", 45, 20, last=True),
    Stage("suite-races", f"{SUITE} races", 60, 20, last=True, gpu=True, fine=(0, 1)),
    Stage("specialized", f"{BESIDE} specialized", 45, 20, last=True, gpu=True),
    *(_op(name, last=True) for name in (
        "linear_gelu", "mlp", "causal_attention", "packed_causal_attention")),
    Stage("tune", "fastgpt tune --seconds {seconds}", 330, 60, last=True, gpu=True),
)  # fmt: skip


def named(names: list[str], stages: tuple[Stage, ...] = STAGES) -> list[Stage]:
    """The stages of these names; ValueError lists the known ones."""
    known = {stage.name: stage for stage in stages}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no stage {', '.join(unknown)}; use some of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]
