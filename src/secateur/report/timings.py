"""How long a batch takes, by sentence length, batch size and runtime; other tables show only the last of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.report import format as fmt
from secateur.report.records import Timing
from secateur.report.statistics import Summary

MOST_ROWS = 40
NOTE = "Milliseconds per batch, and the speed-up over the dense model, timed in turns; means over seeds."


@dataclass(frozen=True)
class TimingTable:
    """Rows of cells: a setting, its ratio of MACs, then what was measured."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


def timing_table(summaries: Sequence[Summary]) -> TimingTable | None:
    """The dense model and every setting that is smaller; None where at most one batch was timed."""
    smaller = [s for s in summaries if s.timings and s.prunes != "weights" and not s.unpruned]
    if not smaller or len(smaller[0].timings) < 2:
        return None
    columns = smaller[0].timings
    alike = [s for s in smaller if list(map(_what, s.timings)) == list(map(_what, columns))]
    left_out = len(smaller) - len(alike[:MOST_ROWS])
    rows = [("dense", "", *(f"{fmt.significant(timing.dense_ms)}{fmt.THIN}ms" for timing in columns))]
    rows += [(s.name, fmt.times(s.macs_ratio), *map(_cell, s.timings)) for s in alike[:MOST_ROWS]]
    more = f" {fmt.several(left_out, 'more setting')} not shown." if left_out else ""
    return TimingTable(["setting", "fewer MACs", *(_head(timing, columns) for timing in columns)], rows, NOTE + more)


def _cell(timing: Timing) -> str:
    return f"{fmt.significant(timing.pruned_ms)}{fmt.THIN}ms, {fmt.times(timing.speedup)}"


def _what(timing: Timing) -> tuple[int | None, int, str]:
    return timing.length, timing.batch, timing.runtime


def _head(timing: Timing, all_of_them: Sequence[Timing]) -> str:
    """The batch size, and what else differs."""
    said = [f"batch {timing.batch}"]
    if timing.length is not None:
        said.append(f"{timing.length} tokens")
    if len({other.runtime for other in all_of_them}) > 1:
        said.append(timing.runtime)
    return ", ".join(said)
