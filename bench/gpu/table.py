"""The session's results on one screen: LINES lines of COLUMNS columns.

A line per stage: how it ended, and its result where that fits in a line; training has a line per
variant. `!` before a variant: a test of its op failed in the GPU suite (of a model: any test), so
its time is in doubt.
"""

import math
from collections.abc import Callable
from typing import Any

from bench.gpu import results
from bench.gpu.stages import Stage
from bench.gpu.store import State

LINES, COLUMNS = 60, 100
MAX_FAILURES = 6
_SHORT = {"forward": "fwd", "backward": "bwd"}
Row = dict[str, Any]


def table(state: State, stages: tuple[Stage, ...], left_out: Callable[[Stage], str]) -> str:
    doubts = results.flags(state)
    device = _checks(state).get("device", {}).get("device")
    lines = _heading(state)
    below: list[tuple[str, bool]] = []  # a line; whether it may be left out
    for stage in stages:
        entry = state["stages"].get(stage.name)
        if entry is None:
            why = left_out(stage)
            below.append((f"{stage.name:27}{f'left out: {why}' if why else 'not run yet'}", False))
            continue
        line = _stage(stage.name, entry, doubts)
        if (other := entry.get("device")) != device:
            line = f"{line[:60]} (on {other})"
        below += [(line, False), *((row, True) for row in _detail(entry, doubts))]
    if (too_many := len(lines) + len(below) - LINES) > 0:  # never a stage's own line
        details = [i for i, (_, is_detail) in enumerate(below) if is_detail][-too_many - 1 :]
        below = [line for i, line in enumerate(below) if i not in details]
        below.append((f"{len(details)} more lines: see gpu.json", False))
    lines += [line for line, _ in below]
    return "\n".join(results.printable(line)[:COLUMNS].rstrip() for line in lines[:LINES])


def _heading(state: State) -> list[str]:
    checks = _checks(state)
    device, driver = checks.get("device", {}), checks.get("driver", {})
    of = [f"{name} {device[name]}" for name in ("torch", "triton", "python") if name in device]
    title = f"{device.get('device', 'device unknown')}, commit {str(device.get('commit', '?'))[:9]}"
    lines = [f"{title}, {', '.join(of)}"]
    if state["rehearsal"]:
        lines = ["REHEARSAL on toy sizes: these times measure nothing", *lines]
    smi = [f"{name} {driver[name]}" for name in ("driver_version", "clocks.sm", "temperature.gpu",
                                                 "power.draw") if name in driver]  # fmt: skip
    why = state["preflight"].get("why")
    took = _number(state["preflight"].get("seconds"), ".0f")
    lines.append(f"preflight {took} s: {f'STOP: {why}' if why else ', '.join(['ok', *smi])}")
    lines += [f"warning: {row['warning']}" for row in checks.values() if "warning" in row]
    calls = [
        f"{_number(call.get('seconds'), '.0f')} s {call.get('ended')}" for call in state["calls"]
    ]
    lines.append(f"calls: {'; '.join(calls[-3:])}" if calls else "")
    if state["left_out"]:
        lines.append(f"too large for the tar: {', '.join(state['left_out'])}")
    return lines


def _checks(state: State) -> dict[str, Row]:
    return {str(row.get("check")): row for row in state["preflight"].get("checks", [])}


def _stage(name: str, entry: dict[str, Any], doubts: dict[str, str]) -> str:
    result = entry.get("results", {})
    ended = str(entry.get("ended"))
    summary = _summary(result, doubts)
    if not entry.get("done") and not summary and result.get("last"):
        summary = result["last"][-1]
    if entry["tries"] > 1:
        ended += f" (try {entry['tries']})"
    parts = [ended, *([summary] if summary else []), *entry.get("notes", [])]
    return f"{name:27}{_number(entry.get('seconds'), '.0f'):>4} s {': '.join(parts)}"


def _summary(result: dict[str, Any], doubts: dict[str, str]) -> str:
    """A stage's result in a few words."""
    if "tests" in result:
        return ", ".join(f"{n} {how}" for how, n in result["tests"]["counts"].items())
    if "tuned" in result:
        chosen = result["tuned"].get("implementations", {})
        configs = result["tuned"].get("configs", {})
        return f"{len(chosen)} implementations, {len(configs)} configurations" if isinstance(
            chosen, dict) and isinstance(configs, dict) else "tuned.json"  # fmt: skip
    if "profile" in result:
        return "; ".join(" ".join(line.split()) for line in result["profile"])
    rows = result.get("rows", [])
    if rates := [row["teraflops_per_second"] for row in rows if "teraflops_per_second" in row]:
        rates = [rate for rate in rates if isinstance(rate, int | float)]
        if rates:
            return f"cuBLAS {min(rates):.4g} to {max(rates):.4g} TFLOP/s over {len(rates)} GEMMs"
    records = [record for record in result.get("records", []) if record.get("bench") == "ops"]
    if records:
        return _ops(_best(records)["rows"], doubts)
    return _ops(rows, doubts) if rows else ""


