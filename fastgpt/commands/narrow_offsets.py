"""Which addresses in a kernel's compiled form would wrap around beyond 2**31 elements."""

import re

_OPERATION = re.compile(r"\s*(%\w+)(?::\d+)? = ([\w.]+)(.*)")
_NAME = re.compile(r"%\w+")


def narrow_offsets(ttir: str) -> list[str]:
    """The tt.addptr operations of a kernel in Triton's IR whose offset 32 bits may not hold.

    Suspect is an offset with a 32-bit product of two values of which neither is a constant, as of a
    row and a stride, even if it is widened later; and one that is 32 bits wide itself and counts
    from the program id. What // and % make of a program id is bounded by the tensors' sizes.
    """
    origins: _Origins = {}
    suspects = []
    for line in ttir.splitlines():
        text = line.split(" loc(")[0]
        if "scf." in text or "^bb" in text:  # loop variables, whose names an earlier loop may use
            for variable in re.findall(r"[(,] ?(%\w+)(?: =|:)|for (%\w+) =", text):
                origins.pop("".join(variable), None)
        match = _OPERATION.match(text)
        if match is None:
            continue
        name, operation, rest = match.groups()
        operands = _NAME.findall(rest)
        if operation == "tt.addptr":
            offset = operands[1]
            if _multiplies(offset, origins) or _counts_programs(offset, origins):
                suspects.append(text.strip())
        if operation.startswith("scf."):  # what a loop or a branch leaves is its own
            operands = []
        origins[name] = operation, operands, bool(re.search(r"\bi32>?$|xi32>?$", rest.strip()))
    return suspects


_Origins = dict[str, tuple[str, list[str], bool]]  # name -> operation, operands, is it 32 bits


def _behind(name: str, origins: _Origins) -> tuple[str, list[str], bool]:
    """The operation that made a value; a kernel's or a loop's own argument has none."""
    operation, operands, narrow = origins.get(name, ("", [], False))
    if operation in ("tt.load", "arith.divsi", "arith.remsi"):
        operands = []  # a stored index, or bounded by a size
    return operation, operands, narrow


def _constant(name: str, origins: _Origins) -> bool:
    operation, operands, _ = _behind(name, origins)
    if operation == "arith.constant":
        return True
    return bool(operands) and all(_constant(operand, origins) for operand in operands)


def _multiplies(name: str, origins: _Origins) -> bool:
    operation, operands, narrow = _behind(name, origins)
    if operation == "arith.muli" and narrow and not any(_constant(o, origins) for o in operands):
        return True
    return any(_multiplies(operand, origins) for operand in operands)


def _counts_programs(name: str, origins: _Origins) -> bool:
    operation, operands, narrow = _behind(name, origins)
    if operation == "tt.get_program_id":
        return True
    return narrow and any(_counts_programs(operand, origins) for operand in operands)
