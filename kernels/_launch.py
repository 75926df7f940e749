"""What a kernel file needs around its kernels: where they run, how they start, how torch sees them.

`launch` is the one place a kernel starts. It runs on its tensors' device, not the current one, and
past the first time without the Python that Triton puts in front of every launch; inside `record` it
starts nothing, but notes what would have been launched, which is how `fastgpt
inspect` compiles exactly the kernels that the launchers launch, ahead of time and without a GPU.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._autograd import constant_in_a_graph

try:  # Triton 3.4's programmatic dependent launch
    from triton.language.extra.cuda import gdc_launch_dependents as start_next
    from triton.language.extra.cuda import gdc_wait as wait
except ImportError:
    start_next = wait = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by triton.jit too, once per process
MIN_ARCH = 80
DESCRIPTORS = hasattr(tl, "make_tensor_descriptor")  # Triton 3.4's way to TMA


class Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]  # constexprs, num_warps, num_stages
    grid: int


_recorded: list[Launch] | None = None
_recorded_arch = _recorded_processors = 0
_device_problems: dict[torch.device, str | None] = {}


def launch(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
    """Start `grid` programs of a jitted kernel on the device of its first argument, a tensor."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, args, options, grid))
        return
    index = args[0].get_device()
    if index < 0 or index == torch.cuda.current_device():
        _start(index, kernel, grid, args, options)
        return
    with torch.cuda.device(index):
        _start(index, kernel, grid, args, options)


def launch_with_descriptors(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
    """`launch`, of a kernel that may make descriptors: those need memory."""
    if DESCRIPTORS:  # each time: it is set per thread, and backward runs in another
        triton.set_allocator(_scratch)
    launch(kernel, grid, *args, **options)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for a kernel's descriptors. It is reused only after the launch, on the same stream."""
    return torch.empty(size, device="cuda", dtype=torch.int8)


# what a launch was specialized for -> the compiled kernel and its constants, which are its last
# parameters; None where Triton must be asked again
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]] | None] = {}


def _start(
    index: int, kernel: Any, grid: int, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    key = (id(kernel), index, *options.items(), *map(_specialization, args))
    found = _compiled.get(key)
    if found is not None:
        compiled, constants = found
        try:
            compiled[grid, 1, 1](*args, *constants)
            return
        except TypeError:  # Triton 3.2's launchers take no constants, and say so before they launch
            _compiled[key] = None
    compiled = kernel[(grid,)](*args, **options)
    if key not in _compiled:
        rest = getattr(kernel, "arg_names", ())[len(args) :]
        known = compiled is not None and all(name in options for name in rest)
        _compiled[key] = (compiled, tuple(options[name] for name in rest)) if known else None


def _specialization(arg: Any) -> Any:
    """At least what Triton compiles another kernel for: see its documentation of `triton.jit`."""
    if type(arg) is int:
        return arg == 1, arg % 16 == 0, arg.bit_length() >> 5
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    return type(arg)  # a float is fp32, whatever it is


@contextmanager
def record(arch: int = 90, processors: int = 132) -> Iterator[list[Launch]]:
    """Collect the launches that would be made on this architecture, and start none."""
    global _recorded, _recorded_arch, _recorded_processors
    _recorded, _recorded_arch, _recorded_processors = [], arch, processors
    try:
        yield _recorded
    finally:
        _recorded = None


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own takes microseconds of the host before every launch."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def multiprocessors(t: Tensor) -> int:
    """Multiprocessors of t's GPU, for grids whose programs stride over their work."""
    if _recorded is not None:
        return _recorded_processors
    if not t.is_cuda:
        return 3  # small and odd: in the interpreter every program strides
    return torch.cuda.get_device_properties(t.device).multi_processor_count


def has_tma(t: Tensor) -> bool:
    """Whether this Triton and t's GPU have TMA, which loads tiles by descriptors of tensors. The
    interpreter imitates it.
    """
    return DESCRIPTORS and _generation(t) >= 9


def early(t: Tensor) -> dict[str, bool]:
    """Options of a kernel's launch on t's GPU. EARLY: it starts while the kernel in front of it in
    the stream runs, from the moment that all programs of that one have called `start_next` or
    ended. Before it calls `wait` it must not touch what that kernel, or one before it, writes.
    """
    if wait is None or INTERPRETED or _generation(t) < 9:
        return dict(EARLY=False)
    return dict(EARLY=True, launch_pdl=True)


def _generation(t: Tensor) -> int:
    if _recorded is not None:
        return _recorded_arch // 10
    return torch.cuda.get_device_capability(t.device)[0] if t.is_cuda else 9


def dot_precision(t: Tensor) -> str:
    """`input_precision` of a tl.dot on t: fp32 follows PyTorch's TF32 setting."""
    if t.dtype != torch.float32 or t.device.type == "cpu":
        return "ieee"
    try:
        tf32 = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set by PyTorch 2.9's newer name: then the older cannot be read
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def device_problem(t: Tensor) -> str | None:
    """Why kernels cannot run on t's device, or None. Launches a tiny kernel once per GPU."""
    if t.device.type == "cpu":
        if not INTERPRETED:
            return "tensors are on cpu; use a CUDA GPU, or set TRITON_INTERPRET=1 before the start"
        if t.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly; use float32 or float16"
        return None
    if t.device.type != "cuda":
        return f"there are no kernels for {t.device.type}"
    return _problem_of(t.device)


@constant_in_a_graph  # else the tiny kernel's launch would become part of the graph
def _problem_of(device: torch.device) -> str | None:
    if device not in _device_problems:
        _device_problems[device] = _probe(device)
    return _device_problems[device]


@triton.jit
def _probe_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)


def _probe(device: torch.device) -> str | None:
    if torch.version.hip:
        return "the kernels are untested on ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < MIN_ARCH:
        return f"compute capability {major}.{minor} is below {MIN_ARCH / 10}"
    try:
        x = torch.zeros(1, device=device, dtype=torch.int32)
        launch(_probe_kernel, 1, x)
        return None if x.item() == 1 else "a test kernel gave a wrong result"
    except Exception as error:  # no compiler, no libcuda, a driver too old: each raises its own
        return f"a test kernel failed: {type(error).__name__}: {error}"


_library = torch.library.Library("fastgpt", "DEF")
_registered: list[Any] = []


def register(schema: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Make a launcher a torch operator, opaque to torch.compile, and return it.

    `fake` allocates the outputs without computing them. The autograd.Function stays outside: that
    costs a third of torch.library's own autograd registration per call.
    """
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, launcher, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgpt::{name}", fake, lib=_library)
    operator = getattr(torch.ops.fastgpt, name).default
    _registered.append(operator)
    return operator


@constant_in_a_graph
def introduce_to_inductor() -> None:
    """Register the operators with torch.compile's inductor as opaque calls, as it would do itself.

    Up to PyTorch 2.11, when inductor meets an unknown operator it prints the whole expression
    behind its arguments. That doubles with every block: after twelve blocks it takes hours.
    """
    from torch._inductor import lowering

    usual = getattr(lowering, "constrain_to_fake_tensors", lowering.constrain_to_fx_strides)
    for operator in _registered:
        if operator not in lowering.lowerings:
            lowering.make_fallback(operator, usual)
