"""The layout: dependencies point one way, and `kernels` stays Hugging Face's name."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastgpt import backend

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastgpt", "kernels", "bench", "tests")
FILES = sorted(
    path.relative_to(ROOT) for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py")
)

# A file imports from lines above its own, and may import others of its own line where that closes
# no circle. What is in brackets is imported inside functions: importing fastgpt needs no triton.
LAYERS = """
    storage
    reference kernels._tuned kernels._autograd config devices data weights
    init
    implementations.interception implementations.compiled
    checks implementations.sdpa implementations.flash_attn implementations.aten
    implementations.native implementations.hybrid [kernels]
    linear_cross_entropy [kernels]
    backend
    ops optim
    decoding.eager decoding.graphs decoding.huge_pages decoding.draws
    decoding.step_in_c
    fused.second_stream fused.guards
    fused.launchers [kernels]
    fused.block fused.embedding
    fused.untouched
    fused.whole
    fused.eager_head
    decoding.parameters
    decoding.decoder
    decoding.pool decoding.lookup
    sampling
    model
    examples
    train_step environment checkpoint
    training
    commands
    cli
    __init__ __main__
"""
KERNELS = """
    _launch _tuned _autograd _math
    _attention
    gelu attention_forward attention_backward layer_norm cross_entropy embedding adamw
    gemm_tma attention decode_linear
    gemm_gelu decode
    mlp
"""
OTHERS = {"bench": ["bench", "fastgpt"], "tests": ["tests", "fastgpt"]}
for name in ("tests/bench", "tests/model"):  # bench is no part of the package
    OTHERS[name] = ["tests", "fastgpt", "bench"]


def ranks(layers: str) -> dict[str, int]:
    lines = [line.split(" [")[0].split() for line in layers.strip().splitlines()]
    return {name: rank for rank, names in enumerate(lines) for name in names}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(name: str, layers: dict[str, int]) -> str | None:
    """The longest prefix of a dotted name that has a layer."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in layers), None)


def climbs(path: Path, package: str, layers: dict[str, int]) -> list[str]:
    """The imports of a file that do not point down, into the same package."""
    own = ".".join(path.with_suffix("").parts[1:])
    rank = layers[place(own, layers) or own]
    tree = ast.parse((ROOT / path).read_text())
    inner = [name[len(package) + 1 :] for name in imported(tree) if name.startswith(package + ".")]
    if "[kernels]" in next((line for line in LAYERS.splitlines() if f" {own} " in line), ""):
        inner = [name for name in inner if not name.startswith("kernels.")]
    return [name for name in inner if layers[place(name, layers) or "model"] > rank]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    folder = path.parts[0]
    tree = ast.parse((ROOT / path).read_text())
    names = {name for name in imported(tree) if name.split(".")[0] in FOLDERS}
    if path.name == "__init__.py" and path.parent.name != "fastgpt":
        assert not names
    elif folder == "fastgpt":
        assert all(name.startswith("fastgpt") for name in names)
        assert climbs(path, "fastgpt", ranks(LAYERS)) == []
    elif folder == "kernels":
        assert all(name.startswith("fastgpt.kernels.") for name in names)
        assert climbs(path, "fastgpt.kernels", ranks(KERNELS)) == []
    else:
        allowed = OTHERS.get(path.parent.as_posix(), OTHERS[folder])
        assert {name.split(".")[0] for name in names} <= set(allowed)


def test_no_circle():
    """Two files that import each other, also through others, cannot be read one after the other."""
    edges: dict[str, set[str]] = {}
    for path in FILES:
        dotted = ".".join(path.with_suffix("").parts)
        dotted = dotted.replace("kernels.", "fastgpt.kernels.", path.parts[0] == "kernels")
        edges[dotted] = set(imported(ast.parse((ROOT / path).read_text())))
    edges = {
        name: {place(other, dict.fromkeys(edges, 0)) for other in others} - {None, name}
        for name, others in edges.items()
    }
    while leaves := {name for name, others in edges.items() if not others & edges.keys()}:
        edges = {name: others for name, others in edges.items() if name not in leaves}
    assert not edges


def test_importing_fastgpt_needs_no_triton():
    """Only two files of kernels/ do without it: the others are imported inside functions."""
    for path in ROOT.glob("fastgpt/**/*.py"):
        if "commands" in path.parts or "kernels" in path.relative_to(ROOT).parts:
            continue
        top = [node for node in ast.parse(path.read_text()).body if not _is_definition(node)]
        kernels = {n for node in top for n in imported(node) if n.startswith("fastgpt.kernels")}
        free = ("fastgpt.kernels._tuned", "fastgpt.kernels._autograd")
        assert all(name.startswith(free) for name in kernels), path


def _is_definition(node: ast.stmt) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.ClassDef))


def test_the_layers_name_files_that_exist():
    for layers, folder in ((LAYERS, "fastgpt"), (KERNELS, "kernels")):
        for name in ranks(layers):
            path = ROOT / folder / name.replace(".", "/")
            assert path.with_suffix(".py").exists() or path.is_dir(), name


