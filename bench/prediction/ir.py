"""What Triton's IR says of a kernel: its loads and stores, and how often its loops turn.

A loop's bounds are computed from the launch, as the programs would: its arguments, the number of
programs, and their ids. What was loaded is not known; two bounds that count from the same unknown
still have a known distance, and a minimum with an unknown is taken to be the other. Of the two ways
of an `if` that one counts which moves more bytes.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Site(NamedTuple):
    """A load or store of memory that is named by pointers."""

    argument: int | None  # its tensor, as the n-th argument of the compiled kernel
    bytes: int  # of one execution
    elements: int
    loops: tuple[int, ...]  # those around it, outermost first
    stores: bool


class Step(NamedTuple):
    """Integer arithmetic on scalars, or a loop: then its operands are its bounds and its step."""

    name: str  # the result's, or the number of the loop
    operation: str
    operands: tuple[str, ...]  # names, or the one number of a constant


class Ir(NamedTuple):
    arguments: tuple[str, ...]
    sites: tuple[Site, ...]
    steps: tuple[Step, ...]  # in order
    loops: int
    chain: int  # loads of which each waits for the one before, as of an address


_HEAD = re.compile(r"tt\.func \w+ @\w+\((.*)\) attributes")
_MADE = re.compile(r"(%[\w#]+)(?::\d+)? = \"?([\w.]+)\"?(.*)")
_FOR = re.compile(r"scf\.for (%\w+) = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)")
_ACCESS = re.compile(r"tt\.(load|store|atomic_\w+)\b.*?(%[\w#]+)")
_THROUGH = ("tt.splat", "tt.addptr", "tt.broadcast", "tt.expand_dims", "tt.bitcast", "tt.reshape")


def read(ttir: str) -> Ir:
    arguments: tuple[str, ...] = ()
    base: dict[str, int] = {}  # value -> argument it points into
    waits: dict[str, int] = {}  # value -> loads that it had to wait for
    sites: list[tuple[Site, tuple[tuple[int, int], ...]]] = []  # and the ifs around, with their way
    steps: list[Step] = []
    around: list[tuple[str, int, int, int]] = []  # "loop" or "if", number, way, depth
    loops = ifs = depth = 0
    for line in ttir.splitlines():
        if head := _HEAD.search(line):
            arguments = tuple(re.findall(r"(%\w+): ", head[1]))
            base = {name: i for i, name in enumerate(arguments)}
        text = line.split(" loc(")[0].strip()
        for carried, start in re.findall(r"(%\w+) = (%[\w#]+)[,)]", text):  # into a loop
            if start in base:
                base[carried] = base[start]
        access = _ACCESS.search(text)
        if assignment := _MADE.match(text):
            name, operation, tail = assignment.groups()
            operands = tuple(re.findall(r"%[\w#]+", tail))
            base.pop(name, None)
            if operation in _THROUGH and operands[0] in base:
                base[name] = base[operands[0]]
            waits[name] = max((waits.get(o, 0) for o in operands), default=0) + bool(access)
            if "tensor<" not in tail:
                number = re.match(r" (-?\d+) : i", tail)
                steps.append(Step(name, operation, (number[1],) if number else operands))
        if access:
            inside = tuple(number for kind, number, *_ in around if kind == "loop")
            ways = tuple((number, way) for kind, number, way, _ in around if kind == "if")
            sites.append((_site(text, access[1], base.get(access[2]), inside), ways))
        if text.startswith("} else {"):
            kind, nth, _, at = around[-1]
            around[-1] = kind, nth, 1, at
        elif bounds := _FOR.search(text):
            variable, *rest = bounds.groups()
            steps += [Step(variable, "its variable", ()), Step(str(loops), "loop", tuple(rest))]
        if re.search(r"\bscf\.(for|while)\b", text):
            around.append(("loop", loops, 0, depth))
            loops += 1
        elif re.search(r"\bscf\.if\b", text):
            around.append(("if", ifs, 0, depth))
            ifs += 1
        depth += text.count("{") - text.count("}")
        while around and depth <= around[-1][3]:
            around.pop()
    chain = max(waits.values(), default=0)
    return Ir(arguments, _taken(sites, ifs), tuple(steps), loops, chain)


def _taken(sites: list[tuple[Site, tuple[tuple[int, int], ...]]], ifs: int) -> tuple[Site, ...]:
    """Without the way of each `if` that moves less, the inner ones first."""
    for number in reversed(range(ifs)):
        moved = [sum(s.bytes for s, ways in sites if (number, way) in ways) for way in (0, 1)]
        left = (number, 1 if moved[0] >= moved[1] else 0)
        sites = [(site, ways) for site, ways in sites if left not in ways]
    return tuple(site for site, _ in sites)


def _site(text: str, kind: str, argument: int | None, loops: tuple[int, ...]) -> Site:
    shape, pointee = re.findall(r"(?:tensor<([\dx]+)x)?!tt\.ptr<(\w+)>", text)[-1]
    elements = math.prod(int(n) for n in shape.split("x")) if shape else 1
    passes = 2 if kind.startswith("atomic") else 1
    return Site(argument, passes * elements * itemsize(pointee), elements, loops, kind != "load")


def itemsize(kind: str) -> int:
    """Bytes, of a type's name in Triton: bf16, *fp32, i1."""
    return max(8, int(re.sub(r"\D", "", kind))) // 8


