"""bench.gpu over stages of gpu_stub.py: python -m tests.bench.gpu_driver OUT BUDGET STAGE..."""

import sys
from pathlib import Path

from bench.gpu import keeper, session
from bench.gpu.stages import Stage

LIMITS = keeper.Limits(0.0, grace=0.5, max_bytes=2**24, min_free=0)


def stage(word: str) -> Stage:
    """`name`, or `name=how`; with `+` behind it, one of our own that comes last."""
    name, _, how = word.rstrip("+").partition("=")
    command = f"tests.bench.gpu_stub {how or name} {{out}}"
    return Stage(name, command, 3.0, 0.5, last=word.endswith("+"))


def main() -> int:
    out, budget, *words = sys.argv[1:]
    resume = None
    if words and words[0] == "--resume":
        resume, words = Path(words[1]), words[2:]
    preflight = stage(words.pop(0)) if words[0].startswith("preflight") else stage("preflight")
    stages = tuple(map(stage, words))
    one = session.Session(Path(out), float(budget), False, stages, preflight, LIMITS)
    return session.run(one, [], resume, lambda text: print(text, file=sys.stderr))


if __name__ == "__main__":
    sys.exit(main())
