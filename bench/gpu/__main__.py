"""Everything a GPU session is for, most valuable first, within a budget of seconds.

    python -m bench.gpu --budget 540 --out DIR        # again with the same DIR, it goes on
    python -m bench.gpu --install DIR                 # records, tables and docs into this checkout

A preflight, then stages (stages.py), each a process that is ended with all it started when its time
is up. DIR gets four files: table.txt, one screen, also printed last; gpu.json, all that is known,
from which the next call goes on; tuned.json; results.tar.gz with records, logs and profiles.
--rehearse runs toy sizes on a CPU, which proves the kit and measures nothing.
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
    add("--only", nargs="+", metavar="STAGE", default=[], help="these, again where they have run")
    add("--resume", type=Path, metavar="DIR", help="where the files of an earlier call lie, if DIR "
        "of --out is empty; its gpu.json alone will do")  # fmt: skip
    add("--rehearse", action="store_true", help="toy sizes on a CPU")
    add("--install", type=Path, metavar="DIR", help="what calls have left in DIR")
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
