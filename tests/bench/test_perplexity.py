"""bench.perplexity: the loss of whole forwards, and what fewer bits do to it."""

import json

import pytest
import torch
import torch.nn.functional as F

from bench import perplexity
from fastgpt import checkpoint, cli
from tests.decoding.test_decoding import tiny


@pytest.fixture
def folder(tmp_path):
    """A checkpoint, and data of its vocabulary."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    data = tmp_path / "data"
    assert cli.main(["prepare", str(tmp_path / "text.txt"), "--out", str(data)]) == 0
    characters = json.loads((data / "prepared.json").read_text())["vocab_size"]
    model = tiny(vocab_size=characters)
    saved = {"model": model.state_dict(), "model_args": checkpoint.model_args(model.config)}
    checkpoint.save_checkpoint(saved, tmp_path / "ckpt.pt")
    return tmp_path


def test_losses_are_those_of_whole_forwards():
    model, windows = tiny(), torch.randint(31, (3, 12))
    with torch.no_grad():
        logits = model(windows, windows)[0][:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    found = perplexity.mean_loss(model, windows, torch.float32)
    assert found == pytest.approx(expected, rel=1e-5)


def test_every_dtype_beside_the_first(folder, capsys):
    assert perplexity.main(["--out", str(folder), "--data", str(folder / "data")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16", "float16", "int8"]
    first = rows[0]["loss"]
    assert all(row["tokens"] == 8 * 11 for row in rows)
    assert all(0 < abs(row["loss"] - first) < 0.03 * first for row in rows[1:])


def test_refusals(folder, capsys):
    for words, said in (
        (["--out", "nowhere"], "nowhere"),
        (["--data", "nowhere"], "nowhere"),
        (["--windows", "1000"], "--windows 1000 of 12 tokens are not in"),
    ):
        given = ["--out", str(folder), "--data", str(folder / "data"), *words]
        with pytest.raises(SystemExit, match="2"):
            perplexity.main(given)
        assert said in capsys.readouterr().err
