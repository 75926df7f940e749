"""All tests and measurements that need a GPU, most valuable first, within a budget of seconds.

    python -m bench.gpu --budget 540 --out DIR        # again with the same DIR: goes on
    python -m bench.gpu --install DIR                 # puts DIR's results into this checkout

First the preflight's checks, then the stages of stages.py. Each stage is a process; when its time
is up, it is ended together with every process that it started. DIR gets four files: table.txt, one
screen, which is also printed at the end; gpu.json, the state that the next call goes on from;
tuned.json; results.tar.gz with records, logs and profiles. --rehearse runs toy sizes on a CPU: it
tests these commands and measures nothing.
"""

import argparse
import sys
from pathlib import Path

from bench.gpu import session, stages


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--budget", type=float, default=540, help="seconds of this call (%(default)s)")
    add("--out", type=Path, default=Path("out/gpu"), help="folder of the four files (%(default)s)")
    add("--only", nargs="+", metavar="STAGE", default=[], help="these alone, even if they have run")
    add("--resume", type=Path, metavar="DIR", help="folder (or gpu.json) of an earlier call, used "
        "where --out is empty")  # fmt: skip
    add("--rehearse", action="store_true", help="toy sizes on a CPU")
    add("--install", type=Path, metavar="DIR", help="install what calls wrote to DIR")
    args = parser.parse_args(argv)
    if args.install is not None:
        from bench.gpu import install  # needs torch

        return install.main(args.install)
    try:
        only = stages.named(args.only)
    except ValueError as error:
        parser.error(str(error))
    if not args.budget > 0:
        parser.error(f"--budget {args.budget:g} must be above 0 seconds")
    if args.resume is not None and not args.resume.exists():
        parser.error(f"--resume {args.resume} does not exist")
    return session.run(session.Session(args.out, args.budget, args.rehearse), only, args.resume,
                       parser.error)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
