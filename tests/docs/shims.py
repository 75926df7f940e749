"""The programs that pages name, at sizes for a test: found first on the PATH of a page's commands.

A shim runs the program with the page's own arguments and then smaller ones, which win. What takes
minutes, or installs, is asked whether it would start.
"""

import os
import sys
from pathlib import Path

from tests.docs.pages import ROOT

MODEL = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16"
TRAIN = f"{MODEL} --batch-size 2 --minutes 0.02 --eval-iters 1 --warmup 1 --device cpu"
NANOGPT = (
    "--device=cpu --compile=False --batch_size=2 --block_size=16 --n_layer=1 --n_head=2 --n_embd=16"
)
NANOGPT_TRAIN = "--max_iters=2 --eval_iters=1 --eval_interval=2 --always_save_checkpoint=True"
SHIMS = {
    "fastgpt": f"""
case "$1 $2" in
    "train "*) exec {sys.executable} -m fastgpt "$@" {TRAIN} ;;
    "sample "*) exec {sys.executable} -m fastgpt "$@" --max-new-tokens 5 ;;
    "init-report "*) exec {sys.executable} -m fastgpt "$@" --depths 2 --steps 0 --no-plots \\
        --n-layer 1 --n-embd 16 --n-head 2 --vocab-size 100 ;;
    "run train.py") exec {sys.executable} -m fastgpt "$@" {NANOGPT} {NANOGPT_TRAIN} ;;
    "run sample.py") exec {sys.executable} -m fastgpt "$@" --device=cpu --compile=False \\
        --num_samples=1 --max_new_tokens=5 ;;
    *) exec {sys.executable} -m fastgpt "$@" ;;
esac
""",
    # what a target does is tested where its commands are
    "make": f'cd {ROOT} && exec "$REAL_MAKE" --dry-run --silent "$@" > /dev/null\n',
    "python": f"""
case "$*" in
    "-m bench"*|"-m tests"*|"-m pytest"*|docs/*) cd {ROOT} ;;
esac
exec {sys.executable} "$@"
""",
    # test_pages.py has a test of its own for what they install
    "pip": f'exec {sys.executable} -m pip "$@" --help > /dev/null\n',
    "torchrun": f"""
args=() before=""
for word in "$@"; do  # two processes, whatever is asked for
    [[ "$before" == --nproc-per-node ]] && word=2
    args+=("$word")
    before="$word"
done
case "$*" in *" fastgpt train"*) args+=({TRAIN}) ;; esac
exec {sys.executable} -m torch.distributed.run "${{args[@]}}"
""",
}


def write(folder: Path) -> None:
    for name, text in SHIMS.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{text.lstrip()}")
        path.chmod(0o755)


def environment(shims: Path, make: str) -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTGPT_BACKEND")},
        "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",  # sizes this small only lose time to a second thread
        "REAL_MAKE": make,
        "REPOSITORY": f"file://{ROOT}",
    }
