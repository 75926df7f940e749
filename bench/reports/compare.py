"""Is fastgpt slower than at the last run? `python -m bench.reports.compare` exits with 1 if it is.

A run is held against the last one before it on the same device with the same settings. What is
compared is each variant's time over eager's in the same round of the same run: a machine that is
slower today slows both. (pytest-benchmark, which compares ops, knows nothing of rounds.) fastgpt's
rows fail if

    the median of the ratios grew by more than 3 %, and
    a rank test finds growth (Mann-Whitney, one-sided, at 5 % shared by all of fastgpt's rows),

or if a row that had a time has none now or is flagged now. The rank test assumes no shape of the
noise, and no outlier moves it much. It sees differences between rounds, but not what differs
between two processes: that is what the 3 % are for. The other variants are shown, for an eager that
changed moves all of them.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import mannwhitneyu

from bench.harness import record
from bench.harness.record import Record
from fastgpt.environment import versions

THRESHOLD, ALPHA = 0.03, 0.05
YARDSTICK = "eager"
Key = tuple[str, ...]


class Verdict(NamedTuple):
    key: Key  # (op, shape, direction,) variant
    text: str
    failed: bool


def runs(records: Sequence[Record], device: str) -> list[Record]:
    """What is to be judged on a device: all benches and settings of its newest record's commit."""
    here = [r for r in records if record.slug(r["environment"]["device"]) == device]
    newest: dict[str, Record] = {}
    for run in here:
        if run["commit"] == here[-1]["commit"]:
            newest[record.kind(run)] = run
    return list(newest.values())


def baseline(run: Record, records: Sequence[Record]) -> Record | None:
    """The last record before `run` of the same bench, device and settings."""
    earlier = [r for r in records if r["date"] < run["date"] and record.kind(r) == record.kind(run)]
    return earlier[-1] if earlier else None


def compare(old: Record, new: Record) -> list[Verdict]:
    """A verdict per row that both runs have."""
    before, now = ratios(old), ratios(new)
    problems = _texts(new, "problem")
    known, flags = (_texts(run, "flag") for run in (old, new))
    new_doubts = {key: flag for key, flag in flags.items() if key not in known}
    fastgpt_keys = [key for key in before.keys() & now.keys() if _of_fastgpt(key)]
    alpha = ALPHA / max(len(fastgpt_keys), 1)
    verdicts = []
    for key, was in before.items():
        if key in now and key in new_doubts:
            verdicts.append(Verdict(key, f"to be doubted now: {new_doubts[key]}", _of_fastgpt(key)))
            continue
        if key in now:
            verdicts.append(_judge(key, was, now[key], alpha))
            continue
        problem = problems.get(key) or problems.get(_without_direction(key))
        text = f"had a time, now: {problem}" if problem else "is not in this run"
        verdicts.append(Verdict(key, text, failed=_of_fastgpt(key) and problem is not None))
    verdicts += [Verdict(key, "is new", False) for key in now if key not in before]
    return verdicts


def ratios(run: Record) -> dict[Key, list[float]]:
    """Seconds over eager's seconds, round by round, of every row that has times."""
    timed = {_key(row): row["seconds"] for row in run["rows"] if row.get("seconds")}
    pairs = {key: (timed.get((*key[:-1], YARDSTICK)), own) for key, own in timed.items()}
    return {
        key: [s / e for s, e in zip(own, eager, strict=False)]
        for key, (eager, own) in pairs.items()
        if eager and key[-1] != YARDSTICK
    }


def _texts(run: Record, field: str) -> dict[Key, str]:
    return {_key(row): row[field] for row in run["rows"] if field in row}


def _key(row: dict[str, Any]) -> Key:
    names = ("op", "shape", "direction", "variant")
    return tuple(str(row[name]) for name in names if name in row)


def _without_direction(key: Key) -> Key:
    """A refused op has one row for all directions."""
    return (*key[:2], key[-1])


def _of_fastgpt(key: Key) -> bool:
    return key[-1].startswith("fastgpt")


def _judge(key: Key, was: list[float], now: list[float], alpha: float) -> Verdict:
    change = statistics.median(now) / statistics.median(was) - 1
    p = chance(was, now)
    least = 1 / math.comb(len(was) + len(now), len(now))  # that p can be with so few rounds
    word, failed = "", False
    if change > THRESHOLD and p <= alpha:
        word, failed = "SLOWER" if _of_fastgpt(key) else "slower", _of_fastgpt(key)
    elif change > THRESHOLD and least > alpha:
        word = f"cannot be told from noise with {len(was)} and {len(now)} rounds: take more"
    elif change < -THRESHOLD and chance(now, was) <= alpha:
        word = "faster"
    figures = f"{1 / statistics.median(was):6.3f}x eager -> {1 / statistics.median(now):6.3f}x"
    return Verdict(key, f"{figures}  time {change:+7.1%}  p {p:7.2g}  {word}".rstrip(), failed)


def chance(old: Sequence[float], new: Sequence[float]) -> float:
    """How often chance would rank `new` this high above `old` if both were drawn alike: the
    one-sided Mann-Whitney test. Equal samples have a p of 1."""
    if len({*old, *new}) == 1:
        return 1.0  # scipy gives NaN
    return float(mannwhitneyu(new, old, alternative="greater").pvalue)


def _about(run: Record) -> str:
    return f"{run['date'][:16]} {run['commit'][:9]}"


def _differences(old: Record, new: Record) -> str:
    """Versions that changed, for they may be the reason."""
    a, b = old["environment"], new["environment"]
    changed = [f"{k} {a.get(k)} -> {v}" for k, v in b.items() if a.get(k) != v]
    return f"\n  changed besides the commit: {', '.join(changed)}" if changed else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reports.compare", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, nargs="?", help="a record; default: this device's newest ones")
    add("--results", type=Path, default=record.RESULTS, help="folder of records")
    add("--device", help="a folder of --results; default: this machine's")
    args = parser.parse_args()
    device = args.device or record.slug(versions()["device"])
    try:
        records = record.load_all(args.results)
        chosen = [record.load(args.run)] if args.run else runs(records, device)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not chosen:
        print(f"nothing to compare: no record of {device} in {args.results}; make bench takes one")
    failures = 0
    for run in chosen:
        on = run["environment"]["device"]
        print(f"{run['bench']} {run['settings']} of {_about(run)} on {on}")
        last = baseline(run, records)
        if last is None:
            print("  nothing to compare with: the first record of these settings on this device")
            continue
        print(f"  against {_about(last)}{_differences(last, run)}")
        verdicts = compare(last, run)
        if not verdicts:
            print("  nothing to compare: no row has times and an eager row beside it")
        for verdict in verdicts:
            print(f"  {' '.join(verdict.key):<50} {verdict.text}")
        failures += sum(verdict.failed for verdict in verdicts)
    if failures:
        print(f"{failures} of fastgpt's rows are slower than at the last run")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
