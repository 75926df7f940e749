"""The command line: what it prints, what it refuses and how, and `fastgpt run` on a script."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import backend, checkpoint, cli, data, environment
from fastgpt.commands import sample
from fastgpt.config import GPTConfig
from fastgpt.model import GPT

ROOT = Path(fastgpt.__file__).resolve().parent.parent
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a text, its data/ and an out/ with the checkpoint of a short training."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "fox.txt").write_text(TEXT)
    assert cli.main(["prepare", f"{folder}/fox.txt", "--out", f"{folder}/data"]) == 0
    settings = (
        f"--data {folder}/data --out {folder}/out --device cpu --n-layer 2 --n-head 2 --n-embd 32 "
        "--block-size 16 --batch-size 4 --steps 30 --lr 1e-2 --warmup 5 --eval-iters 2"
    )
    assert cli.main(["train", *settings.split()]) == 0
    return folder


def refused(capsys, *argv: str) -> str:
    """The message of a command that must fail as a user's error does."""
    assert cli.main([str(arg) for arg in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastgpt: ") and "Traceback" not in err
    return err


def test_every_command_has_both_functions():
    for module_name, _ in cli.MODULES.values():
        module = importlib.import_module(module_name)
        assert callable(module.add_arguments) and callable(module.main)


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    names = {line.split()[0] for line in out.splitlines() if line.startswith("    ")}
    assert names >= {*cli.MODULES, "bench"}


def test_alone_it_lists_its_commands_with_examples(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert set(cli.EXAMPLES) == set(cli.MODULES)
    for name, example in cli.EXAMPLES.items():
        assert f"\n{name}: " in out and example.startswith(f"fastgpt {name}")
        assert f"\n    {example}\n" in out
    assert max(map(len, out.splitlines())) <= 60


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastgpt {fastgpt.__version__}\n"


def test_info_is_a_bug_reports_first_page(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    facts = ("fastgpt", "device", "driver", "capability", "python", "torch", "triton", "peak")
    for name in (*facts, "C compiler", "caches", "  tuned", "  inductor", *backend.OPS):
        assert f"\n{name}" in f"\n{out}"
    assert torch.__version__ in out and fastgpt.__version__ in out
    assert max(map(len, out.splitlines())) <= 60 + len(str(Path.home()))  # but for a path
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__ and set(found["ops"]) == set(backend.OPS)
    for choice in fastgpt.backend_report().values():
        assert {"implementation", "reason"} == found["ops"]["mlp"].keys()
        assert choice._asdict() in found["ops"].values()


class TestCCompiler:
    """Each test's PATH and CC are its own."""

    def test_the_one_that_is_asked_for(self, monkeypatch, tmp_path):
        (tmp_path / "mycc").write_text("#!/bin/sh\n")
        (tmp_path / "mycc").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CC", "mycc")
        assert environment.c_compiler().startswith(str(tmp_path / "mycc"))
        monkeypatch.setenv("CC", "another")
        assert environment.c_compiler().startswith("none (another)")

    def test_none(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        assert "none (gcc, clang, cc)" in environment.c_compiler()
        assert environment.hardware()["driver"] == "no nvidia-smi on the PATH"

    def test_without_pythons_headers(self, monkeypatch, tmp_path):
        (tmp_path / "gcc").write_text("#!/bin/sh\n")
        (tmp_path / "gcc").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
        assert "Python.h is missing" in environment.c_compiler()


@pytest.mark.parametrize("code, said", [(0, "580.1"), (9, "nvidia-smi failed: 580.1")])
def test_the_driver_is_what_nvidia_smi_says(monkeypatch, tmp_path, code, said):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho 580.1\nexit {code}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert environment.hardware()["driver"] == said


def test_python_m_fastgpt_from_another_folder(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastgpt", "sample", "--out", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("fastgpt: no checkpoint nowhere/ckpt.pt")
    assert "Traceback" not in done.stderr


def test_bench_without_a_checkout_names_the_remedy(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(fastgpt, "__file__", str(tmp_path / "site-packages/fastgpt/__init__.py"))
    assert "checkout of fastgpt" in refused(capsys, "bench", "--help")


def test_bench_is_the_checkouts_own(capsys, tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/train.py").write_text("import sys\nprint('bench', sys.argv[1:])\n")
    monkeypatch.setattr(fastgpt, "__file__", str(tmp_path / "fastgpt/__init__.py"))
    assert cli.main(["bench", "--size", "124M"]) == 0
    assert "bench ['--size', '124M']" in capsys.readouterr().out


class TestRun:
    def test_model_is_ours_and_arguments_pass(self, tmp_path, capsys):
        script = tmp_path / "script.py"
        script.write_text(
            "import sys\nfrom model import GPT, GPTConfig\n"
            "print(GPT.__module__, GPTConfig.__module__, sys.argv[1:], __name__, sys.path[0])\n"
        )
        before = sys.argv, list(sys.path), sys.modules.get("model")
        assert cli.main(["run", str(script), "--batch_size=4", "-x", "--help"]) == 0
        first, *explained, last = capsys.readouterr().out.splitlines()
        assert "`model` answered by fastgpt" in first
        assert explained == [] or "mfu is nan" in explained[0]
        seen = (
            f"fastgpt.model fastgpt.config ['--batch_size=4', '-x', '--help'] __main__ {tmp_path}"
        )
        assert last == seen
        assert (sys.argv, sys.path, sys.modules.get("model")) == before

    @pytest.mark.parametrize(
        "flags, logits", [((), True), (("--no-logits",), False), (("--eager-logits",), True)]
    )
    def test_logits_beside_a_loss(self, tmp_path, capsys, flags, logits):
        """As train.py builds and calls a model; without targets there is nothing else."""
        script = tmp_path / "script.py"
        script.write_text(
            "import sys, torch\nfrom model import GPT, GPTConfig\n"
            "model = GPT(GPTConfig(**dict(block_size=8, vocab_size=11, n_layer=1, n_head=1,"
            " n_embd=16, bias=False, dropout=0.0)))\n"
            "idx = torch.arange(8)[None]\n"
            "logits, loss = model(idx, idx)\nloss.backward()\n"
            "alone, nothing = model(idx)\n"
            "print(isinstance(model, GPT), logits is not None, loss.shape, alone.shape, nothing)\n"
            "print(sys.argv[1:])\n"
            "assert model.config.return_logits == %r\n"
            % ("eager" if "--eager-logits" in flags else logits)
        )
        assert (
            cli.main(["run", *flags, str(script), "--no-logits"]) == 0
        )  # the last is the script's
        printed = capsys.readouterr().out.splitlines()
        assert ("without logits" in printed[0]) != logits
        expected = f"True {logits} torch.Size([]) torch.Size([1, 1, 11]) None"
        assert printed[-2:] == [expected, "['--no-logits']"]

    def test_no_logits_that_are_eager(self, capsys):
        assert "not allowed with" in refused(capsys, "run", "--no-logits", "--eager-logits", "x.py")

    def test_a_missing_script(self, capsys, tmp_path):
        assert "no script" in refused(capsys, "run", tmp_path / "train.py")

    def test_an_error_of_the_script_keeps_its_traceback(self, tmp_path, capsys):
        script = tmp_path / "script.py"
        script.write_text("raise ValueError('Unknown config key: batchsize')\n")
        assert cli.main(["run", str(script)]) == 1
        err = capsys.readouterr().err
        assert f'File "{script}", line 1' in err and "Unknown config key: batchsize" in err

    def test_an_exit_code_of_the_script(self, tmp_path):
        (tmp_path / "script.py").write_text("raise SystemExit(3)\n")
        with pytest.raises(SystemExit) as stop:
            cli.main(["run", str(tmp_path / "script.py")])
        assert stop.value.code == 3

    def test_a_file_that_is_only_beside_the_script(self, tmp_path, capsys, monkeypatch):
        (tmp_path / "nanoGPT").mkdir()
        (tmp_path / "nanoGPT/configurator.py").write_text("")
        (tmp_path / "nanoGPT/train.py").write_text("exec(open('configurator.py').read())\n")
        monkeypatch.chdir(tmp_path)
        assert "cd nanoGPT && fastgpt run train.py" in refused(capsys, "run", "nanoGPT/train.py")
        monkeypatch.chdir(tmp_path / "nanoGPT")
        assert cli.main(["run", "train.py"]) == 0


class TestSample:
    def test_the_seed_decides(self, trained, capsys):
        texts = []
        for seed in ("1", "1", "2"):
            command = ["sample", "--out", f"{trained}/out", "--prompt", "The ", "--seed", seed]
            assert cli.main([*command, "--max-new-tokens", "40"]) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1] != texts[2]
        # a model's introduction is no part of the text
        assert texts[0].startswith("The ") and texts[0].endswith("\n---------------\n")

    def test_stop_ends_a_sample(self, trained, capsys):
        command = ["sample", "--out", f"{trained}/out", "--prompt", "The ", "--temperature", "1"]
        assert cli.main([*command, "--stop", "o", "--num-samples", "3"]) == 0
        samples = capsys.readouterr().out.split("\n---------------\n")
        assert len(samples) == 4  # and what follows the last separator
        assert all(sample.count("o") == 1 and sample.endswith("o") for sample in samples[:3])

    def test_prompt_file(self, trained, capsys):
        (trained / "prompt.txt").write_text("lazy dog")
        command = ["sample", "--out", f"{trained}/out", "--prompt-file", f"{trained}/prompt.txt"]
        assert cli.main([*command, "--max-new-tokens", "5"]) == 0
        assert capsys.readouterr().out.startswith("lazy dog")

    def test_nanogpts_options(self, trained, capsys):
        """Its sample.py's, spelled as there, give the text of ours."""
        (trained / "start.txt").write_text("lazy dog")
        ours = ("--prompt", "lazy dog", "--num-samples", "2", "--max-new-tokens", "9")
        theirs = (f"--start=FILE:{trained}/start.txt", "--num_samples=2", "--max_new_tokens=9")
        theirs += ("--init_from=resume", "--top_k=200", "--seed=1337")
        texts = []
        for out, how in (("--out", ours), ("--out_dir", theirs)):
            assert cli.main(["sample", out, f"{trained}/out", *how]) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1] and texts[0].count("lazy dog") == 2

    def test_the_text_is_that_of_nanogpts_sample_py(self, trained, capsys):
        """Which seeds, builds a model, whose first weights draw from the generator, and loads."""
        saved = checkpoint.load_checkpoint(trained / "out/ckpt.pt")
        tokenizer = sample.tokenizer_of(saved, trained / "out")
        torch.manual_seed(5)
        model = GPT(GPTConfig(**saved["model_args"]))
        model.load_state_dict(saved["model"])
        idx = torch.tensor([tokenizer.encode("The ")])
        ids = [model.eval().generate(idx, 30, temperature=0.8, top_k=200) for _ in range(2)]
        theirs = "".join(
            f"{''.join(tokenizer.stream(y[0].tolist()))}\n---------------\n" for y in ids
        )
        capsys.readouterr()
        command = ["sample", f"--out_dir={trained}/out", "--start=The ", "--seed=5"]
        more = ["--num_samples=2", "--max_new_tokens=30", "--compile=False", "--device=cpu"]
        assert cli.main([*command, *more]) == 0
        assert capsys.readouterr().out == theirs

    def test_ends_with_its_speed(self, trained, capsys):
        command = ["sample", "--out", f"{trained}/out", "--prompt", "The ", "--dtype", "bfloat16"]
        for tokens, words in (
            ("9", r"[\d.]+ tokens/s after it, \d+ ms to the first token"),
            ("1", r"\d+ ms to the first token"),
            ("0", "no token was sampled"),
        ):
            assert cli.main([*command, "--max-new-tokens", tokens]) == 0
            assert re.fullmatch(words + "\n", capsys.readouterr().err)

    def test_prompt_lookup(self, trained, capsys):
        """The same text, and how many guesses were right."""
        command = ["sample", "--out", f"{trained}/out", "--prompt", "The ", "--temperature", "0"]
        texts = []
        for more in ([], ["--prompt-lookup", "4"]):
            assert cli.main([*command, "--max-new-tokens", "20", *more]) == 0
            texts.append(capsys.readouterr())
        assert texts[0].out == texts[1].out
        words = r".*; prompt lookup guessed (\d+) tokens, (\d+).* of them right\n"
        guessed, right = map(int, re.fullmatch(words, texts[1].err).groups())
        assert 0 <= right <= guessed

    def test_refusals(self, trained, capsys, tmp_path):
        out = ("sample", "--out", trained / "out")
        assert "prompt_lookup=9 must be from 1 to 7" in refused(
            capsys, *out, "--prompt-lookup", "9"
        )
        unknown = refused(capsys, *out, "--prompt", "naïve €")
        assert "'ï'" in unknown and "'€'" in unknown and "'n'" not in unknown
        assert "--prompt has an empty value" in refused(capsys, *out, "--prompt", "")
        assert "--temperature: -1" in refused(capsys, *out, "--temperature", "-1")
        assert "--top-k/--top_k: 0" in refused(capsys, *out, "--top_k", "0")
        assert "--top-p/--top_p: 2" in refused(capsys, *out, "--top-p", "2")
        assert "--max-new-tokens/--max_new_tokens: -3" in refused(
            capsys, *out, "--max_new_tokens", "-3"
        )
        assert "--num-samples/--num_samples: -1" in refused(capsys, *out, "--num_samples", "-1")
        assert "no_such_file" in refused(capsys, *out, "--start", "FILE:no_such_file")
        (tmp_path / "ckpt.pt").write_text("not a checkpoint")
        assert "is no checkpoint" in refused(capsys, "sample", "--out", tmp_path)
        if not torch.cuda.is_available():
            assert "sees no GPU" in refused(capsys, *out, "--device", "cuda")


class TestConvert:
    @pytest.fixture(autouse=True)
    def _transformers(self):
        pytest.importorskip("transformers", reason="converting needs transformers")

    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
    @pytest.mark.parametrize("gelu", ["none", "tanh"])
    def test_round_trip_keeps_the_logits(self, tmp_path, bias, gelu):
        from transformers import GPT2LMHeadModel

        sizes = GPTConfig(
            block_size=12, vocab_size=41, n_layer=2, n_head=2, n_embd=16, bias=bias, gelu=gelu
        )
        model = GPT(sizes).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        args = checkpoint.model_args(sizes)
        assert ("gelu" in args) == (gelu != "none") and "return_logits" not in args
        checkpoint.save_checkpoint(
            {"model": model.state_dict(), "model_args": args}, tmp_path / "ckpt.pt"
        )
        assert cli.main(["convert", f"{tmp_path}/ckpt.pt", f"{tmp_path}/hf"]) == 0
        assert cli.main(["convert", f"{tmp_path}/hf", f"{tmp_path}/back.pt"]) == 0

        idx = torch.randint(41, (2, 12))
        logits, _ = model(idx, idx)
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()(idx).logits
        back = checkpoint.load_model(checkpoint.load_checkpoint(tmp_path / "back.pt")).eval()
        torch.testing.assert_close(theirs, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(back(idx, idx)[0], logits, atol=1e-5, rtol=1e-5)

    def test_refusals(self, tmp_path, capsys):
        existing = tmp_path / "existing"
        existing.mkdir()
        assert "no checkpoint file" in refused(capsys, "convert", tmp_path / "none.pt", "x")
        assert "--force" in refused(capsys, "convert", existing, existing)
        assert "has no config.json" in refused(capsys, "convert", existing, tmp_path / "new.pt")


def test_prepare_without_a_file_needs_no_network(tmp_path, capsys):
    assert cli.main(["prepare", "--out", str(tmp_path)]) == 0
    assert len(data.load_split(tmp_path, "train")) > 100_000
    assert "tokens to train on" in capsys.readouterr().out
