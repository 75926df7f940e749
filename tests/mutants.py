"""Mutation testing of the kernels: break each one on purpose and see that its tests notice.

`python -m tests.mutants [NAME ...]` copies the tree, applies one mutant at a time and runs the test
file that guards it, stopping at the first failure. It prints a line per mutant and fails if one
survives, or if the text a mutant replaces is gone.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    name: str
    file: str  # under kernels/
    old: str
    new: str
    test: str  # under tests/


MUTANTS = [
    Mutant(
        "variance over padding",
        "layer_norm.py",
        "xc = tl.where(mask, x - mean[:, None], 0.0)",
        "xc = x - mean[:, None]",
        "layer_norm",
    ),
    Mutant(
        "statistics in half precision",
        "layer_norm.py",
        "tl.store(mean_ptr + rows, mean, mask=rows < M)",
        "tl.store(mean_ptr + rows, mean.to(tl.float16).to(tl.float32), mask=rows < M)",
        "layer_norm",
    ),
    Mutant(
        "dx without mean(g)",
        "layer_norm.py",
        "ds = rstd * (g - c1 - xhat * c2)",
        "ds = rstd * (g - xhat * c2)",
        "layer_norm",
    ),
    Mutant(
        "db never written",
        "layer_norm.py",
        "tl.store(db_ptr + partial, tl.sum(db, axis=0), mask=cols < N)",
        "pass",
        "layer_norm",
    ),
    Mutant(
        "dw of the first strip only",
        "layer_norm.py",
        "dw.copy_(dw_partial.sum(0))",
        "dw.copy_(dw_partial[:1].sum(0))",
        "layer_norm",
    ),
    Mutant(
        "row stride taken for the width",
        "layer_norm.py",
        "x_ptr + rows[:, None] * stride_xm",
        "x_ptr + rows[:, None] * N",
        "layer_norm",
    ),
    Mutant(
        "gradient's column stride forgotten",
        "layer_norm.py",
        "rows[:, None] * stride_dym + cols[None, :] * stride_dyn",
        "rows[:, None] * stride_dym + cols[None, :]",
        "layer_norm",
    ),
    Mutant(
        "gradient to the sum dropped",
        "layer_norm.py",
        "ds += tl.load(ds_out_ptrs, mask=mask, other=0.0).to(tl.float32)",
        "ds += 0.0 * tl.load(ds_out_ptrs, mask=mask, other=0.0).to(tl.float32)",
        "layer_norm",
    ),
    Mutant(
        "sum normalised before rounding",
        "layer_norm.py",
        "x = s.to(tl.float32)  #",
        "x += tl.load(r_ptrs, mask=mask, other=0.0)  #",
        "layer_norm",
    ),
    Mutant(
        "erf swapped for tanh",
        "_math.py",
        "    if TANH:\n        # 0.5",
        "    if not TANH:\n        # 0.5",
        "gelu_mlp",
    ),
    Mutant(
        "gelu_grad without the density",
        "_math.py",
        "return cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)",
        "return cdf",
        "gelu_mlp",
    ),
    Mutant("tanh gelu_grad coefficient", "_math.py", "0.134145", "0.044715", "gelu_mlp"),
    Mutant(
        "bias gradient of one strip",
        "gelu_mlp.py",
        "db.copy_(partial.sum(0))",
        "db.copy_(partial[0])",
        "gelu_mlp",
    ),
    Mutant(
        "activation not recomputed",
        "gelu_mlp.py",
        "gelu(h, TANH).to(y_ptr.dtype.element_ty), mask=mask)\n\n    if",
        "h.to(y_ptr.dtype.element_ty), mask=mask)\n\n    if",
        "gelu_mlp",
    ),
    Mutant(
        "GEMM tail of K unmasked",
        "gemm_gelu.py",
        "x = tl.load(x_ptrs, mask=(ks < K - start)[None, :], other=0.0)",
        "x = tl.load(x_ptrs)",
        "gelu_mlp",
    ),
    Mutant(
        "GEMM without bias",
        "gemm_gelu.py",
        "acc += tl.load(b_ptr + cols % N)",
        "acc += 0.0 * tl.load(b_ptr + cols % N)",
        "gelu_mlp",
    ),
    Mutant(
        "diagonal excluded",
        "attention_forward.py",
        "rows[:, None] >= cols[None, :]",
        "rows[:, None] > cols[None, :]",
        "attention",
    ),
    Mutant(
        "running sum not rescaled",
        "attention_forward.py",
        "total = total * shrink +",
        "total = total +",
        "attention",
    ),
    Mutant(
        "diagonal blocks unmasked",
        "attention_forward.py",
        "True, PRECISION, D, BLOCK_N, BLOCK_D)",
        "False, PRECISION, D, BLOCK_N, BLOCK_D)",
        "attention",
    ),
    Mutant(
        "head stride taken for batch's",
        "attention_forward.py",
        "k_ptr += b * stride_kb + h * stride_kh",
        "k_ptr += b * stride_kb + h * stride_kb",
        "attention",
    ),
    Mutant(
        "padded head dim loaded",
        "_attention.py",
        "mask = mask & (ds < D)[None, :]",
        "pass",
        "attention",
    ),
    Mutant(
        "delta left out",
        "attention_backward.py",
        "ds = p * (dp - delta[None, :])",
        "ds = p * dp",
        "attention",
    ),
    Mutant("dq unscaled", "attention_backward.py", "dq * scale", "dq", "attention"),
    Mutant(
        "dk of the diagonal only",
        "attention_backward.py",
        "head, cols, below, T,",
        "head, cols, T, T,",
        "attention",
    ),
    Mutant(
        "dropout forgotten in dp",
        "attention_backward.py",
        "dp = tl.where(kept, dp * keep_scale, 0.0)\n        ds = p * (dp - delta[:, None])",
        "ds = p * (dp - delta[:, None])",
        "attention",
    ),
    Mutant(
        "dropout mask the same in all heads", "_attention.py", "head + zero", "zero", "attention"
    ),
    Mutant(
        "ignored rows counted",
        "cross_entropy.py",
        "count = (targets != ignore_index).sum()",
        "count = (targets == targets).sum()",
        "cross_entropy",
    ),
    Mutant(
        "ignored rows get gradient",
        "cross_entropy.py",
        "dx = tl.where(counted[:, None], dx, 0.0)",
        "pass",
        "cross_entropy",
    ),
    Mutant(
        "upstream gradient ignored",
        "cross_entropy.py",
        "dloss / count",
        "1.0 / count",
        "cross_entropy",
    ),
    Mutant(
        "no running maximum",
        "cross_entropy.py",
        'shift = tl.where(new_top == float("-inf"), 0.0, new_top)',
        "shift = new_top * 0.0",
        "cross_entropy",
    ),
    Mutant(
        "target read unchecked",
        "cross_entropy.py",
        "_check_targets(targets, V, ignore_index)",
        "pass",
        "cross_entropy",
    ),
]


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass on a copy of the tree with this mutant in it."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "fastgpt"
        skip = shutil.ignore_patterns(".*", "out", "__pycache__")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=skip)
        path = tree / "kernels" / mutant.file
        source = path.read_text()
        if mutant.old not in source:
            raise ValueError(f"{mutant.name}: {mutant.file} no longer contains {mutant.old!r}")
        path.write_text(source.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", f"tests/test_{mutant.test}.py"]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"{mutant.name}: pytest could not run\n{done.stdout[-2000:]}{done.stderr}"
        )
    return done.returncode == 0


def main() -> int:
    chosen = [m for m in MUTANTS if not sys.argv[1:] or m.name in sys.argv[1:]]
    survivors = []
    for mutant in chosen:
        start = time.perf_counter()
        alive = survives(mutant)
        survivors += [mutant.name] * alive
        verdict = "SURVIVES" if alive else "caught"
        print(f"{verdict:9} {time.perf_counter() - start:5.1f}s  {mutant.name}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
