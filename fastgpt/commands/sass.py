"""The machine code of a compiled kernel: its registers, and its instructions as SASS."""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

LOADS, STORES = ("LDG", "LDGSTS"), ("STG",)  # from and to global memory
_WIDTHS = ("8", "16", "64", "128")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*([^;]*);", re.M)


class Instruction(NamedTuple):
    address: int
    conditional: bool
    name: str  # with its modifiers, as in LDG.E.128
    rest: str


class MachineCode(NamedTuple):
    registers: int  # of a thread
    instructions: tuple[Instruction, ...]  # without NOPs


def machine_code(cubin: bytes) -> MachineCode:
    """Read by the cuobjdump that comes with triton."""
    tool = tools() / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [tool, what, file.name], capture_output=True, text=True, check=True
            ).stdout
            for what in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage[:200]!r}")
    return MachineCode(int(registers[1]), instructions(sass))


def tools() -> Path:
    """The folder of NVIDIA's programs in triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def instructions(sass: str) -> tuple[Instruction, ...]:
    return tuple(
        Instruction(int(address, 16), bool(predicate), name, rest)
        for address, predicate, name, rest in _LINE.findall(sass)
        if name != "NOP"
    )


def spills(code: Iterable[Instruction]) -> int:
    """Loads and stores of registers that did not fit."""
    return sum(i.name.startswith(("LDL", "STL")) for i in code)


def width(name: str) -> int:
    """Bits that each thread moves to or from global memory; 0 of other instructions."""
    kind, *modifiers = name.split(".")
    if kind not in LOADS + STORES:
        return 0
    return next((int(bits) for m in modifiers if (bits := m.lstrip("US")) in _WIDTHS), 32)


def places(code: Sequence[Instruction]) -> dict[int, int]:
    """address -> index."""
    return {instruction.address: i for i, instruction in enumerate(code)}


def target(instruction: Instruction, places: dict[int, int]) -> int | None:
    """The index of the instruction that a branch goes to; None of other instructions."""
    if not instruction.name.startswith("BRA"):
        return None
    address = re.search(r"0x([0-9a-f]+)", instruction.rest)
    return places.get(int(address[1], 16)) if address else None


def loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Indices (first, last) of each; not the branch to itself that follows a kernel's end."""
    by_address, spans = places(code), dict[int, int]()
    for i, instruction in enumerate(code):
        start = target(instruction, by_address)
        if start is not None and start < i:
            spans[start] = max(i, spans.get(start, 0))
    return sorted(spans.items())