def _best(records: list[Row]) -> Row:
    """The record with most times, of several the newest: a second try may have measured less."""

    def key(record: Row) -> tuple[int, str]:
        return sum("problem" not in row for row in record["rows"]), str(record.get("date"))

    return max(records, key=key)


def _ops(rows: list[Row], doubts: dict[str, str]) -> str:
    """Per op and direction: fastgpt's time, and how many times as long the best other one takes."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row.get("microseconds"), int | float) and row["microseconds"] > 0:
            what = str(row.get("direction", row.get("op")))
            groups.setdefault(_SHORT.get(what, what), []).append(row)
    if "fwd" in groups:  # then "both" is their sum
        groups.pop("both", None)
    texts = []
    for what, of_one in groups.items():
        peers = [row for row in of_one if not results.is_fastgpts(row)]
        best = min(peers, key=lambda row: row["microseconds"], default=None)
        for row in [row for row in of_one if results.is_fastgpts(row)] or peers[:1]:
            flag = "!" if results.flagged(row, doubts) else ""
            name = "" if row.get("variant") == "fastgpt" else f"{row.get('variant')} "
            text = f"{flag}{what} {name}{row['microseconds']:.4g} us"
            if best is not None and best is not row:
                ratio = best["microseconds"] / row["microseconds"]
                text += f" ({ratio:.2f}x {best.get('variant')})"
            texts.append(text)
    texts += [f"{row.get('variant')}: {str(row['problem'])[:40]}" for row in rows
              if "problem" in row and results.is_fastgpts(row)]  # fmt: skip
    return ", ".join(texts)


def _detail(entry: dict[str, Any], doubts: dict[str, str]) -> list[str]:
    """The lines below a stage's own: failed tests, and the variants of training and of curves."""
    result = entry.get("results", {})
    bad = result.get("tests", {}).get("bad", [])
    lines = [f"  {row.get('outcome')}: {row['test']} (seed {row.get('seed')}) {row.get('why', '')}"
             for row in bad[:MAX_FAILURES]]  # fmt: skip
    if len(bad) > MAX_FAILURES:
        lines.append(f"  and {len(bad) - MAX_FAILURES} more in gpu.json")
    records = [r for r in result.get("records", []) if r.get("bench") in ("train", "curves")]
    for decoded in (r for r in result.get("records", []) if r.get("bench") == "decode"):
        batch = decoded.get("settings", {}).get("batch", 1)
        rows = [{**row, "variant": f"{row.get('variant')} x{batch}"} for row in decoded["rows"]]
        lines += [_variant(row, doubts) for row in rows]
    return lines + [_variant(row, doubts) for row in (_best(records)["rows"] if records else [])]


def _variant(row: Row, doubts: dict[str, str]) -> str:
    mark = "!" if results.flagged(row, doubts) else " "
    name = f" {mark}{row.get('variant')!s:22}"
    figures = ""
    if "tokens_per_second" in row:
        ms = row["ms"].get("median") if isinstance(row.get("ms"), dict) else None
        figures = (
            f"{_number(row['tokens_per_second'], ',.0f'):>10} tok/s"
            f"{_number(row.get('over_eager'), '.2f'):>6}x{_number(ms, '.2f'):>8} ms"
            f"{_number(row.get('peak_bytes'), '.1f', 1e-9):>6} GB"
            f"{_number(row.get('first_step_seconds'), '.1f'):>6} s first  "
        )
    elif "gap" in row:
        figures = f"final loss {_number(row.get('final_loss'), '.4f')}, gap "
        figures += f"{_number(row.get('of_a_seed'), '.3f')} of a seed's  "
    doubt = row.get("problem") or row.get("flag") or row.get("warning") or ""
    return f"{name}{figures}{doubt}"


def _number(value: Any, form: str, scale: float = 1.0) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "?" if value is not None else "-"
    return format(scale * value, form)
