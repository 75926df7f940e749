"""nanoGPT's names for settings, its defaults, and its config files, which are read and not run."""

import ast
import operator
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastgpt.storage.printable import first_line

# nanoGPT's name -> fastgpt's, where the value is the same
SAME = {
    "out_dir": "out",
    "eval_interval": "eval_every",
    "eval_iters": "eval_iters",
    "eval_only": "eval_only",
    "log_interval": "log_every",
    "gradient_accumulation_steps": "grad_accum",
    "learning_rate": "lr",
    "max_iters": "steps",
    "warmup_iters": "warmup",
    "lr_decay_iters": "lr_decay_steps",
    "wandb_run_name": "wandb_name",
}
# and those whose value is said in another way, or that fastgpt decides for itself
OTHER: dict[str, type] = dict(
    dataset=str, init_from=str, decay_lr=bool, wandb_log=bool, always_save_checkpoint=bool,
    backend=str,
)  # fmt: skip

# train.py's own, for what a config file leaves out
DEFAULTS: dict[str, Any] = dict(
    eval_every=2000, eval_iters=200, data="data/openwebtext", grad_accum=40, batch_size=12,
    block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False, lr=6e-4,
    steps=600000, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0, warmup=2000,
    lr_decay_steps=600000, min_lr=6e-5,
)  # fmt: skip


def translated(name: str, value: Any) -> dict[str, Any]:
    """A setting of nanoGPT's as fastgpt's settings; other settings stay. ValueError for a value of
    another kind than nanoGPT's.
    """
    if name in OTHER and (not isinstance(value, OTHER[name]) or value == ""):
        kind = "True or False" if OTHER[name] is bool else "a text"
        raise ValueError(f"{name}={value!r:.60} must be {kind}")
    if name in SAME:
        return {SAME[name]: value}
    if name == "dataset":
        return {"data": str(Path("data") / value)}
    if name == "init_from" and value in ("scratch", "resume"):
        return {"resume": value == "resume"}
    if name == "decay_lr":
        return {"schedule": "cosine" if value else "constant"}
    if name == "wandb_log":
        return {"wandb": "online" if value else "disabled"}
    if name in ("always_save_checkpoint", "backend"):  # both are written; the device decides
        return {}
    return {name: value}


def read_config(path: Path, known: set[str]) -> dict[str, Any]:
    """fastgpt's settings from one of nanoGPT's config files, over train.py's defaults.

    ValueError names the line that is no assignment of a constant to a known setting.
    """
    if path.exists() and not path.is_file():
        raise ValueError("no regular file, so no config file")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no config file {path}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"no config file of Python assignments: {first_line(error)}") from None
    values: dict[str, Any] = {}
    for line in tree.body:
        if isinstance(line, (ast.Import, ast.ImportFrom)) or _is_text(line):
            continue
        targets = line.targets if isinstance(line, ast.Assign) else []
        if not targets or not all(isinstance(target, ast.Name) for target in targets):
            raise ValueError(
                f"line {line.lineno}: a config file is read, not run; only assignments of "
                "constants are understood"
            )
        assert isinstance(line, ast.Assign)
        try:
            value = _value(line.value, values)
        except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"line {line.lineno}: {error}") from None
        values |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    settings = dict(DEFAULTS)
    for name, value in values.items():
        new = translated(name, value)
        if unknown := set(new) - known:
            raise ValueError(f"sets {unknown.pop()}, which is no setting; see train --help")
        settings |= new
    return settings


def _power(base: float, exponent: float) -> float:
    """A whole number where both are, unless it would be too long for any setting."""
    short = abs(base) <= 2**32 and 0 <= exponent <= 64
    whole = isinstance(base, int) and isinstance(exponent, int)
    return base**exponent if whole and short else float(base) ** float(exponent)


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


_OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Constants, arithmetic on them, earlier names, and the str(time.time()) of nanoGPT's files."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.BinOp):
        values = _value(node.left, names), _value(node.right, names)
        if type(node.op) is ast.Pow and all(isinstance(v, (int, float)) for v in values):
            return _power(*values)
        if type(node.op) is ast.Mult and any(isinstance(v, str) for v in values):
            raise ValueError("a text times a number is no setting")
        if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](*values)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand, names))
    if isinstance(node, ast.Call) and not node.keywords:
        if ast.unparse(node) == "time.time()":
            return time.time()
        if isinstance(node.func, ast.Name) and node.func.id == "str" and len(node.args) == 1:
            return str(_value(node.args[0], names))
    raise ValueError(f"{ast.unparse(node):.60} is not understood: a config file is read, not run")
