"""Files that are damaged, malicious or of something else, and settings that no run can have."""

import os
import pickle
import random
from array import array
from typing import Any

import pytest
import torch

from fastgpt import GPT, GPTConfig, checkpoint, cli, data
from fastgpt.commands.prepare import prepare
from fastgpt.storage import manifest
from fastgpt.training import nanogpt
from fastgpt.training.config import TrainConfig
from tests.training.runs import TEXT, prepared

SIZES: dict[str, Any] = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)


@pytest.fixture
def saved(tmp_path) -> dict[str, Any]:
    """A checkpoint, which is also in ckpt.pt."""
    config = GPTConfig(**SIZES)
    found = {"model": GPT(config).state_dict(), "model_args": checkpoint.model_args(config)}
    checkpoint.save_checkpoint(found, tmp_path / "ckpt.pt")
    return found


def refused(capsys, *argv: object) -> str:
    capsys.readouterr()
    assert cli.main([str(arg) for arg in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastgpt: ") and err.count("\n") == 1
    return err


def test_no_flipped_bit_loads(saved, tmp_path):
    path = tmp_path / "ckpt.pt"
    whole, draw = path.read_bytes(), random.Random(0)
    size = 8 * len(whole)
    for bit in (*(draw.randrange(size) for _ in range(300)), *range(size - 8 * 110, size, 5)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"(?s)^{path} is .*") as error:
            checkpoint.load_checkpoint(path)
        assert "weights_only" not in str(error.value)


def test_a_flipped_bit_in_nanogpts_own_changes_nothing_silently(saved, tmp_path):
    path, draw = tmp_path / "theirs.pt", random.Random(0)
    torch.save(saved, path)
    whole, refusals = path.read_bytes(), 0
    for bit in (draw.randrange(8 * len(whole)) for _ in range(200)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            found = checkpoint.load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
            refusals += 1
            continue
        assert found["model_args"] == saved["model_args"]
        assert all(torch.equal(w, found["model"][name]) for name, w in saved["model"].items())
    assert refusals > 100


class Evil:
    def __init__(self, function: Any, *args: Any):
        self.what = function, args

    def __reduce__(self) -> Any:
        return self.what


EVIL = {
    "os.system": lambda mark: Evil(os.system, f"touch {mark}"),
    "eval": lambda mark: Evil(eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Evil(exec, f"open({str(mark)!r}, 'w')"),
    "torch.load": lambda mark: Evil(torch.load, str(mark)),
}


@pytest.mark.parametrize("how", EVIL)
def test_nothing_in_a_file_runs(saved, tmp_path, how, capsys):
    mark = tmp_path / "ran"
    torch.save({**saved, "extra": EVIL[how](mark)}, tmp_path / "ckpt.pt")
    err = refused(capsys, "sample", "--out", tmp_path)
    assert str(tmp_path / "ckpt.pt") in err and "could run code" in err
    folder = prepared(tmp_path / "data")
    (folder / manifest.NAME).unlink()
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": EVIL[how](mark)}))
    assert "wants to import" in refused(capsys, "train", "--data", folder, "--out", tmp_path / "o")
    assert not mark.exists()


def test_nothing_in_a_config_file_runs(tmp_path, capsys):
    path, mark = tmp_path / "evil.py", tmp_path / "ran"
    for line in (
        f"batch_size = __import__('os').system('touch {mark}')",
        f"open({str(mark)!r}, 'w')",
        f"n_layer = [open({str(mark)!r}, 'w') for _ in (1,)]",
        f"def f():\n    open({str(mark)!r}, 'w')",
    ):
        path.write_text(line)
        assert f"{path}: line 1: " in refused(capsys, "train", path)
    path.write_text("import time\n'''text'''\nbatch_size = 4 * 2\nlr = 10 ** -3\nfoo = 1\n")
    assert "sets foo" in refused(capsys, "train", path)
    assert not mark.exists()


WRONG_ARGS: dict[str, tuple[dict[str, Any], str]] = {
    "blocks": (dict(n_layer=10**7), "n_layer=10000000, but `model` has 2 blocks"),
    "vocabulary": (dict(vocab_size=10**12), r"wte.weight is \(11, 8\)"),
    "heads": (dict(n_head=3), "not divisible by n_head=3"),
    "a text": (dict(n_embd="x"), "n_embd='x' must be an integer"),
    "unknown": (dict(rotary=True), "'rotary', which no GPT"),
}


@pytest.mark.parametrize("what", WRONG_ARGS)
def test_sizes_are_compared_with_what_is_stored(saved, tmp_path, what):
    changes, message = WRONG_ARGS[what]
    args = {**saved["model_args"], **changes}
    torch.save({**saved, "model_args": args}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=f"{tmp_path}/ckpt.pt is no checkpoint.*{message}"):
        checkpoint.load_checkpoint(tmp_path / "ckpt.pt")


def test_a_tensor_that_claims_more_than_is_stored(tmp_path):
    config = GPTConfig(**{**SIZES, "vocab_size": 10**9})
    weights = {name: torch.zeros(1).expand(shape) for name, shape in checkpoint.shapes(config)}
    torch.save({"model": weights, "model_args": checkpoint.model_args(config)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="larger than what is stored"):
        checkpoint.load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"PK", b"random \x00\xff" * 50, b"PK\3\4" + b"x" * 99])
def test_what_is_no_checkpoint_is_named(tmp_path, capsys, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    for argv in (["sample", "--out", tmp_path], ["convert", tmp_path / "ckpt.pt", tmp_path / "x"]):
        assert f"{tmp_path}/ckpt.pt is no checkpoint" in refused(capsys, *argv)


DAMAGE = {
    "odd": (lambda d: (d / "train.bin").open("ab").write(b"x"), "odd number"),
    "uint32": (
        lambda d: (d / "train.bin").write_bytes(array("I", range(1, 11)).tobytes() * 50),
        "looks like uint32",
    ),
    "beyond": (
        lambda d: (d / "val.bin").write_bytes(array("H", [1, 2, 99] * 50).tobytes()),
        "id 99 at position 2, beyond the vocabulary of 12",
    ),
    "no meta": (lambda d: (d / "meta.pkl").unlink(), "meta.pkl"),
    "empty": (lambda d: (d / "val.bin").write_bytes(b""), "val.bin is empty"),
    "junk meta": (lambda d: (d / "meta.pkl").write_bytes(b"junk"), "is no meta.pkl"),
}


@pytest.mark.parametrize("stated", [True, False], ids=["manifest", "nanoGPT's"])
@pytest.mark.parametrize("what", DAMAGE)
def test_bad_data_is_found_before_training(tmp_path, capsys, what, stated):
    folder, (damage, message) = prepared(tmp_path / "data"), DAMAGE[what]
    damage(folder)
    if not stated:
        (folder / manifest.NAME).unlink()
    err = refused(capsys, "train", "--data", folder, "--out", tmp_path / "out", "--device", "cpu")
    assert str(folder) in err
    if not stated:
        assert message in err
    assert "step" not in capsys.readouterr().out


@pytest.mark.parametrize("after", range(3))
def test_data_killed_halfway_is_never_trained_on(tmp_path, after):
    """Killed when so many files have been put in their places."""
    folder = prepared(tmp_path / "data")
    if (child := os.fork()) == 0:
        replace, count = os.replace, [0]

        def killed(*args: Any) -> None:
            if count[0] > after:
                os._exit(9)
            count[0] += 1
            replace(*args)

        os.replace = killed
        prepare(TEXT[::-1] + "xyz", folder, force=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with pytest.raises(ValueError, match="not whole: its preparation was interrupted"):
        data.open_data(folder)
    prepare(TEXT, folder, force=True)
    data.open_data(folder)


def test_other_data_are_not_written_over(tmp_path):
    folder = prepared(tmp_path / "data")
    prepare(TEXT, folder)  # the same again
    with pytest.raises(FileExistsError, match="holds other data; --force"):
        prepare(TEXT + "a", folder)
    prepare(TEXT + "a", folder, force=True)


BAD_OPTIONS = {
    "--stepps 3": "unknown option --stepps; did you mean --steps?",
    "--learning-rat=1": "did you mean --learning-rate?",
    "--steps x": "invalid int value: 'x'",
    "--steps -3": "steps=-3 must be at least 1",
    "--lr nan": "lr=nan must be a finite number",
    "--lr -1e-3": "lr=-0.001 must be above 0",
    "--warmup -1": "warmup=-1 must be at least 0",
    "--dropout 1": "dropout=1.0 must be below 1",
    "--keep -2": "keep=-2 must be at least 0",
    "--n_head 5": "not divisible by n_head=5; try n_embd=385",
    "--n-layer 10000000": "needs at least",
    "--batch-size 1000000000": "needs at least",
    "--compile=maybe": "'maybe' is not True or False",
    "--schedule line": "invalid choice: 'line'",
    "--device gpu": "device 'gpu' is unknown",
    "--init-from gpt5": "init_from='gpt5'",
    "--resume --force": "contradict each other",
    "--lr 1e-320": "lr=1e-320 is too small",
    "--lr 1e400": "lr=inf must be a finite number",
    "--device=": "--device has an empty value",
    "--wandb-name=": "--wandb-name has an empty value",
    "--dataset=": "--dataset has an empty value",
    "--": "nothing follows --",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_settings_out_of_range_are_refused_by_name(tmp_path, capsys, options):
    folder = prepared(tmp_path / "data")
    argv = ("train", "--data", folder, "--out", tmp_path / "out", "--device", "cpu")
    if options.startswith("--resume"):  # a run to resume is looked for first
        with pytest.raises(ValueError, match=BAD_OPTIONS[options]):
            TrainConfig(data="d", resume=True, force=True)
        return
    assert BAD_OPTIONS[options] in refused(capsys, *argv, *options.split())


def test_other_commands_refuse_by_name(tmp_path, capsys, saved):
    saved["fastgpt"] = {"characters": list("abcdefghijk")}
    checkpoint.save_checkpoint(saved, tmp_path / "ckpt.pt")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abc")
    for command, options in {
        "sample": ["num-samples -1", "max-new-tokens x", "seed -4", "top-k 0", "top-p nan",
                   "temperature 1e-320", "temperature nan", f"prompt-file {tmp_path}/empty.txt",
                   f"prompt FILE:{tmp_path}/empty.txt", "device gpu"],
        "prepare": ["val-fraction 1.5", "processes 0", "tokenizer x"],
        "tune": ["n-head 0", "seconds nan"],
        "init-report": ["steps -1", "depths 0"],
    }.items():  # fmt: skip
        for option in options:
            name, value = option.split()
            err = refused(capsys, command, "--out", tmp_path, f"--{name}", value)
            assert value.removeprefix("FILE:") in err, option
    for name in ("short.txt", "empty.txt", "none"):
        err = refused(capsys, "prepare", tmp_path / name, "--out", tmp_path / "d")
        assert str(tmp_path / name) in err
    assert len(refused(capsys, "train", "--steps", "9" * 5000)) < 1100


def test_control_characters_reach_a_terminal_escaped(tmp_path, capsys):
    prepare("\x1b[31m red \x07 \r\n" * 20, tmp_path / "data")
    settings = "--device cpu --n-layer 1 --n-head 1 --n-embd 8 --block-size 4 --steps 1"
    argv = ["train", "--data", f"{tmp_path}/data", "--out", f"{tmp_path}/out"]
    assert cli.main([*argv, *settings.split(), "--eval-iters", "1", "--sample_tokens=40"]) == 0
    assert cli.main(["sample", "--out", f"{tmp_path}/out", "--prompt", "\x1b[31m"]) == 0
    said = capsys.readouterr().out
    assert "\\x1b" in said and not any(c in said for c in "\x1b\x07\r")
    assert "\\x1b[2J" in refused(capsys, "convert", "\x1b[2J", "x")


def test_nanogpts_names_and_config_files(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "# a comment\nimport time\nout_dir = 'out-x'\nmax_iters = 5 * 100\nwarmup_iters = 10\n"
        "wandb_run_name = 'ft-' + str(time.time())\ndecay_lr = False\ndataset = 'shakespeare'\n"
    )
    known = set(TrainConfig.__dataclass_fields__)
    found = nanogpt.read_config(path, known)
    assert found["steps"] == 500 and found["warmup"] == 10 and found["out"] == "out-x"
    assert found["schedule"] == "constant" and found["data"] == "data/shakespeare"
    assert found["n_layer"] == 12 and found["grad_accum"] == 40  # train.py's own
    assert found["wandb_name"].startswith("ft-")
