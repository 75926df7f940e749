"""bench.train and bench.memory: fair rows, refused rows, and a record of both."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import memory, train
from bench.harness import machine, memory_budget, training_record, training_variant
from bench.peers import models, training
from fastgpt.implementations import native

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TOY = ["--size", "char", "--device", "cpu", "--dtype", "float32"]
TOY += ["--batch-size", "2", "--block-size", "16"]
SHORT = [*TOY, "--rounds", "2", "--steps", "2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(train, "matmul_ceiling", lambda device, dtype: 1e12)
    monkeypatch.setattr(models, "LOCAL_NANOGPT", Path("no such folder"))
    monkeypatch.setattr(machine, "check", lambda **_: {"load": 0.0, "busy": 0.0, "spread": 0.0})
    monkeypatch.delenv("NANOGPT_DIR", raising=False)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """What looks like nanoGPT's: a model.py with GPT and GPTConfig."""
    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    (folder / "model.py").write_text("from fastgpt.model import GPT, GPTConfig\n")
    monkeypatch.setenv("NANOGPT_DIR", str(folder))
    return folder


def bench(out: Path, variants: str, *args: str) -> dict:
    """The record of one run."""
    out = out / "out"
    assert train.main([*SHORT, "--variants", *variants.split(), *args, "--out", str(out)]) == 0
    (path,) = out.glob("*/train-*.json")
    return json.loads(path.read_text())


def test_record_and_table(tmp_path, capsys):
    record = bench(tmp_path, "eager fastgpt fastgpt-nologits")
    assert record["schema"] == 1 and record["bench"] == "train" and record["environment"]["torch"]
    assert record["settings"] == {
        "size": "char", "B": 2, "T": 16, "dtype": "float32", "rounds": 2, "steps": 2,
        "order": training_record.IN_TURNS,
    }  # fmt: skip
    eager, *ours = record["rows"]
    in_c = native.unsupported(torch.empty(1), 0.0) is None
    assert eager["variant"] == "eager" and eager["over_eager"] == 1.0 and eager["loss_gap"] == 0.0
    table = capsys.readouterr().out
    for row in ours:
        assert len(row["seconds"]) == 2 and row["first_step_seconds"] > 0
        assert row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"]
        median = sum(row["seconds"]) / 2
        assert row["tokens_per_second"] == pytest.approx(2 * 16 / median)
        assert row["of_matmul_ceiling"] == pytest.approx(_flops(2, 16) / median / 1e12)
        assert row["mfu"] is None and row["peak_bytes"] is None  # of a CPU neither is known
        assert row["attention"] == ("fastgpt C" if in_c else "SDPA flash")
        assert row["final_loss"] == pytest.approx(eager["final_loss"], abs=1e-3)
        assert f"{row['tokens_per_second']:,.0f}" in table
    assert "record: " in table.splitlines()[-1]


def _flops(B: int, T: int) -> float:
    """The char model's, per step: 6 per weight and token, and attention's 12 L C T."""
    weights = 4 * (12 * 128 * 128 + 2 * 128) + 65 * 128 + 128
    return (6 * weights + 12 * 4 * 128 * T) * B * T


