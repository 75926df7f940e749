"""bench.gpu --install: everything in its place, or nothing."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench.gpu import install, store
from bench.harness import record
from fastgpt.kernels import _tuned

ROOT = Path(__file__).parents[2]


def train(device: str = "NVIDIA H200", **changes: object) -> dict:
    row = {
        "variant": "fastgpt", "seconds": [0.02, 0.021], "tokens_per_second": 8e5, "over_eager": 2.0,
        "ms": {"p10": 20, "median": 20.5, "p90": 21}, "mfu": 0.5, "of_matmul_ceiling": 0.6,
        "peak_bytes": 10**10, "first_step_seconds": 2.0, "final_loss": 10.9, "attention": "cuDNN",
    }  # fmt: skip
    settings = {"size": "124M", "B": 16, "T": 1024, "dtype": "bfloat16", "rounds": 4, "steps": 10}
    rows = [row | {"variant": "eager", "over_eager": 1.0}, row]
    quiet = {"load": 0.0, "busy": 0.0, "spread": 0.0}
    found = {
        "schema": record.SCHEMA, "bench": "train", "date": "2026-12-01T10:00:00+00:00",
        "environment": {"device": device, "torch": "2.11.0"}, "commit": "a" * 40,
        "settings": settings, "matmul_ceiling": 7e14, "machine": quiet, "rows": rows,
    }  # fmt: skip
    return found | changes


def ops(op: str, variants: tuple[str, ...] = ("eager", "fastgpt")) -> dict:
    row = {
        "op": op, "shape": "s", "direction": "forward", "seconds": [1e-4], "microseconds": 100.0,
        "over_eager": 1.0, "flops": 0.0, "bytes": 1e8, "gigabytes_per_second": 1e3,
        "teraflops_per_second": 0.0, "of_ceiling": 0.3, "rounds": 1,
    }  # fmt: skip
    settings = {"M": 16384, "C": 768, "V": 50304, "dtype": "bfloat16", "only": [op]}
    rows = [row | {"variant": variant} for variant in variants]
    ceilings = {"flops": 7e14, "bandwidth": 4e12, "source": "measured"}
    return train(bench="ops", settings=settings, rows=rows, ceilings=ceilings)


def decode(batch: int) -> dict:
    row = {
        "variant": "fastgpt", "seconds": [2e-4, 2.1e-4], "tokens_per_second": 5e3 * batch,
        "of_floor": 0.3, "over_eager": 20.0, "first_token_seconds": [0.01, 0.01],
    }  # fmt: skip
    settings = {"size": "124M", "prompt": 224, "new_tokens": 128, "dtype": "bfloat16", "rounds": 4}
    settings |= {"batch": batch} if batch > 1 else {}
    rows = [row | {"variant": "eager", "over_eager": 1.0}, row]
    floor = {"read_ceiling": 4e12, "floor_seconds": 6e-5}
    return train(bench="decode", settings=settings, rows=rows, **floor)


TUNED = {
    "date": "2026-12-01",
    "implementations": {"mlp": "triton", "causal_attention": "cudnn"},
    "configs": {
        "layer_norm_forward 768": {"BLOCK_M": 4, "num_warps": 4},
        "attention_backward 64 bfloat16": [{"BLOCK_M": 64}, {"BLOCK_M": 128}],
    },
}
BAD = {"test": "tests/gpu/test_ops.py::test_real_sizes[layer_norm]", "outcome": "failed"}
BAD["ops"] = "layer_norm"


def brought_back(folder: Path, *records: object, tuned: object = TUNED, **state: object) -> Path:
    """What GPU sessions leave in a folder."""
    folder.mkdir()
    entries = {
        "suite": {"tries": 1, "ended": "done", "results": {"tests": {"counts": {}, "bad": [BAD]}}},
        "tune": {"tries": 1, "ended": "done", "device": "NVIDIA H200"},
    }
    store.write(folder / store.STATE, store.dumps(store.new(False) | {"stages": entries} | state))
    if tuned is not None:
        text = tuned if isinstance(tuned, str) else json.dumps(tuned)
        (folder / store.TUNED).write_text(text)
    with tarfile.open(folder / store.TAR, "w:gz") as tar:
        for i, found in enumerate(records):
            content = (found if isinstance(found, str) else json.dumps(found)).encode()
            member = tarfile.TarInfo(f"train-b16/records/gpu/{i}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what the kit touches and needs."""
    root = tmp_path_factory.mktemp("tree")
    for folder in ("bench", "docs", "fastgpt", "kernels"):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True,
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    shutil.copy(ROOT / "README.md", root)
    shutil.rmtree(root / "bench/results/nvidia-h200", ignore_errors=True)  # what was measured
    return root


def contents(root: Path) -> dict[Path, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path: path.read_bytes() for path in files}


