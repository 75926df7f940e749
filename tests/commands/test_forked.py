"""`fastgpt run` beside a model.py: nanoGPT's is stood in for, a fork's own runs as it is."""

import ast
import os
import re
from pathlib import Path

import pytest

from fastgpt import cli
from fastgpt import model as own
from fastgpt.commands import forked
from tests.forks import nanogpt

SOURCE = Path(nanogpt.__file__).read_text()
SCRIPT = "from model import GPT\nprint('the model is', GPT.__module__)\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Of a script and a model.py, tests/forks/nanogpt.py taken for nanoGPT's."""
    lines = forked._lines(ast.parse(SOURCE))
    known = {getattr(line, "name", "its own lines"): {forked._digest(line)} for line in lines}
    monkeypatch.setattr(forked, "_NANOGPT", known)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "model.py").write_text(SOURCE)
    return tmp_path


def model_of(folder: Path, capsys, *flags: str) -> str:
    assert cli.main(["run", *flags, str(folder / "script.py")]) == 0
    return capsys.readouterr().out


def test_nanogpts_is_stood_in_for(folder, capsys):
    """However it is laid out, and whatever is said about it."""
    said = model_of(folder, capsys)
    assert "answered by fastgpt" in said and "the model is fastgpt.model" in said
    again = ast.unparse(ast.parse(SOURCE)).replace("class MLP", "# a comment\nclass MLP")
    (folder / "model.py").write_text(f'"""Another text."""\nimport math\n{again}')
    assert "the model is fastgpt.model" in model_of(folder, capsys)


CHANGES = {
    "MLP": (r"4 \* config\.n_embd", "3 * config.n_embd"),
    "GPTConfig": (r"dropout: float = 0\.0", "dropout: float = 0.1"),
    "its own lines": (r"\Z", "\nGPT.forward = GPT.forward\n"),
    "RMSNorm": (r"\Z", "\nclass RMSNorm(nn.Module):\n    pass\n"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_forks_own_runs(folder, capsys, name):
    changed = re.sub(*CHANGES[name], SOURCE, count=1)
    assert changed != SOURCE
    (folder / "model.py").write_text(changed)
    said = model_of(folder, capsys)
    assert f"model.py has {name} otherwise than nanoGPT" in said and "the model is model" in said
    assert cli.main(["run", "--no-logits", str(folder / "script.py")]) == 2
    assert "--no-logits is fastgpt's; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["raise SystemExit(7)", "class GPT:\n    pass", "no Python", ""])
def test_what_is_no_model_is_stood_in_for(folder, capsys, text):
    (folder / "model.py").write_text(text)
    assert "the model is fastgpt.model" in model_of(folder, capsys)


def test_fastgpts_with_changes_is_a_forks(folder, capsys):
    (folder / "model.py").write_text(
        "from fastgpt import model\nclass GPT(model.GPT):\n"
        "    def forward(self, idx, targets=None):\n        return None\n"
    )
    assert "the model is model" in model_of(folder, capsys)


@pytest.mark.parametrize("flags", [[], ["--no-logits"], ["--eager-logits"]], ids=str)
def test_classes_that_a_script_replaces_in_the_module(tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr(own, "MLP", own.MLP)  # put back afterwards
    (tmp_path / "script.py").write_text(
        "import model as M, torch\nclass MLP(M.MLP):\n    pass\nM.MLP = MLP\n"
        "sizes = dict(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=5)\n"
        "print(type(M.GPT(M.GPTConfig(**sizes)).transformer.h[0].mlp).__module__)\n"
    )
    assert "__main__" in model_of(tmp_path, capsys, *flags).splitlines()


@pytest.mark.skipif("NANOGPT_DIR" not in os.environ, reason="NANOGPT_DIR names no nanoGPT")
def test_the_real_one():
    assert forked.differences(Path(os.environ["NANOGPT_DIR"])) is None
