"""`make demo`, in seconds: what it says at its end, and whom it is compared with."""

import functools
import os
import sys

import pytest
import torch

from fastgpt.commands import demo


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """What a demo of a short text prints, the progress of its training left out."""

    def run(nanogpt: str) -> str:
        text = tmp_path / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog.\n" * 300)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("NANOGPT_DIR", nanogpt)
        monkeypatch.setattr(demo, "_speed", functools.partial(demo._speed, seconds=0, steps=1))
        monkeypatch.setattr(sys, "argv", ["demo", "--data", str(text), "--minutes", "0.02"])
        assert demo.main() == 0
        out = capsys.readouterr().out
        return out[out.index("what was learned") :]

    return run


def test_it_ends_with_what_was_learned_and_how_fast(said):
    end = said("/nowhere")
    losses = [float(line.split()[0]) for line in end.split("\n\n")[0].splitlines()[1:]]
    blind, untrained, by_frequency, trained = losses
    assert abs(blind - untrained) < 0.5 and by_frequency < blind and trained < untrained
    assert "nanoGPT's model and step in eager PyTorch" in end and "x  turn by turn" in end
    assert ("of compute capability 8.0 or later they would run" in end) != torch.cuda.is_available()
    assert max(map(len, end.splitlines())) <= 60


def test_against_the_real_nanogpt(said):
    if not (folder := os.environ.get("NANOGPT_DIR")):
        pytest.skip("NANOGPT_DIR names no nanoGPT checkout")
    assert f"nanoGPT, {folder}/model.py" in said(folder)