def as_command(root: Path, folder: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "bench.gpu", "--install", str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


WRONG = {
    "no record": ([], {}, "holds no record"),
    "garbage": (["{"], {}, "0.json is not JSON"),
    "no object": (["[1]"], {}, "0.json is not a record"),
    "another schema": ([train(schema=9)], {}, "0.json is not a record"),
    "a CPU's": ([train("CPU (AMD EPYC)")], {}, "'CPU (AMD EPYC)', which is no GPU"),
    "no device": ([train(environment={})], {}, "None, which is no GPU"),
    "toy": ([train(settings={"size": "char", "B": 2, "T": 16})], {}, "are not a session's"),
    "a row of nothing": ([train(rows=[5])], {}, "names no variant"),
    "NaN": ([train(rows=[{"variant": "x", "seconds": [float("nan")]}])], {}, "not all above 0"),
    "no sense": ([train(rows=[{"variant": "x", "seconds": [1.0]}])], {}, "docs could not be made"),
    "one of two": ([train(), "{"], {}, "1.json is not JSON"),
    "a rehearsal": ([train()], {"rehearsal": True}, "is of a rehearsal"),
    "tuned on a CPU": ([train()], {"stages": {}}, "which is no GPU"),
    "tuned garbage": ([train()], {"tuned": "}"}, "tuned.json is not JSON"),
    "tuned list": ([train()], {"tuned": "[]"}, "is no entry of fastgpt tune"),
    "an op": ([train()], {"tuned": TUNED | {"implementations": {"x": "torch"}}}, "'torch' for 'x'"),
    "a name": ([train()], {"tuned": TUNED | {"implementations": {"mlp": "y"}}}, "'y' for 'mlp'"),
    "a tile": ([train()], {"tuned": TUNED | {"configs": {"k": {"B": "4"}}}}, "of 'k'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_and_nothing_installed(tree, tmp_path, capsys, name):
    records, state, why = WRONG[name]
    before = contents(tree)
    code = install.main(brought_back(tmp_path / "in", *records, **state), tree)
    assert code in (1, 2) and why in (said := capsys.readouterr().err), said
    assert contents(tree) == before


@pytest.mark.parametrize("missing", [store.STATE, store.TAR])
def test_a_missing_or_torn_file_is_named(tree, tmp_path, capsys, missing):
    folder = brought_back(tmp_path / "in", train())
    whole = (folder / missing).read_bytes()
    for content in (None, whole[: len(whole) // 2], b"garbage"):
        (folder / missing).unlink(missing_ok=True)
        if content is not None:
            (folder / missing).write_bytes(content)
        before = contents(tree)
        assert install.main(folder, tree) == 2
        assert str(folder / missing) in capsys.readouterr().err
        assert contents(tree) == before


def test_a_tar_that_reaches_out_is_refused(tmp_path):
    for name in ("../x", "/x"):
        with tarfile.open(tmp_path / "t", "w:gz") as tar:
            tar.addfile(tarfile.TarInfo(name))
        with pytest.raises(ValueError, match="which no session writes"):
            list(store.members(tmp_path / "t"))


GIVEN = [train(), ops("mlp"), decode(1), decode(8), train(bench="curves")]
COMMITTED = sorted((ROOT / "bench/results").glob("nvidia-*/*.json"))


def test_records_of_every_bench_are_taken():
    for found in GIVEN:
        assert install.checked(json.dumps(found).encode(), "x") == found
    assert {found["bench"] for found in GIVEN} == set(install.BENCHES)
    for path in COMMITTED:
        assert install.checked(path.read_bytes(), path.name)


@pytest.mark.slow
def test_records_tables_and_docs_are_put_in_their_places(tree, tmp_path):
    short = train(date="2026-12-01T11:00:00+00:00")
    short["rows"] = short["rows"][:1] + [{"variant": "fastgpt", "problem": "cut off"}]
    records = [train(), short, ops("layer_norm"), ops("mlp"), ops("mlp", ("eager", "own GEMM"))]
    records += [decode(1), decode(64)]
    code, said = as_command(tree, brought_back(tmp_path / "in", *records))
    assert code == 0, said
    trained, of_ops = (
        json.loads(next((tree / "bench/results/nvidia-h200").glob(f"{bench}-*")).read_text())
        for bench in ("train", "ops")
    )
    assert trained["date"] == train()["date"]  # that with more times
    assert trained["rows"][1]["flag"].endswith("test_real_sizes[layer_norm]")
    found = [(row["op"], row["variant"], "flag" in row) for row in of_ops["rows"]]
    assert found == [
        ("layer_norm", "eager", False), ("layer_norm", "fastgpt", True), ("mlp", "eager", False),
        ("mlp", "fastgpt", False), ("mlp", "own GEMM", False),
    ]  # fmt: skip
    assert "only" not in of_ops["settings"]
    assert len(list((tree / "bench/results/nvidia-h200").glob("decode-*"))) == 2
    joined = _tuned.joined(_tuned.SHIPPED.get("NVIDIA H200", {}), TUNED)
    assert json.loads((tree / "kernels/tuned.json").read_text())["NVIDIA H200"] == joined
    code = "from fastgpt.kernels import _tuned; print(_tuned.entry('NVIDIA H200')['date'])"
    read = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert read.stdout == "2026-12-01\n", read.stderr
    readme = (tree / "README.md").read_text()
    assert "| NVIDIA H200 | 2026-12-01 |" in readme
    text = (tree / "docs/performance.md").read_text()
    assert "## NVIDIA H200" in text and "the GPU suite failed" in text
    before = contents(tree)
    assert install.main(tmp_path / "in", tree) == 0 and contents(tree) == before  # once more
