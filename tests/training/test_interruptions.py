"""Signals, full disks, second runs: what was trained is kept, and a message says what to do."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from fastgpt import cli
from fastgpt.storage import files
from fastgpt.training.config import TrainConfig
from fastgpt.training.loop import train
from fastgpt.training.trainer import Trainer
from tests.marks import slow
from tests.training.runs import finished, losses, prepared, start, wait_for

ENDLESS = ("--steps", 10**6, "--eval-every", 10**6)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGTERM, 143),
        slow(signal.SIGINT, 130),
        slow(signal.SIGHUP, 129),
    ],
)
def test_a_signal_saves_at_once(data, tmp_path, number, code):
    process = start("--data", data, "--out", tmp_path, *ENDLESS)
    wait_for(process, "step 1 ")
    time.sleep(0.3)
    before = time.time()
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code and "--resume` goes on from there" in said
    assert (tmp_path / "ckpt.pt").stat().st_mtime - before < 2
    step = torch.load(tmp_path / "ckpt.pt", weights_only=True)["iter_num"]
    assert max(number for number, _ in losses(tmp_path)) == step


def test_a_closed_pipe_costs_nothing(data, tmp_path):
    process = start("--data", data, "--out", tmp_path, "--steps", 500, "--eval-every", 100)
    wait_for(process, "step 1 ")
    assert process.stdout is not None
    process.stdout.close()  # as `| head` does; the next line is a validation's
    assert process.wait(timeout=60) == 0
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["iter_num"] == 500
    assert [step for step, name in losses(tmp_path) if name == "loss"] == list(range(1, 501))


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt", "log.jsonl"])
def test_a_folder_in_the_way_is_found_before_training(data, tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    assert cli.main(["train", "--data", str(data), "--out", str(tmp_path), "--force"]) == 2
    said = capsys.readouterr()
    assert f"{tmp_path / name} is a folder, in the way" in said.err and "step" not in said.out


def test_two_in_a_validation_lose_nothing(data, tmp_path, monkeypatch):
    config = TrainConfig(
        data=str(data), out=str(tmp_path), device="cpu", n_layer=1, n_head=1, n_embd=8,
        block_size=8, batch_size=2, steps=10, eval_every=4,
    )  # fmt: skip
    mean_loss = Trainer._mean_loss

    def interrupted(trainer, *args):
        if trainer.steps_done == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return mean_loss(trainer, *args)

    monkeypatch.setattr(Trainer, "_mean_loss", interrupted)
    assert train(config).interrupted == signal.SIGINT
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["iter_num"] == 4


@pytest.mark.slow
def test_a_second_run_is_refused_in_words(data, tmp_path, capsys):
    process = start("--data", data, "--out", tmp_path, *ENDLESS)
    wait_for(process, "step 1 ")
    for more in ([], ["--force"]):
        assert cli.main(["train", "--data", str(data), "--out", str(tmp_path), *more]) == 2
        err = capsys.readouterr().err
        assert f"{tmp_path} is in use: process {process.pid} on " in err
    process.kill()
    process.communicate()
    finished(start("--data", data, "--out", tmp_path, "--steps", 2))  # the lock died with it


def test_a_finished_run_is_not_written_over(data, tmp_path, capsys):
    finished(start("--data", data, "--out", tmp_path, "--steps", 2))
    before = (tmp_path / "ckpt.pt").read_bytes()
    assert cli.main(["train", "--data", str(data), "--out", str(tmp_path)]) == 2
    assert "--resume goes on with that run, --force writes over it" in capsys.readouterr().err
    assert (tmp_path / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("what", ["a file", "under a file", "full"])
def test_an_unusable_out_is_found_before_training(data, tmp_path, capsys, monkeypatch, what):
    out, message = tmp_path / "out", "cannot write"
    if what == "full":
        monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
        message = "No space left on device ("
    else:
        out.write_text("here first")
    if what == "a file":
        message = "is a file; name a folder"
    out = out / "x" if what == "under a file" else out
    assert cli.main(["train", "--data", str(data), "--out", str(out), "--n-embd", "12"]) == 2
    said = capsys.readouterr()
    assert message in said.err and str(out) in said.err and "step" not in said.out


@pytest.mark.slow
def test_data_shortened_meanwhile_is_an_error(tmp_path):
    data = prepared(tmp_path / "data")
    process = start("--data", data, "--out", tmp_path / "out", *ENDLESS)
    wait_for(process, "step 1 ")
    os.truncate(data / "train.bin", 10)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"fastgpt: {data}/train.bin has become shorter than" in said
    assert (tmp_path / "out/ckpt.pt").exists()


class TestFiles:
    def test_an_error_leaves_what_was_there(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("before")
        with pytest.raises(OSError, match="cannot write"), files.replacing(path) as file:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]

    def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(self, tmp_path):
        path = tmp_path / "file"
        if (child := os.fork()) == 0:
            with files.replacing(path) as file:
                file.write(b"half")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        assert len(os.listdir(tmp_path)) == 1
        with files.replacing(path) as file:
            files.sweep(tmp_path)
            assert len(os.listdir(tmp_path)) == 1  # its own
            file.write(b"whole")
        assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"whole"

    def test_a_link_in_the_way_is_not_followed(self, tmp_path):
        (tmp_path / "target").write_text("theirs")
        (tmp_path / "file").symlink_to(tmp_path / "target")
        files.write_bytes(tmp_path / "file", b"ours")
        assert (tmp_path / "target").read_text() == "theirs"
        assert (tmp_path / "file").read_bytes() == b"ours"

    def test_a_limit_names_the_file_and_the_room(self, tmp_path):
        if (child := os.fork()) == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            try:
                files.write_bytes(tmp_path / "file", b"x" * 5000)
            except OSError as error:
                os._exit(0 if "5.0 kB needed" in str(error) and "/file" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not os.listdir(tmp_path)

    def test_a_folder_takes_its_place_as_a_whole(self, tmp_path):
        place = tmp_path / "place"
        for text in ("first", "second"):
            with files.replacing_folder(place) as made:
                (made / text).write_text(text)
            assert os.listdir(place) == [text] and os.listdir(tmp_path) == ["place"]
        with pytest.raises(KeyError), files.replacing_folder(place) as made:
            raise KeyError
        assert os.listdir(place) == ["second"] and os.listdir(tmp_path) == ["place"]