def test_as_a_command():
    command = [sys.executable, "-m", "bench.train", *SHORT, "--variants", "eager", "magic"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "magic" in done.stderr and "fastgpt-nologits" in done.stderr  # and what exists


def test_a_record_per_batch_size(tmp_path, capsys):
    command = [*SHORT, "--variants", "eager", "fastgpt", "--batch-size", "1", "2"]
    assert train.main([*command, "--out", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("record: ")]
    records = [json.loads(Path(line.removeprefix("record: ")).read_text()) for line in lines]
    assert [record["settings"]["B"] for record in records] == [1, 2]
    assert all("tokens_per_second" in row for record in records for row in record["rows"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(tmp_path, dtype):
    small = ("--dtype", dtype, "--batch-size", "1", "--block-size", "8")
    rows = bench(tmp_path, "eager fastgpt", *small)["rows"]
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_nanogpt_from_a_checkout(tmp_path, checkout):
    path = list(sys.path)
    record = bench(tmp_path, "eager nanogpt")
    # a rounding apart where PyTorch's ops on both sides add in another order
    eager, theirs = (row["final_loss"] for row in record["rows"])
    assert theirs == pytest.approx(eager, rel=1e-6)
    assert record["peers"]["nanogpt"].startswith("model.py sha256 ")
    assert sys.path == path and "model" not in sys.modules


def test_hugging_face_has_the_same_loss(tmp_path):
    pytest.importorskip("transformers")
    eager, theirs = bench(tmp_path, "eager hf")["rows"]
    assert theirs["final_loss"] == pytest.approx(eager["final_loss"], abs=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_liger_is_assembled_to_the_same_loss(monkeypatch, checkout, fused):
    """With PyTorch in place of its kernels, which need a GPU."""
    _stand_in_for_liger(monkeypatch)
    config = models.config_of("char", 16)
    run = training.Run(config, models.initial_weights(config, CPU), CPU, "float32")
    (batch,) = training.batches(config, 2, 1, CPU)
    assembled = models.Liger(config, run.weights, CPU, fused)
    step = training._step(run, assembled, training.plain_adamw)
    eager = training.VARIANTS["eager"](run)
    for _ in range(3):
        torch.testing.assert_close(step(*batch), eager(*batch))


def _stand_in_for_liger(monkeypatch) -> None:
    from types import ModuleType

    import torch.nn.functional as F

    class LigerLayerNorm(torch.nn.LayerNorm):
        pass

    def fused(rows, weight, targets):
        return F.cross_entropy(F.linear(rows, weight), targets)

    modules = {name: ModuleType(name) for name in (
        "liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional",
        "liger_kernel.transformers.layer_norm",
    )}  # fmt: skip
    transformers = modules["liger_kernel.transformers"]
    transformers.functional = modules["liger_kernel.transformers.functional"]
    transformers.functional.liger_cross_entropy = F.cross_entropy
    transformers.functional.liger_fused_linear_cross_entropy = fused
    modules["liger_kernel.transformers.layer_norm"].LigerLayerNorm = LigerLayerNorm
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def half_the_gradient(run):
    right = training.VARIANTS["eager"](run)
    return lambda x, y: right(x[:1], y[:1])


def not_a_number(run):
    """From its fourth step on."""
    right, count = training.VARIANTS["eager"](run), itertools.count()
    return lambda x, y: right(x, y) * (math.nan if next(count) > 3 else 1)


@pytest.mark.parametrize(
    "wrong, why",
    [(half_the_gradient, "from those of eager"), (not_a_number, "are not finite")],
)
def test_a_wrong_loss_flags_the_time(tmp_path, monkeypatch, capsys, wrong, why):
    monkeypatch.setitem(training.VARIANTS, "hf", wrong)
    eager, flagged, ours = bench(tmp_path, "eager hf fastgpt")["rows"]
    assert why in flagged["flag"] and len(flagged["seconds"]) == 2
    assert flagged["over_eager"] > 0 and "flag" not in eager and "flag" not in ours
    said = " ".join(capsys.readouterr().out.split())  # its lines are of 60 columns
    assert f"(!) hf: {flagged['flag']}" in said


@pytest.mark.slow
def test_absent_peers_say_so_and_the_rest_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    eager, nanogpt, liger, hf, ours = bench(tmp_path, "eager nanogpt liger hf fastgpt")["rows"]
    assert nanogpt["problem"].startswith("no nanoGPT: set NANOGPT_DIR to a checkout of it")
    assert liger["problem"] == "Liger's kernels need a GPU"
    assert "pip install transformers" in hf["problem"]
    assert "seconds" in eager and "seconds" in ours


def test_too_large_says_what_is_missing(tmp_path):
    rows = bench(tmp_path, "eager fastgpt", "--batch-size", "1000000000")["rows"]
    assert all(row["problem"].startswith("does not fit: about ") for row in rows)
    assert all(row["problem"].endswith(" GiB are missing") for row in rows)


def test_out_of_device_memory_says_what_is_missing():
    text = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB "
        "of which 512.00 MiB is free. Including non-PyTorch memory, this process has 139.3 GiB"
    )
    said = training_variant.describe(torch.OutOfMemoryError(text))
    assert said == "does not fit: at least 19.5 GiB of device memory were missing"


def test_the_estimate_of_parameters():
    config = models.config_of("124M")
    with models.quietly(), torch.device("meta"):
        model = models.GPT(config)
    assert memory_budget.parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_two_passes_where_the_variants_do_not_fit_together(tmp_path, monkeypatch):
    in_turns = bench(tmp_path / "a", "eager fastgpt")
    monkeypatch.setattr(memory_budget, "all_at_once", lambda *_: False)
    order: list[str] = []
    build = training_variant.Variant.build
    monkeypatch.setattr(
        training_variant.Variant, "build", lambda t: (order.append(t.name), build(t))
    )
    record = bench(tmp_path / "b", "eager fastgpt")
    assert order == ["eager", "fastgpt", "fastgpt", "eager"]
    assert record["settings"]["order"] == training_record.ALONE
    for alone, row in zip(record["rows"], in_turns["rows"], strict=True):
        assert len(alone["seconds"]) == 2
        assert alone["final_loss"] != row["final_loss"]  # one round less in each pass
        assert alone["loss_gap"] < 1e-3


@pytest.mark.slow
def test_without_memory_for_all_it_starts_again_one_at_a_time(tmp_path, monkeypatch):
    """The estimate was too low, and one that fits alone ran out of memory among the others."""
    build, alive = training_variant.Variant.build, []

    def crowded(self):
        alive.append(self)
        if len([t for t in alive if t._step is not None]) >= 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        build(self)

    monkeypatch.setattr(training_variant.Variant, "build", crowded)
    record = bench(tmp_path, "eager fastgpt")
    assert record["settings"]["order"] == training_record.ALONE
    assert all("seconds" in row for row in record["rows"])


@pytest.mark.parametrize(
    "names, attention",
    [
        ({"aten::_scaled_dot_product_flash_attention_for_cpu"}, "SDPA flash"),
        ({"cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16"}, "SDPA cudnn"),
        ({"void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>"}, "SDPA flash"),
        ({"void flash::flash_fwd_kernel<Flash_fwd_kernel_traits>"}, "flash-attn"),
        ({"fmha_cutlassF_bf16_aligned_64x64_rf_sm80"}, "SDPA efficient"),
        ({"aten::_scaled_dot_product_attention_math", "aten::mm"}, "SDPA math"),
        ({"_dkdv_kernel", "_forward_kernel", "aten::mm"}, "fastgpt kernel"),
        ({"aten::mm"}, "not seen"),
    ],
)
def test_which_attention_ran(names, attention):
    assert training_variant.attention_in(names) == attention


@pytest.mark.parametrize(
    "args, words",
    [
        ("--variants fastgpt", "ratios need eager first"),
        ("--size 125M", "124M"),
        ("--block-size 129", "T=129 is not in 1 to 128, the block size of char"),
        ("--batch-size 0", "--batch-size 0 must be at least 1"),
        ("--dtype tf32", "tf32 is for CUDA; on cpu use"),
        ("--rounds 0", "--rounds 0 and"),
        ("--device nothing", "nothing"),
    ],
)
def test_bad_input_names_the_value_and_what_exists(capsys, args, words):
    with pytest.raises(SystemExit, match="2"):
        train.main([*SHORT, *args.split()])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "x = 1\n", "import no_such_module\n"])
def test_a_folder_that_is_no_checkout(tmp_path, monkeypatch, capsys, content):
    if content is not None:
        (tmp_path / "model.py").write_text(content)
    monkeypatch.setenv("NANOGPT_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        train.main([*SHORT, "--variants", "eager", "nanogpt"])
    assert f"NANOGPT_DIR={tmp_path} is not a checkout of nanoGPT" in capsys.readouterr().err


@pytest.mark.slow
def test_peak_memory_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    variants = ("--variants", "eager", "nanogpt", "fastgpt-nologits")
    assert memory.main([*TOY, *variants, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/memory-*.json")
    eager, nanogpt, ours = json.loads(path.read_text())["rows"]
    held = 12 * memory_budget.parameters(models.config_of("char", 16))
    assert eager["peak_bytes"] > held and ours["peak_bytes"] > held
    assert eager["over_eager"] == 1.0
    carried = (Path(models.__file__).parents[2] / ".local/nanoGPT").is_dir()  # the processes see it
    assert nanogpt["peak_bytes"] > held if carried else "NANOGPT_DIR" in nanogpt["problem"]


def test_a_busy_machine_is_warned_about():
    assert machine.warning({"load": 3.0, "busy": 0.01, "spread": 0.02}) == ""
    assert machine.warning({"load": 0.0, "busy": None, "spread": 0.02}) == ""
    assert "others use 50% of its cores" in machine.warning({"busy": 0.5, "spread": 0.02})
    assert "times 30% apart" in machine.warning({"busy": 0.01, "spread": 0.3})
