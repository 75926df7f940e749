"""nanoGPT's unmodified scripts, run as they are and under `fastgpt run`: the same losses and texts.

Needs NANOGPT_DIR, a checkout of nanoGPT, which is copied and not touched.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import checkpoint, cli, data
from fastgpt.commands.prepare import prepare

ROOT = Path(fastgpt.__file__).resolve().parent.parent
NANOGPT_DIR = os.environ.get("NANOGPT_DIR")
PLAIN, OURS = (), ("-m", "fastgpt", "run")

pytestmark = pytest.mark.skipif(not NANOGPT_DIR, reason="NANOGPT_DIR names no nanoGPT checkout")


@pytest.fixture(scope="module")
def nanogpt(tmp_path_factory) -> Path:
    pytest.importorskip("numpy", reason="nanoGPT's train.py imports numpy")
    folder = tmp_path_factory.mktemp("nanogpt") / "nanoGPT"
    shutil.copytree(str(NANOGPT_DIR), folder, ignore=shutil.ignore_patterns(".git", "*.ipynb"))
    prepare(data.read_text(None)[:50_000], folder / "data/shakespeare_char")
    return folder


def run(folder: Path, how: tuple[str, ...], *args: str) -> subprocess.CompletedProcess[str]:
    # one thread: ops this small only lose time to a second one
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *how, *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def output(folder: Path, how: tuple[str, ...], *args: str) -> str:
    done = run(folder, how, *args)
    assert done.returncode == 0, done.stderr
    assert ("`model` answered by fastgpt" in done.stdout) == (how == OURS)
    return done.stdout


def train(folder: Path, how: tuple[str, ...], out: str, *more: str) -> list[float]:
    """The losses that train.py prints."""
    sizes = ("--batch_size=4", "--block_size=32", "--n_layer=2", "--n_head=2", "--n_embd=32")
    schedule = ("--max_iters=20", "--learning_rate=1e-2", "--warmup_iters=5", "--lr_decay_iters=20")
    saving = ("--eval_interval=20", "--eval_iters=1", "--always_save_checkpoint=True")
    machine = ("--device=cpu", "--compile=False", "--gradient_accumulation_steps=1")
    where = ("--dataset=shakespeare_char", f"--out_dir={out}")
    settings = (*sizes, *schedule, *saving, *machine, *where, *more)
    printed = output(folder, how, "train.py", *settings)
    return [float(loss) for loss in re.findall(r"^iter \d+: loss ([\d.]+)", printed, re.M)]


def sample(folder: Path, how: tuple[str, ...], out: str) -> str:
    """The text that sample.py prints, past block_size."""
    settings = ("--device=cpu", "--num_samples=1", "--max_new_tokens=40", f"--out_dir={out}")
    return output(folder, how, "sample.py", *settings).partition("meta.pkl...\n")[2]


@pytest.fixture(scope="module")
def losses(nanogpt) -> dict[tuple[str, ...], list[float]]:
    """Of both runs, whose checkpoints are in out-plain and out-ours."""
    return {PLAIN: train(nanogpt, PLAIN, "out-plain"), OURS: train(nanogpt, OURS, "out-ours")}


def test_training_gives_the_same_losses(losses):
    assert len(losses[PLAIN]) == 21 and losses[PLAIN][-1] < losses[PLAIN][0] - 0.5
    assert losses[OURS] == pytest.approx(losses[PLAIN], abs=2e-3)


@pytest.mark.parametrize("out", ["out-plain", "out-ours"])
def test_each_samples_from_the_others_checkpoint(nanogpt, losses, out):
    theirs = sample(nanogpt, PLAIN, out)
    assert len(theirs) > 40
    assert sample(nanogpt, OURS, out) == theirs


def test_each_resumes_from_the_others_checkpoint(nanogpt, losses):
    shutil.copytree(nanogpt / "out-ours", nanogpt / "out-crossed")
    more = ("--init_from=resume", "--max_iters=23", "--eval_interval=1000")
    theirs = train(nanogpt, PLAIN, "out-crossed", *more)
    ours = train(nanogpt, OURS, "out-plain", *more)
    assert len(theirs) == len(ours) == 4  # iterations 20 to 23
    assert max(*theirs, *ours) < losses[PLAIN][0] - 0.5
    assert ours == pytest.approx(theirs, abs=2e-2)


def test_checkpoint_of_fastgpt_train_serves_nanogpt(nanogpt, monkeypatch):
    monkeypatch.chdir(nanogpt)
    settings = (
        "--data data/shakespeare_char --out out-fastgpt --device cpu --n-layer 2 --n-head 2 "
        "--n-embd 32 --block-size 32 --batch-size 4 --steps 20 --lr 1e-2 --warmup 5 --eval-iters 1"
    )
    assert cli.main(["train", *settings.split()]) == 0
    assert len(sample(nanogpt, PLAIN, "out-fastgpt")) > 40
    more = ("--init_from=resume", "--max_iters=22", "--eval_interval=1000")
    assert len(train(nanogpt, PLAIN, "out-fastgpt", *more)) == 3  # iterations 20 to 22


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_nanogpt_samples_from_what_convert_writes(nanogpt, losses, gelu):
    """From a Hugging Face folder; also with the activation of OpenAI's, which nanoGPT lacks."""
    pytest.importorskip("transformers", reason="converting needs transformers")
    saved = checkpoint.load_checkpoint(nanogpt / "out-plain/ckpt.pt")
    saved["model_args"] |= {"gelu": gelu, "checkpoint_blocks": True}
    folder = nanogpt / f"out-converted-{gelu}"
    checkpoint.save_checkpoint(saved, folder / "from.pt")
    assert cli.main(["convert", f"{folder}/from.pt", f"{folder}/hf"]) == 0
    assert cli.main(["convert", f"{folder}/hf", f"{folder}/ckpt.pt"]) == 0
    # no data folder is named in it: as GPT-2's ids these few are bytes
    settings = ("--device=cpu", "--num_samples=1", "--max_new_tokens=5", f"--out_dir={folder}")
    done = run(nanogpt, PLAIN, "sample.py", *settings, "--start=!")
    if "get_encoding" in done.stderr:
        pytest.skip("nanoGPT's sample.py needs GPT-2's tokenizer here, which is not at hand")
    assert done.returncode == 0, done.stderr


def test_fastgpt_sample_reads_nanogpts_checkpoint(nanogpt, losses, capsys):
    settings = f"--out {nanogpt}/out-plain --device cpu --max-new-tokens 40 --prompt The"
    assert cli.main(["sample", *settings.split()]) == 0
    assert "\nThe" in capsys.readouterr().out


def test_bench_runs(nanogpt):
    """To its end on CUDA; without it bench.py builds the model and its own CUDA call then fails."""
    settings = ("--real_data=False", "--compile=False", "--batch_size=2", "--block_size=64")
    if torch.cuda.is_available():
        assert "time per iteration" in output(nanogpt, OURS, "bench.py", *settings)
        return
    done = run(nanogpt, OURS, "bench.py", "--device=cpu", *settings)
    assert "number of parameters: 123.5" in done.stdout
    assert done.returncode == 1
    assert "torch.cuda.synchronize()" in done.stderr
    assert re.search(r"not compiled with CUDA|no NVIDIA driver", done.stderr.splitlines()[-1], re.I)
