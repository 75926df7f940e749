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


_IMPORTED = {  # the names that these classes use
    "math": "math",
    "inspect": "inspect",
    "dataclass": "dataclasses.dataclass",
    "torch": "torch",
    "nn": "torch.nn",
    "F": "torch.nn.functional",
}
_IMPORTS, _OTHERS = "its imports", "its other lines"


def differences(folder: Path) -> tuple[Path, list[str]] | None:
    """The model.py that a script in `folder` would import, and what it has otherwise than
    nanoGPT's; None if that is nothing, or if there is no such file that names a GPT.
    """
    spec = PathFinder.find_spec("model", [str(folder)])
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    path = Path(spec.origin)
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return path, ["what Python cannot parse"]
    if not any(map(_names_a_model, tree.body)):
        return None
    imports = [line for line in tree.body if isinstance(line, ast.Import | ast.ImportFrom)]
    lines = [line for line in tree.body if line not in imports and not _is_nothing(line)]
    found = {getattr(line, "name", _OTHERS): _digest(line) for line in lines}
    differing = [name for name, known in _NANOGPT.items() if found.get(name) not in known]
    differing += [name for name in found if name not in _NANOGPT]
    if _IMPORTED.items() - _origins(imports).items():
        differing.append(_IMPORTS)
    return (path, differing) if differing else None


def _names_a_model(line: ast.stmt) -> bool:
    """Whether a line gives a GPT: a class that is one of modules, an import or an assignment."""
    if isinstance(line, ast.ClassDef):
        return line.name == "GPT" and bool(line.bases)
    if isinstance(line, ast.Import | ast.ImportFrom):
        return any((name.asname or name.name) in ("GPT", "*") for name in line.names)
    names = (node.id for node in ast.walk(line) if isinstance(node, ast.Name))
    return isinstance(line, ast.Assign) and "GPT" in names


def _origins(imports: list[ast.Import | ast.ImportFrom]) -> dict[str, str]:
    """Imported name -> where it comes from."""
    found: dict[str, str] = {}
    for line in imports:
        start = f"{line.module}." if isinstance(line, ast.ImportFrom) else ""
        found |= {name.asname or name.name: start + name.name for name in line.names}
    return found


def _is_nothing(line: Any) -> bool:
    """Whether a line is a text that nobody reads."""
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


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
