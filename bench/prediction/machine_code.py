"""What one launch of a Triton kernel does, read from what it was compiled to.

Bytes come from Triton's IR: each tt.load and tt.store, times the programs, times a loop's trips,
but of a tensor never more than there is. Instructions come from the machine code: each once, and
those of a loop as often as it turns. Trips follow from a convention of our kernels and inductor's:
BLOCK_X tiles the argument X (XBLOCK the xnumel), and what the programs do not share out, they loop
over. Paths that are seldom taken, behind the code's end, are not counted.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import torch

from bench.prediction.kernel import TRITON, Kernel
from fastgpt.commands import inspect
from fastgpt.commands.inspect import Specimen

DEFAULT_WARPS = 4  # Triton's


class Site(NamedTuple):
    """A load or store in Triton's IR."""

    argument: int | None  # its tensor, as the n-th argument of the compiled kernel
    bytes: int  # of one execution
    elements: int
    in_loop: bool
    stores: bool


class Code(NamedTuple):
    registers: int
    shared_bytes: int
    spills: int
    once: float  # instructions of a warp outside loops
    in_loops: float  # and of one trip, through each of them
    load_bits: int
    store_bits: int
    sites: tuple[Site, ...]
    chain: int  # loads of which each waits for the one before, as of an address


def kernel_of(component: str, launch: Any, arch: int) -> Kernel:
    """One launch (`_launch.Launch`), counted."""
    specimen = inspect.specimen_of(launch, arch)
    code = code_of(specimen)
    sizes = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    tensors = [sizes[name] for name, kind in specimen.signature if kind != "constexpr"]
    room = [t.numel() * t.element_size() if isinstance(t, torch.Tensor) else 0 for t in tensors]
    return counted(
        specimen.name, component, code, launch.grid, launch.options.get("num_warps", DEFAULT_WARPS),
        trips(sizes, launch.grid), room,
    )  # fmt: skip


def counted(
    name: str, component: str, code: Code, grid: int, warps: int, turns: float, room: list[int]
) -> Kernel:
    """`turns`: of each loop, in each program. `room`: bytes behind each argument."""
    moved: dict[int | None, float] = defaultdict(float)
    again, elements = 0.0, 0.0
    for site in code.sites:
        times = grid * (turns if site.in_loop else 1)
        size = float(site.bytes * times)
        if site.argument is not None and room[site.argument]:
            size = min(size, room[site.argument])
        before = moved[site.argument] if site.argument is not None else 0.0
        if not site.stores and before >= size / 2:  # not where a few elements were looked up
            again += size if before else 0.0
        moved[site.argument] += size
        elements = max(elements, size / site.bytes * site.elements)
    return Kernel(
        name, component, TRITON, 1, float(sum(moved.values())),
        elements=elements,
        instructions=grid * warps * (code.once + turns * code.in_loops),
        grid=grid, warps=warps, registers=code.registers, spills=code.spills,
        shared_bytes=code.shared_bytes, load_bits=code.load_bits, store_bits=code.store_bits,
        again=again, waits=code.chain * turns,
    )  # fmt: skip


def trips(sizes: dict[str, Any], grid: int) -> float:
    """How often a program goes round its loops: tiles of the whole over programs, at least once."""
    tiles = 1
    for name, block in sizes.items():
        tiled = re.fullmatch(r"BLOCK_(\w+)|BLOCK|([XR]0?_?)BLOCK", name)
        if not tiled or not isinstance(block, int):
            continue
        of = tiled[1] or (f"{tiled[2].lower()}numel" if tiled[2] else "SIZE")
        if isinstance(sizes.get(of), int):
            tiles *= math.ceil(sizes[of] / block)
    return max(1.0, tiles / grid)


@functools.cache
def code_of(specimen: Specimen) -> Code:
    made = inspect.compiled_kernel(specimen)
    warps = dict(specimen.options).get("num_warps", DEFAULT_WARPS)
    return read(made.asm["ttir"], made.asm["cubin"], made.metadata.shared, warps)


def read(ttir: str, cubin: bytes, shared_bytes: int, warps: int) -> Code:
    registers, sass = inspect.machine_code(cubin)
    instructions, (found, chain) = _instructions(sass), sites(ttir)
    loops = [
        (target, at)
        for at, name, rest in instructions
        if name == "BRA" and (target := _target(rest)) is not None and target < at
    ]
    names = [name for _, name, _ in instructions]
    # the assembler may have unrolled loops: then they move several trips' bytes
    of_trip = sum(site.bytes for site in found if site.in_loop)
    steps = {int(n) for n in re.findall(r"scf\.for .* step %c(\d+)_i", ttir) if int(n) >= 16}
    looping, of_code, in_loops = 0, 0, 0.0
    for first, last in loops:
        body = [i for i in instructions if first <= i[0] <= last]
        looping += len(body)
        of_code += 4 * warps * sum(_width(name) for _, name, _ in body)  # 32 threads, 8 bits a byte
        in_loops += len(body) / _unrolled(body, steps)
    if of_trip and in_loops == looping:
        in_loops /= max(1, round(of_code / of_trip))
    return Code(
        registers, shared_bytes, sum(name.startswith(("LDL", "STL")) for name in names),
        len(names) - looping, in_loops,
        _usual_width(names, _LOADS), _usual_width(names, _STORES), tuple(found), chain,
    )  # fmt: skip


