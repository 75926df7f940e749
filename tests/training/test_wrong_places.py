"""What is in the way, of another kind, or beyond what can be counted: a line with its name."""

import io
import json
import os
import pickle
import sys

import pytest
import torch

from fastgpt import checkpoint, cli
from fastgpt.commands.prepare import prepare
from fastgpt.storage import manifest
from fastgpt.storage.lock import Lock
from fastgpt.training.watch import connect
from fastgpt.training.world import World
from tests.training.runs import SMALL, prepared
from tests.training.test_bad_input import refused


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path, capsys):
    data = prepared(tmp_path / "data")
    argv = ("train", "--data", data, "--out", tmp_path / "out")
    for name in (manifest.NAME, "meta.pkl"):  # the second where nothing is said about it
        fifo(data / name)
        assert f"{data / name} is no" in refused(capsys, *argv)
        (data / manifest.NAME).unlink(missing_ok=True)
    (data / manifest.NAME).symlink_to("nowhere")
    assert f"{data / manifest.NAME} is no" in refused(capsys, *argv)
    fifo(tmp_path / "ckpt.pt")
    assert "ckpt.pt is no regular file" in refused(capsys, "sample", "--out", tmp_path)
    fifo(tmp_path / ".lock")
    with pytest.raises(OSError, match=r"cannot write .*\.lock"):
        Lock(tmp_path, "testing")


def test_a_vocabulary_that_contradicts_itself(tmp_path, capsys):
    data = prepared(tmp_path / "data")
    (data / manifest.NAME).unlink()
    meta = pickle.loads((data / "meta.pkl").read_bytes())
    (data / "meta.pkl").write_bytes(pickle.dumps({**meta, "stoi": dict.fromkeys(meta["stoi"], 0)}))
    assert "contradict" in refused(capsys, "train", "--data", data, "--out", tmp_path / "o")


@pytest.mark.parametrize(
    "name", ["warmup", "keep", "grad-accum", "batch-size", "block-size", "n-embd", "n-layer"]
)
def test_numbers_beyond_counting(tmp_path, capsys, name):
    data = prepared(tmp_path / "data")
    argv = ("train", "--data", data, "--out", tmp_path / "out", "--device", "cpu")
    assert "a number of 401 digits" in refused(capsys, *argv, f"--{name}", 10**400)


def test_settings_are_refused_with_where_they_are_from(tmp_path, capsys):
    data, path = prepared(tmp_path / "data"), tmp_path / "config.py"
    for line, message in {
        "learning_rate = 1e999": "lr=inf",
        r"out_dir = 'a\x00b'": r"out='a\x00b' holds a byte of 0",
        "out_dir = ''": "out='' is empty",
        "dataset = ''": "dataset='' must be a text",
        "decay_lr = 'no'": "decay_lr='no' must be True or False",
        "batch_size = 10**400": "line 1",
        "n_layer = 'a'": "n_layer='a' must be of type int",
        "\x00": "no config file",
    }.items():
        path.write_text(line + "\n")
        err = refused(capsys, "train", path, "--data", data)
        assert f"{path}: " in err and message in err, line
    assert "/dev/zero: no regular file" in refused(capsys, "train", "/dev/zero")
    argv = ["train", "--data", str(data), "--out", str(tmp_path / "out"), *SMALL.split()]
    assert cli.main([*argv, "--steps", "1"]) == 0
    saved = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    saved["config"]["eval_every"] = 0
    checkpoint.save_checkpoint(saved, tmp_path / "out/ckpt.pt")
    err = refused(capsys, "train", "--out", tmp_path / "out", "--resume")
    assert f"{tmp_path}/out: eval_every=0" in err


def test_an_environment_that_no_launcher_makes(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="RANK=3 in the environment must be below WORLD_SIZE=2"):
        World("cpu")
    for port in ("abc", "70000"):
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(ValueError, match=f"MASTER_PORT='{port}'"):
            connect()


def test_prepare_and_convert_refuse_their_places(tmp_path, capsys):
    assert "--out has an empty value" in refused(capsys, "prepare", "--out", "")
    refused(capsys, "prepare", "--out", tmp_path / "x", "--processes", 10**9)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/model.safetensors").write_bytes(b"weights")
    argv = ("convert", tmp_path / "hf", tmp_path / "hf/model.safetensors", "--force")
    assert "name another place" in refused(capsys, *argv)
    assert (tmp_path / "hf/model.safetensors").read_bytes() == b"weights"


def test_hugging_face_folders_end_in_one_line_without_advice(tmp_path, capfd):
    pytest.importorskip("transformers", reason="Hugging Face's folders need transformers")
    data, hf = prepared(tmp_path / "data"), tmp_path / "hf"
    argv = ["train", "--data", str(data), "--out", str(tmp_path / "out"), *SMALL.split()]
    assert cli.main([*argv, "--steps", "1"]) == 0
    assert cli.main(["convert", f"{tmp_path}/out/ckpt.pt", str(hf)]) == 0
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "n_layer": 1}))
    assert str(hf) in refused(capfd, "convert", hf, tmp_path / "x.pt")  # a block is left over
    (hf / "config.json").write_text(json.dumps(config))
    for text in ("junk", '{"model": {"type": "BPE", "vocab": {"ab": 0, "c": 1}, "merges": []}}'):
        (hf / "tokenizer.json").write_text(text)
        for argv in (["sample", "--pretrained", hf], ["convert", hf, tmp_path / "x.pt"]):
            assert f"{hf}/tokenizer.json is no tokenizer" in refused(capfd, *argv)
    (hf / "model.safetensors").unlink()
    torch.save({"a": os.system, "b": torch.zeros(99999)}, hf / "pytorch_model.bin")
    assert "weights_only" not in refused(capfd, "convert", hf, tmp_path / "x.pt")


def test_names_and_texts_that_a_terminal_cannot_show(tmp_path, monkeypatch):
    prepare("äöü漢字\n" * 100, tmp_path / "da\x1b[31mta")
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, "ascii"))
    out = os.fsdecode(os.fsencode(tmp_path) + b"/out\xff")
    argv = ["train", "--data", f"{tmp_path}/da\x1b[31mta", "--out", out, *SMALL.split()]
    assert cli.main([*argv, "--steps", "1", "--sample-tokens", "9"]) == 0
    sys.stdout.flush()
    assert b"\x1b" not in terminal.getvalue() and b"da\\x1b[31mta" in terminal.getvalue()
