"""Triton's interpreter, without work that it repeats: 40 % of the time of the tests of kernels."""

from typing import Any

try:
    from triton import language as tl
    from triton.runtime import interpreter
except ImportError:  # then there is nothing to speed up
    interpreter = None


def patch_once() -> None:
    """Where a jitted function calls another, the interpreter goes through triton.language again, to
    put its own functions in the place of each: 5 ms a call. Only the launch needs to do that.
    """
    if interpreter is None:
        return
    patch = interpreter._patch_lang
    nothing_to_restore = getattr(interpreter, "_LangPatchScope", lambda: None)

    def unless_patched(function: Any) -> Any:
        modules = [m for m in function.__globals__.values() if m is tl or m is tl.core]
        if modules and not any(tl.core.is_builtin(m.load) for m in modules):
            return nothing_to_restore()
        return patch(function)

    interpreter._patch_lang = unless_patched