def _unrolled(body: list[tuple[int, str, str]], steps: set[int]) -> int:
    """Trips in one turn of a loop, by how far its counter goes; 1 where that cannot be seen."""
    added = re.compile(r"(U?R\d+),.*\b\1\b.*, 0x([0-9a-f]+)\b")
    found = [int(m[2], 16) for _, name, rest in body if "IADD" in name and (m := added.match(rest))]
    return min((n // step for n in found for step in steps if n and n % step == 0), default=1)


_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*([^;]*);", re.M)


def _instructions(sass: str) -> list[tuple[int, str, str]]:
    """(address, name, the rest) up to the first EXIT without a condition."""
    found = []
    for address, predicate, name, rest in _LINE.findall(sass):
        found.append((int(address, 16), name, rest))
        if name == "EXIT" and not predicate:
            break
    return found


def _target(rest: str) -> int | None:
    address = re.search(r"0x([0-9a-f]+)", rest)
    return int(address[1], 16) if address else None


_LOADS, _STORES = ("LDG", "LDGSTS"), ("STG",)
_WIDTHS = ("8", "16", "64", "128")


def _width(name: str) -> int:
    """Bits that each thread moves to or from memory; 0 of other instructions."""
    kind, *rest = name.split(".")
    if kind not in _LOADS + _STORES:
        return 0
    return next((int(bits) for part in rest if (bits := part.lstrip("US")) in _WIDTHS), 32)


def _usual_width(names: list[str], kinds: tuple[str, ...]) -> int:
    """Bits of the instructions, loads or stores, that move most bytes together; 0 for none."""
    moved: Counter[int] = Counter()
    for name in names:
        if name.split(".")[0] in kinds:
            moved[_width(name)] += _width(name)
    return moved.most_common(1)[0][0] if moved else 0


_HEAD = re.compile(r"tt\.func \w+ @\w+\((.*)\) attributes")
_MADE = re.compile(r"(%[\w#]+)(?::\d+)? = \"?([\w.]+)\"?(.*)")
_ACCESS = re.compile(r"tt\.(load|store|atomic_\w+)\b.*?(%[\w#]+)")
_THROUGH = ("tt.splat", "tt.addptr", "tt.broadcast", "tt.expand_dims", "tt.bitcast", "tt.reshape")


def sites(ttir: str) -> tuple[list[Site], int]:
    """The loads and stores of a kernel, of memory as far as it is named by pointers; and the
    longest chain of loads."""
    base: dict[str, int] = {}  # value -> argument it points into
    waits: dict[str, int] = {}  # value -> loads that it had to wait for
    found, loops, depth = [], list[int](), 0
    for line in ttir.splitlines():
        if head := _HEAD.search(line):
            base = {name: i for i, name in enumerate(re.findall(r"(%\w+): ", head[1]))}
        text = line.split(" loc(")[0].strip()
        for carried, start in re.findall(r"(%\w+) = (%[\w#]+)[,)]", text):  # into a loop
            if start in base:
                base[carried] = base[start]
        access = _ACCESS.search(text)
        if made := _MADE.match(text):
            operands = re.findall(r"%[\w#]+", made[3])
            base.pop(made[1], None)
            if made[2] in _THROUGH and operands[0] in base:
                base[made[1]] = base[operands[0]]
            waits[made[1]] = max((waits.get(o, 0) for o in operands), default=0) + bool(access)
        if access:
            found.append(_site(text, access[1], base.get(access[2]), bool(loops)))
        if re.search(r"\bscf\.(for|while)\b", text):
            loops.append(depth)
        depth += text.count("{") - text.count("}")
        while loops and depth <= loops[-1]:
            loops.pop()
    return found, max(waits.values(), default=0)


def _site(text: str, kind: str, argument: int | None, in_loop: bool) -> Site:
    types = re.findall(r"(?:tensor<([\dx]+)x)?!tt\.ptr<(\w+)>", text)
    shape, pointee = types[-1]
    elements = math.prod(int(n) for n in shape.split("x")) if shape else 1
    passes = 2 if kind.startswith("atomic") else 1
    size = passes * elements * itemsize(pointee)
    return Site(argument, size, elements, in_loop, kind != "load")


def itemsize(kind: str) -> int:
    """Bytes, of a type's name in Triton: bf16, *fp32, i1."""
    return max(8, int(re.sub(r"\D", "", kind))) // 8
