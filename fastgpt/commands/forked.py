"""Whether the model.py beside a script is nanoGPT's: only then may another model stand in for it.

Classes are compared as Python parses them, so that comments, docstrings and layout do not count. A
fork that changes anything else keeps its own.
"""

import ast
import hashlib
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

# of nanoGPT's model.py since June 2023; of GPT also as of May 2023, which computes the same
_NANOGPT = {
    "LayerNorm": {"8536f8f005efcfc0"},
    "CausalSelfAttention": {"9ad8813d79fe0d35"},
    "MLP": {"e1a56ece4517ee66"},
    "Block": {"7aada3dc65ab6edd"},
    "GPTConfig": {"db7df7aea346a6a0"},
    "GPT": {"3fb509adb9c962e9", "cef81ee1f2565cae"},
}


def differences(folder: Path) -> tuple[Path, list[str]] | None:
    """The model.py that a script in `folder` would import, and what it has otherwise than
    nanoGPT's; None if that is nothing, or if there is no such file with a GPT in it.
    """
    spec = PathFinder.find_spec("model", [str(folder)])
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    path = Path(spec.origin)
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    found = {getattr(line, "name", "its own lines"): _digest(line) for line in _lines(tree)}
    if not _has_a_model(tree):
        return None
    differing = [name for name, known in _NANOGPT.items() if found.get(name) not in known]
    differing += [name for name in found if name not in _NANOGPT]
    return (path, differing) if differing else None


def _has_a_model(tree: ast.Module) -> bool:
    """Whether it defines a GPT that can be called, and no stand-in."""
    models = (c for c in tree.body if isinstance(c, ast.ClassDef) and c.name == "GPT" and c.bases)
    return any(getattr(part, "name", "") == "forward" for model in models for part in model.body)


def _lines(tree: ast.Module) -> list[ast.stmt]:
    return [line for line in tree.body if not _is_nothing(line, ast.Import, ast.ImportFrom)]


def _is_nothing(line: Any, *others: type) -> bool:
    """Whether a line is a text that nobody reads, or one of `others`."""
    text = isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
    return text or isinstance(line, others)


def _digest(node: ast.AST) -> str:
    return hashlib.sha256(repr(_shape(node)).encode()).hexdigest()[:16]


def _shape(part: Any) -> Any:
    """The same for every version of Python: some have fields that others lack, then empty."""
    if isinstance(part, list):
        return [_shape(one) for one in part if not _is_nothing(one)]
    if not isinstance(part, ast.AST):
        return part
    fields = ((name, _shape(value)) for name, value in ast.iter_fields(part) if name != "kind")
    return type(part).__name__, [(name, value) for name, value in fields if value not in (None, [])]