def test_the_table_of_ops_names_what_is_there():
    for op, entry in backend.OPS.items():
        assert {entry.unmeasured, entry.on_cpu} <= {*entry.implementations, "torch"}
        for name in entry.implementations:
            assert callable(backend.implementation(op, name).unsupported)


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=str)
def test_a_folder_is_taken_in_at_a_glance(folder):
    assert sum(path.parent == folder for path in FILES) <= 20


def test_kernels_is_no_package_and_is_linked_into_fastgpt():
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "fastgpt/kernels").resolve() == ROOT / "kernels"


def test_the_link_is_committed_as_a_link():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, or no git to ask")
    command = ["git", "ls-files", "--stage", "fastgpt/kernels"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert listed.startswith("120000 ")  # git's mode of a symbolic link
    blob = ["git", "cat-file", "-p", listed.split()[1]]
    target = subprocess.run(blob, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert target == "../kernels"


def test_beside_hugging_faces_kernels_each_keeps_its_own(tmp_path):
    """Run in the checkout, where our kernels/ comes first on the path, as with `python -m`."""
    theirs = tmp_path / "kernels/__init__.py"
    theirs.parent.mkdir()
    theirs.write_text("get_kernel = 'theirs'")
    code = (
        "import kernels; print(kernels.__file__, kernels.get_kernel);"
        "from importlib.util import find_spec; print(find_spec('fastgpt.kernels._launch').origin)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found, ours = run.stdout.splitlines()
    assert found == f"{theirs} theirs"
    assert Path(ours).resolve() == ROOT / "kernels/_launch.py"


SOURCES = (".py", ".c", ".h")


@pytest.mark.parametrize("link", [True, False], ids=["with the link", "git without links"])
def test_the_wheel_holds_the_kernels_under_fastgpt_only(tmp_path, link):
    needs = [sys.executable, "-c", "import setuptools.command.bdist_wheel, pip"]
    if subprocess.run(needs, capture_output=True).returncode != 0:
        pytest.skip("building a wheel offline takes pip and setuptools >= 70.1")
    tree = tmp_path / "tree"  # a copy, because setuptools writes beside the sources
    tree.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    for folder in ("fastgpt", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True)
    if not link:  # what git leaves where it may not make links
        (tree / "fastgpt/kernels").unlink()
        (tree / "fastgpt/kernels").write_text("../kernels")

    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command = [*pip_wheel, "--no-index", "--wheel-dir", str(tmp_path), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        str(path.relative_to(ROOT)) for path in ROOT.glob("fastgpt/**/*") if path.suffix in SOURCES
    }
    sources |= {f"fastgpt/kernels/{path.name}" for path in ROOT.glob("kernels/*.py")}
    assert sources | {"fastgpt/kernels/tuned.json"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastgpt"}
    if link:
        _works_when_installed(wheel, tmp_path)


def _works_when_installed(wheel: Path, tmp_path: Path) -> None:
    """`fastgpt info`, a training step and a sample, from a folder that is no checkout."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(site), str(wheel)], check=True, capture_output=True)
    train_and_sample = (
        "import torch, fastgpt; assert 'site' in fastgpt.__file__, fastgpt.__file__;"
        "from fastgpt import GPT, GPTConfig, TrainStep;"
        "model = GPT(GPTConfig(8, 11, 1, 2, 16, return_logits=False));"
        "idx = torch.randint(11, (2, 8));"
        "step = TrainStep(model, weight_decay=0.1, lr=1e-3, betas=(0.9, 0.95));"
        "assert step([(idx, idx)]).isfinite();"
        "print(model.generate(idx[:, :3], 9).shape)"
    )
    for arguments, expected in (
        (["-m", "fastgpt", "info"], "packed_causal_attention"),
        (["-c", train_and_sample], "torch.Size([2, 12])"),
    ):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and expected in done.stdout, done.stderr


def test_fastgpt_is_found_where_these_tests_are():
    """Else the checks above look at one copy and the other tests run another."""
    spec = find_spec("fastgpt")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / "fastgpt/__init__.py"


def test_the_map_shows_the_tree():
    """docs/architecture.md names every folder with Python files and every file of fastgpt/."""
    page = (ROOT / "docs/architecture.md").read_text()
    tree = page.split("```")[1].splitlines()[1:]
    shown, top = set(), ""
    for line in tree:
        if not (name := line.split()[0]).endswith("/"):
            continue  # the line before goes on
        name = name.rstrip("/")
        top = name if not line.startswith(" ") else top
        shown.add(name if name == top else f"{top}/{name}")
    assert all((ROOT / folder).is_dir() for folder in shown)
    assert {path.parent.as_posix() for path in FILES} <= shown
    files = set(re.findall(r"^\| (.+?) \|", page, re.MULTILINE))
    named = {name for cell in files for name in re.findall(r"`(\w+\.py)`", cell)}
    assert named == {p.name for p in FILES if p.parent.name == "fastgpt" and p.name[:2] != "__"}
