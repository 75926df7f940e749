"""A walk through one kernel, GELU: definition, errors, mutants, machine code. Cells are `# %%`.

    python docs/examples/one_kernel.py

In a checkout, with triton; no GPU is needed. The kernel runs in Triton's interpreter, on numpy,
and is compiled for an H100 without running. What CI does for all kernels is done here for one.
"""

# %% [1] Where it runs: the interpreter has to be asked for before triton is imported.
import os
import sys
from pathlib import Path

ROOT = Path(os.environ.get("WALK_ROOT", Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(ROOT))
os.environ["TRITON_INTERPRET"] = "1"

import json  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import textwrap  # noqa: E402

import torch  # noqa: E402

from fastgpt.kernels import gelu  # noqa: E402


# %% [2] The definition: h * Phi(h), in float64 the truth.
def truth(h: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = h.double().requires_grad_()
    y = torch.nn.functional.gelu(wide)
    y.backward(dy.double())
    return y.detach(), wide.grad


# %% [3] The kernel against it, beside eager PyTorch in the same dtype: the errors in units of the
# last place of 1, and of the largest gradient.
def errors(dtype: torch.dtype = torch.float16) -> dict[str, float]:
    torch.manual_seed(1)
    h = (3 * torch.randn(3, 3000)).to(dtype)  # three programs of the forward, and a ragged end
    dy = torch.randn(3000, 3).to(dtype).T  # any strides
    y, dh = truth(h, dy)
    found = gelu.gelu_forward(h, False), gelu.gelu_backward(dy, h, False, False, False)[0]
    leaf = h.clone().requires_grad_()
    eager = torch.nn.functional.gelu(leaf)
    eager.backward(dy)
    eps = torch.finfo(dtype).eps
    return {
        name: (tensor.double() - exact).abs().max().item() / (eps * exact.abs().max().item())
        for name, tensor, exact in (
            ("y", found[0], y), ("dh", found[1], dh),
            ("eager y", eager.detach(), y), ("eager dh", leaf.grad, dh),
        )
    }  # fmt: skip


def within(found: dict[str, float]) -> bool:
    """The tests' rule: at most twice eager's error, and one rounding."""
    return all(found[name] <= 2 * found[f"eager {name}"] + 1 for name in ("y", "dh"))


# %% [4] Mutants: the kernel broken on purpose, in a copy of the tree. A rule that lets one pass
# proves nothing.
MUTANTS = {  # name -> whether fp16 can tell
    "the density halved": True,
    "GELU of rounded arguments": False,  # they are of 16 bits already: fp32 is there to catch it
    "incoming gradient's column stride forgotten": True,
}


def mutant_errors(name: str) -> dict[str, float]:
    from tests.mutants import mutants

    (mutant,) = [m for m in mutants() if m.name == name and m.file in ("gelu.py", "_math.py")]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        for part in ("fastgpt", "kernels"):
            shutil.copytree(ROOT / part, tree / part, symlinks=True,
                            ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
        path = mutant.path(tree)
        path.write_text(mutant.within(path.read_text()))
        command = [sys.executable, str(Path(__file__).resolve()), "--errors"]
        env = {**os.environ, "WALK_ROOT": str(tree)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


# %% [5] The machine code, from a process whose triton compiles.
SASS = """
import json
from collections import Counter
from fastgpt.commands.inspect import compiled_kernel, specimens
from fastgpt.commands.sass import machine_code
(found,) = [s for s in specimens(90, ["bfloat16"])
            if s.kernel == "_gelu_kernel" and ("TANH", False) in s.constants]
registers, code = machine_code(compiled_kernel(found).asm["cubin"])
names = Counter(instruction.name for instruction in code)
print(json.dumps(dict(registers=registers, instructions=names.most_common())))
"""


def machine_code() -> dict:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SASS], cwd=ROOT, env=env, capture_output=True,
                          text=True, check=True)  # fmt: skip
    return json.loads(done.stdout)


# %% [6] The walk.
def main() -> None:
    print("1. the definition, y = h * Phi(h), and what the kernel's file says of itself:")
    print(textwrap.indent((gelu.__doc__ or "").strip(), "     "))
    found = errors()
    print("2. errors in fp16, in roundings of the largest element:")
    for name, error in found.items():
        print(f"     {name:<9}{error:.2f}")
    assert within(found)
    print("3. mutants:")
    for name, is_seen in MUTANTS.items():
        broken = mutant_errors(name)
        worst = max(broken["y"], broken["dh"])
        print(f"     {'passes' if within(broken) else 'caught'}: {name} (error {worst:.3g})")
        assert within(broken) != is_seen
    code = machine_code()
    print(f"4. sm_90, bf16: {code['registers']} registers; of its instructions:")
    kinds = dict(code["instructions"])
    for name in sorted(kinds, key=kinds.get, reverse=True)[:8]:
        print(f"     {kinds[name]:>4} {name}")
    loads = [name for name in kinds if name.startswith("LDG")]
    print(f"     loads are {', '.join(loads)}; nothing goes to local memory")
    assert all("128" in name for name in loads)
    assert not any(name.startswith(("LDL", "STL")) for name in kinds)  # spills


if __name__ == "__main__":
    if sys.argv[1:] == ["--errors"]:
        print(json.dumps(errors()))
    else:
        main()
