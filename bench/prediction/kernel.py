"""What both sides of a prediction are counted into: kernels, and what one launch of each does."""

from dataclasses import dataclass

GEMM, ATTENTION, TRITON, ATEN = "gemm", "attention", "triton", "aten"


@dataclass(frozen=True)
class Kernel:
    """A kernel with one set of arguments. All but `launches` is of one launch; what is 0 was not
    counted: of a library's kernel only FLOPs and bytes are known.
    """

    name: str
    component: str  # a group of bench/harness/roofline.py
    kind: str
    launches: int
    bytes: float  # read and written; a tensor once for each place in the code that goes over it
    parts: int = 1  # kernels that a library starts for it
    flops: float = 0.0
    phase: str = ""  # of a GEMM or of attention: forward, dgrad, wgrad, backward
    elements: float = 0.0
    instructions: float = 0.0  # issued by warps
    grid: int = 0
    warps: int = 0
    registers: int = 0  # per thread
    spills: int = 0
    shared_bytes: int = 0
    load_bits: int = 0  # of the instruction that loads most of the bytes
    store_bits: int = 0
    waits: float = 0.0  # for memory, one after the other in a program
    again: float = 0.0  # of `bytes`, those of tensors read before by the same program

    def instructions_per_element(self) -> float:
        """Of a thread, for one element."""
        return 32 * self.instructions / self.elements if self.elements else 0.0

    def widths(self) -> list[int]:
        """Bits of loads and of stores, of those it has."""
        return [bits for bits in (self.load_bits, self.store_bits) if bits] or [0]
