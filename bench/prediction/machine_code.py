"""What one launch of a Triton kernel does, read from what it was compiled to.

Bytes come from Triton's IR (ir.py): each load and store, times the programs, times its loops'
turns, but never more of a tensor than it holds. Instructions come from the machine code: those on
the way through it that moves most bytes in fewest instructions, those of a loop as often as it
turns. So what is seldom done, such as the ends of ranges, is left out.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import torch

from bench.prediction import ir
from bench.prediction.ir import Ir
from bench.prediction.kernel import TRITON, Kernel
from fastgpt.commands import inspect, sass
from fastgpt.commands.inspect import Specimen
from fastgpt.commands.sass import Instruction

DEFAULT_WARPS = 4  # Triton's


class Code(NamedTuple):
    ir: Ir
    instructions: tuple[Instruction, ...]
    steps: frozenset[int]  # of loops, where constant
    registers: int
    shared_bytes: int


def kernel_of(component: str, launch: Any, arch: int) -> Kernel:
    """One launch (`_launch.Launch`), counted."""
    specimen = inspect.specimen_of(launch, arch)
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    args = [values[name] for name, kind in specimen.signature if kind != "constexpr"]
    room = [t.numel() * t.element_size() if isinstance(t, torch.Tensor) else 0 for t in args]
    warps = launch.options.get("num_warps", DEFAULT_WARPS)
    return counted(specimen.name, component, code_of(specimen), launch.grid, warps, args, room)


def counted(
    name: str, component: str, code: Code, grid: int, warps: int, args: list[Any], room: list[int]
) -> Kernel:
    """`args`: the kernel's arguments, of which integers count. `room`: bytes behind each."""
    turns = ir.turns(code.ir, args, grid)
    loaded: dict[int | None, float] = defaultdict(float)
    stored: dict[int | None, float] = defaultdict(float)
    elements = 0.0
    for site in code.ir.sites:
        size = float(site.bytes * grid * math.prod(turns[loop] for loop in site.loops))
        if site.argument is not None and room[site.argument]:
            size = min(size, room[site.argument])
        (stored if site.stores else loaded)[site.argument] += size
        elements = max(elements, size / site.bytes * site.elements)
    again = 0.0
    for moved in (loaded, stored):
        for argument, size in moved.items():
            if argument is not None and 0 < room[argument] < size:
                # whole passes: beyond them are masked lanes, or a few elements that are looked up
                moved[argument] = size // room[argument] * room[argument]
                again += moved[argument] - room[argument] if moved is loaded else 0.0
    way = _way(code, turns, warps)
    return Kernel(
        name, component, TRITON, 1, sum(loaded.values()) + sum(stored.values()),
        elements=elements,
        instructions=grid * warps * sum(times for _, times in way),
        grid=grid, warps=warps, registers=code.registers,
        spills=sass.spills(code.instructions),
        shared_bytes=code.shared_bytes,
        load_bits=_usual_width(way, sass.LOADS), store_bits=_usual_width(way, sass.STORES),
        waits=_waits(code, turns), again=again,
    )  # fmt: skip


def _waits(code: Code, turns: list[float]) -> float:
    """Of a program for memory, one after the other: in each turn of a loop, unless it copies
    ahead."""
    loops = {site.loops for site in code.ir.sites if site.loops and not site.stores}
    rounds = sum(math.prod(turns[loop] for loop in around) for around in loops)
    ahead = any(i.name.startswith("LDGSTS") for i in code.instructions)
    return max(0, code.ir.chain - 1) + (rounds if rounds and not ahead else min(1, code.ir.chain))


@functools.cache
def code_of(specimen: Specimen) -> Code:
    compiled = inspect.compiled_kernel(specimen)
    return read(compiled.asm["ttir"], compiled.asm["cubin"], compiled.metadata.shared)


def read(ttir: str, cubin: bytes, shared_bytes: int) -> Code:
    registers, instructions = sass.machine_code(cubin)
    # small ones are added to much else than counters
    steps = {int(n) for n in re.findall(r"scf\.for .* step %c(\d+)_i", ttir) if int(n) >= 16}
    return Code(ir.read(ttir), instructions, frozenset(steps), registers, shared_bytes)


Way = list[tuple[Instruction, float]]  # what is executed, and how often


def _way(code: Code, turns: list[float], warps: int) -> Way:
    """Of one warp."""
    instructions, loops = code.instructions, sass.loops(code.instructions)
    alike = len(loops) == len(turns)  # else the assembler has split or dissolved some
    times = [1.0] * len(instructions)
    for number, (first, last) in enumerate(loops):
        body = instructions[first : last + 1]
        turn = [body[i] for i in _heaviest(body, [1.0] * len(body))]
        of_trip = sum(s.bytes for s in code.ir.sites if alike and s.loops[-1:] == (number,))
        trips = turns[number] if alike else max(turns, default=1.0)
        for i in range(first, last + 1):
            times[i] *= trips / _unrolled(turn, of_trip, warps, code.steps)
    return [(instructions[i], times[i]) for i in _heaviest(instructions, times)]


def _heaviest(instructions: tuple[Instruction, ...], times: list[float]) -> list[int]:
    """The way that moves most bytes, and of such ways the shortest."""
    places = sass.places(instructions)
    end = len(instructions)
    best = [(0.0, 0.0)] * (end + 1)  # from here to the end: bytes, less instructions
    following = [end] * end
    for i in reversed(range(end)):
        following[i] = max(_next(instructions, i, places), key=lambda n: best[n], default=end)
        moved, issued = best[following[i]]
        best[i] = (moved + times[i] * sass.width(instructions[i].name), issued - times[i])
    way, i = [], 0
    while i < end:
        way.append(i)
        i = following[i]
    return way


def _next(instructions: tuple[Instruction, ...], i: int, places: dict[int, int]) -> list[int]:
    """The instructions that may follow the i-th, forwards; none after the end."""
    kind, conditional = instructions[i].name.split(".")[0], instructions[i].conditional
    target = sass.target(instructions[i], places)
    forward = [target] if target is not None and target > i else []
    endless = target is not None and not forward  # a loop that something else leaves
    return forward + [i + 1] * (conditional or endless or kind not in ("BRA", "EXIT"))


def _unrolled(body: list[Instruction], of_trip: int, warps: int, steps: frozenset[int]) -> int:
    """Trips in one turn of a loop: by the bytes that both move, or by how far the counter goes."""
    if of_trip:
        moved = 32 * warps * sum(sass.width(i.name) for i in body) / 8
        return max(1, round(moved / of_trip))
    added = re.compile(r"(U?R\d+),.*\b\1\b.*, 0x([0-9a-f]+)\b")
    increments = [int(m[2], 16) for i in body if "ADD" in i.name and (m := added.match(i.rest))]
    return min((n // step for n in increments for step in steps if n and n % step == 0), default=1)


def _usual_width(way: Way, kinds: tuple[str, ...]) -> int:
    """Bits of the instructions, loads or stores, that move most bytes together; 0 for none."""
    moved: Counter[int] = Counter()
    for instruction, times in way:
        if instruction.name.split(".")[0] in kinds:
            moved[sass.width(instruction.name)] += round(times * sass.width(instruction.name))
    return moved.most_common(1)[0][0] if moved else 0
