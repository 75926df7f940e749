"""`fastgpt run` beside a model.py: nanoGPT's is stood in for, a fork's own runs as it is."""

import ast
import os
import re
import sys
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
    tree = ast.parse(SOURCE)
    lines = [line for line in tree.body if not isinstance(line, ast.Import | ast.ImportFrom)]
    lines = [line for line in lines if not forked._is_nothing(line)]
    known = {getattr(line, "name", forked._OTHERS): {forked._digest(line)} for line in lines}
    monkeypatch.setattr(forked, "_NANOGPT", known)
    imports = [line for line in tree.body if isinstance(line, ast.Import | ast.ImportFrom)]
    monkeypatch.setattr(forked, "_IMPORTED", forked._origins(imports))
    monkeypatch.setitem(sys.modules, "model", None)  # gone afterwards, whatever a script imports
    del sys.modules["model"]
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
    "its other lines": (r"\Z", "\nGPT.forward = GPT.forward\n"),
    "its imports": (r"import torch.nn.functional as F", "import torch.nn as F"),
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


@pytest.mark.parametrize("text", ["raise SystemExit(7)", "class GPT:\n    pass", "", "GPT2 = 1"])
def test_what_is_no_model_is_stood_in_for(folder, capsys, text):
    (folder / "model.py").write_text(text)
    assert "the model is fastgpt.model" in model_of(folder, capsys)


FORKS = {
    "a subclass": "from fastgpt import model\nclass GPT(model.GPT):\n    pass\n",
    "a base class": "class Base:\n    pass\nclass GPT(Base):\n    pass\n",
    "imported": "from own import GPT\n",
    "with a star": "from own import *\n",
    "assigned": "import own\nGPT = own.GPT\n",
}


@pytest.mark.parametrize("name", FORKS)
def test_a_model_of_another_kind_is_a_forks(folder, capsys, name):
    (folder / "own.py").write_text("class GPT:\n    pass\n")
    (folder / "model.py").write_text(FORKS[name])
    assert "the model is fastgpt.model" not in model_of(folder, capsys)


def test_a_folder_of_modules_is_a_forks(folder, capsys):
    (folder / "model.py").unlink()
    (folder / "model").mkdir()
    (folder / "model/__init__.py").write_text("from .gpt import GPT\n")
    (folder / "model/gpt.py").write_text("class GPT:\n    pass\n")
    assert "the model is model.gpt" in model_of(folder, capsys)


def test_what_cannot_be_parsed_fails_as_under_python(folder, capsys):
    (folder / "model.py").write_text("class GPT(\n")
    assert cli.main(["run", str(folder / "script.py")]) == 1
    assert "SyntaxError" in capsys.readouterr().err


def test_the_recipe_of_the_docs(folder, capsys, monkeypatch):
    monkeypatch.setattr(own, "MLP", own.MLP)  # put back afterwards
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    (recipe,) = (code for code in page.split("```") if "where Block looks for it" in code)
    (folder / "model.py").write_text(recipe.removeprefix("python\n"))
    (folder / "script.py").write_text(
        "from model import GPT, GPTConfig\n"
        "sizes = dict(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=5)\n"
        "print('the mlp is', type(GPT(GPTConfig(**sizes)).transformer.h[0].mlp).__module__)\n"
    )
    assert "the mlp is model" in model_of(folder, capsys)


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