def turns(ir: Ir, arguments: list[Any], grid: int) -> list[float]:
    """Of each loop, as often as a program enters it: the mean over programs."""
    most = 64
    programs = range(grid) if grid <= most else [i * (grid - 1) // (most - 1) for i in range(most)]
    counts = [_turns_of(ir, arguments, grid, program) for program in programs]
    return [sum(column) / len(programs) for column in zip(*counts, strict=True)]


Number = tuple[str, int]  # the name of something unknown or "", and what is added to it


def _turns_of(ir: Ir, arguments: list[Any], grid: int, program: int) -> list[float]:
    known: dict[str, Number] = {
        name: ("", value)
        for name, value in zip(ir.arguments, arguments, strict=True)
        if isinstance(value, int)
    }
    by_loop = [1.0] * ir.loops
    for name, operation, operands in ir.steps:
        if operation == "loop":
            first, last, step = (known.get(o, (o, 0)) for o in operands)
            if first[0] == last[0] and not step[0] and step[1] > 0:
                by_loop[int(name)] = max(0, math.ceil((last[1] - first[1]) / step[1]))
            continue
        values = [known.get(o, (o, 0)) for o in operands]
        known[name] = _result(name, operation, operands, values, grid, program)
    return by_loop


def _result(
    name: str, operation: str, operands: tuple[str, ...], values: list[Number], grid: int,
    program: int,
) -> Number:  # fmt: skip
    if operation == "arith.constant" and operands:
        return "", int(operands[0])
    if operation == "tt.get_program_id":
        return "", program
    if operation == "tt.get_num_programs":
        return "", grid
    if operation in ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast"):
        return values[0]
    if len(values) != 2:
        return name, 0
    (a, m), (b, n) = values
    if operation in ("arith.minsi", "arith.maxsi") and a != b:
        return values[1] if (a and not m) else values[0]
    if operation == "arith.addi" and not (a and b):
        return a or b, m + n
    if operation == "arith.subi" and (a == b or not b):
        return ("" if a == b else a), m - n
    compute = _COMPUTED.get(operation)
    if a or b or compute is None or (n == 0 and operation in ("arith.divsi", "arith.remsi")):
        return name, 0
    return "", compute(m, n)


_COMPUTED: dict[str, Callable[[int, int], int]] = {
    "arith.muli": lambda m, n: m * n,
    "arith.divsi": lambda m, n: m // n,
    "arith.remsi": lambda m, n: m % n,
    "arith.minsi": min,
    "arith.maxsi": max,
}
