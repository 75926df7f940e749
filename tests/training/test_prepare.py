"""`fastgpt prepare` on many files: streamed in pieces, with the ids of the whole."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import cli, data
from fastgpt.commands.prepare import prepare_documents
from fastgpt.storage import manifest, texts
from tests.training.runs import ROOT

WORDS = "It's a naïve “test”:  42 items,\n\n\tand 漢字かな交じり文 — 👩‍💻 end.\n"


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(texts, "PIECE", 50)


def ids_of(folder: Path) -> list[int]:
    _, splits, _ = data.open_data(folder)
    return torch.cat([s.read(0, len(s)) for s in splits.values()]).tolist()


@pytest.mark.parametrize("length", [1, 49, 50, 51, 1000])
def test_pieces_are_cut_between_words(small_pieces, length):
    text = (WORDS * 20)[:length]
    (pieces,) = texts.of_string(text)()
    cut = list(texts.cut_between_words(pieces))
    assert "".join(cut) == text
    for before, after in itertools.pairwise(cut):
        assert not before[-1].isspace() and after[0] in " \n" and not after[1].isspace()


@pytest.mark.parametrize("processes", [1, 2])
def test_characters_of_many_files(small_pieces, tmp_path, processes):
    for name, text in (("a.txt", WORDS * 9), ("b.txt", "\r\nsecond" * 30), ("c.txt", "3")):
        (tmp_path / name).write_bytes(text.encode())
    files = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"]
    out = tmp_path / "out"
    tokenizer = prepare_documents(texts.of_files(files), out, "char", 0.25, processes=processes)
    expected = "\n".join([WORDS * 9, "\nsecond" * 30, "3"])
    assert "".join(tokenizer.stream(ids_of(out))) == expected
    found = manifest.load(out)
    assert found is not None and found.tokens["train.bin"] == int(0.75 * len(expected))


def test_gpt2_documents_are_separated(small_pieces, tmp_path):
    try:
        encoding = data.GPT2().encoding
    except (ImportError, OSError) as error:
        pytest.skip(str(error))
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text(WORDS * 20)
    documents = texts.of_files([tmp_path / "texts"])
    prepare_documents(documents, tmp_path / "out", "gpt2", processes=2)
    text = f"{WORDS * 20}<|endoftext|>{WORDS * 20}"
    split = int(0.9 * (2 * len(WORDS * 20) + 1)) + len("<|endoftext|>") - 1
    train, val = (encoding.encode(t, allowed_special="all") for t in (text[:split], text[split:]))
    assert ids_of(tmp_path / "out") == train + val


def test_offline_names_the_remedy(tmp_path, capsys, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken", reason="GPT-2's tokenizer is tiktoken's")

    def offline(_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert cli.main(["prepare", "--out", str(tmp_path / "x"), "--tokenizer", "gpt2"]) == 2
    err = capsys.readouterr().err
    assert "TIKTOKEN_CACHE_DIR" in err and err.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read in /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    # What is freed goes back at once. By default glibc keeps some of it, another amount each time.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks = []
    for megabytes in (2, 40):
        path = tmp_path / f"{megabytes}.txt"
        path.write_text("to be, or not to be: " * (megabytes * 50_000))
        code = (
            "import sys; from fastgpt import cli; assert cli.main(sys.argv[1:]) == 0; "
            "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
        )
        argv = ["prepare", str(path), "--out", str(tmp_path / path.stem), "--processes", "1"]
        command = [sys.executable, "-c", code, *argv]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.split()[-1]))  # kB
    assert peaks[1] - peaks[0] < 10_000
