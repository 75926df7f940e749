"""The layout: dependencies point one way, and `kernels` stays Hugging Face's name."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastgpt", "kernels", "bench", "tests")
FILES = sorted(
    path.relative_to(ROOT) for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py")
)
MAX_LINES = 350  # one idea per file

# What a file may import besides the standard library. ops.py reaches kernels inside a function, so
# that importing fastgpt needs no triton; everything else reaches them through ops.
ALLOWED = {
    "fastgpt/reference.py": ["torch"],
    "fastgpt/tables.py": ["torch", "fastgpt.kernels._tuned"],
    "fastgpt/backend.py": ["torch", "fastgpt.tables"],
    "fastgpt/ops.py": ["torch", "fastgpt.backend", "fastgpt.reference", "fastgpt.fused.embedding"],
    "fastgpt/implementations/aten.py": ["torch", "fastgpt.reference", "fastgpt.kernels._autograd"],
    "fastgpt/implementations/sdpa.py": ["torch", "fastgpt.reference"],
    "fastgpt/fused/block.py": [
        "torch",
        "fastgpt.implementations.aten",
        "fastgpt.kernels._autograd",
    ],
    "fastgpt/fused/embedding.py": [
        "torch",
        "fastgpt.implementations.aten",
        "fastgpt.kernels._autograd",
    ],
    "fastgpt/fused/whole.py": ["torch"]
    + [f"fastgpt.{n}" for n in ("implementations", "backend", "fused", "ops")],
    "fastgpt/fused/untouched.py": ["torch"],
    "fastgpt/init.py": ["torch"],
    "fastgpt/devices.py": ["torch"],
    "fastgpt/sampling.py": ["torch"],
    "fastgpt/weights.py": ["torch", "transformers"],
    "fastgpt/model.py": ["torch"]
    + [f"fastgpt.{n}" for n in ("weights", "checks", "sampling", "devices", "fused", "init")]
    + ["fastgpt.ops", "fastgpt.fused.untouched"],
}
# bench is no part of the package: only its own tests import it
ALLOWED |= {
    f"tests/bench/test_{name}.py": ["pytest", "torch", "bench", "fastgpt"]
    for name in ("train", "interrupted", "nvidia_smi", "decode", "ops", "records")
}
LAZILY = {  # inside functions
    "fastgpt/ops.py": [
        "fastgpt.kernels",
        "fastgpt.implementations.aten",
        "fastgpt.implementations.flash_attn",
        "fastgpt.implementations.sdpa",
    ],
    "fastgpt/fused/whole.py": ["fastgpt.kernels"],
}
KERNELS = ["torch", "triton", "fastgpt.kernels"]
NEVER = {  # for what is not listed above
    "fastgpt": ["kernels", "bench", "tests"],
    "bench": ["kernels", "tests"],
    "tests": ["kernels", "bench"],
}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: list[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    tree = ast.parse((ROOT / path).read_text())
    names = {name for name in imported(tree) if name.split(".")[0] not in sys.stdlib_module_names}
    folder, allowed = path.parts[0], ALLOWED.get(path.as_posix())
    if folder == "kernels":
        allowed = KERNELS
    if allowed is None:
        assert not [name for name in names if within(name, NEVER[folder])]
    else:
        allowed = allowed + LAZILY.get(path.as_posix(), [])
        assert not [name for name in names if not within(name, allowed)]


def test_ops_reaches_kernels_inside_a_function_only():
    tree = ast.parse((ROOT / "fastgpt/ops.py").read_text())
    top = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    assert not [
        name
        for node in top
        for name in imported(node)
        if within(name, [*LAZILY["fastgpt/ops.py"], "triton"])
    ]


def test_the_rules_name_files_that_exist():
    assert set(ALLOWED) <= {path.as_posix() for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_no_longer_than_one_idea(path):
    lines = (ROOT / path).read_text().count("\n")
    assert lines <= MAX_LINES


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
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("fastgpt/**/*.py")}
    sources |= {f"fastgpt/kernels/{path.name}" for path in ROOT.glob("kernels/*.py")}
    assert sources <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastgpt"}


def test_fastgpt_is_found_where_these_tests_are():
    """Else the checks above look at one copy and the other tests run another."""
    spec = find_spec("fastgpt")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / "fastgpt/__init__.py"
