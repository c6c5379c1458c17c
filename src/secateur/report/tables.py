"""The table of results, defined once: for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.report import format as fmt
from secateur.report.records import Record
from secateur.report.statistics import FEW_SEEDS, Summary

if TYPE_CHECKING:
    from rich.table import Table

Value = float | str


@dataclass(frozen=True)
class Column:
    """One column: what stands in its head, what a cell says, and what it sorts by."""

    head: str
    unit: str
    cell: Callable[[Summary], str]
    value: Callable[[Summary], Value]
    numeric: bool = True

    @property
    def title(self) -> str:
        """Head and unit on one line."""
        return f"{self.head} ({self.unit})" if self.unit else self.head


NOTHING = "-"


def _repaired(summary: Summary) -> str:
    return fmt.accuracy(summary.accuracy_repaired) if summary.accuracy_repaired else NOTHING


COLUMNS = (
    Column("criterion", "", lambda s: s.method, lambda s: s.method, numeric=False),
    Column("removed", "%", lambda s: f"{s.sparsity * 100:.0f}", lambda s: s.sparsity),
    Column("params", "", lambda s: fmt.count(s.params), lambda s: s.params),
    Column("MACs", "", lambda s: fmt.count(s.macs), lambda s: s.macs),
    Column("MACs kept", "%", lambda s: f"{s.macs_kept * 100:.0f}", lambda s: s.macs_kept),
    Column("dense", "%", lambda s: fmt.accuracy(s.accuracy_dense), lambda s: s.accuracy_dense.mean),
    Column("pruned", "%", lambda s: fmt.accuracy(s.accuracy_pruned), lambda s: s.accuracy_pruned.mean),
    Column("repaired", "%", _repaired, lambda s: s.accuracy_repaired.mean if s.accuracy_repaired else -1.0),
    Column("fine-tuned", "%", lambda s: fmt.accuracy(s.accuracy_finetuned), lambda s: s.accuracy_finetuned.mean),
    Column("latency", "ms", lambda s: fmt.significant(s.latency_ms), lambda s: s.latency_ms),
    Column("speed-up", "", lambda s: fmt.times(s.speedup.mean), lambda s: s.speedup.mean),
    Column(
        "verified difference",
        "",
        lambda s: fmt.difference(s.verified_difference),
        lambda s: s.verified_difference or 0.0,
    ),
)


@dataclass(frozen=True)
class TrialColumn:
    """The same for single trials."""

    head: str
    cell: Callable[[Record], str]
    value: Callable[[Record], Value]
    numeric: bool = True


TRIAL_COLUMNS = (
    TrialColumn("criterion", lambda r: r.name, lambda r: r.name, numeric=False),
    TrialColumn("removed %", lambda r: f"{r.sparsity * 100:.0f}", lambda r: r.sparsity),
    TrialColumn("seed", lambda r: str(r.seed), lambda r: r.seed),
    TrialColumn("dense %", lambda r: f"{r.accuracy_dense * 100:.2f}", lambda r: r.accuracy_dense),
    TrialColumn("pruned %", lambda r: f"{r.accuracy_pruned * 100:.2f}", lambda r: r.accuracy_pruned),
    TrialColumn(
        "repaired %",
        lambda r: NOTHING if r.accuracy_repaired is None else f"{r.accuracy_repaired * 100:.2f}",
        lambda r: -1.0 if r.accuracy_repaired is None else r.accuracy_repaired,
    ),
    TrialColumn("fine-tuned %", lambda r: f"{r.accuracy_finetuned * 100:.2f}", lambda r: r.accuracy_finetuned),
    TrialColumn("params", lambda r: f"{r.params.after:,}", lambda r: r.params.after),
    TrialColumn("MACs", lambda r: f"{r.macs.after:,}", lambda r: r.macs.after),
    TrialColumn("dense ms", lambda r: fmt.significant(r.latency_ms.before), lambda r: r.latency_ms.before),
    TrialColumn("pruned ms", lambda r: fmt.significant(r.latency_ms.after), lambda r: r.latency_ms.after),
    TrialColumn("speed-up", lambda r: fmt.times(r.speedup), lambda r: r.speedup),
    TrialColumn("verified", lambda r: fmt.difference(r.verified_difference), lambda r: r.verified_difference or 0.0),
    TrialColumn("seconds", lambda r: f"{r.seconds:.1f}", lambda r: r.seconds),
)


def spread_note(summaries: Sequence[Summary]) -> str:
    """What the ± of these summaries and their error bars mean."""
    seeds = {len(s.seeds) for s in summaries}
    interval = "95\N{NO-BREAK SPACE}% interval"  # never broken over two lines
    if seeds == {1}:
        return "One seed: no spread can be given."
    if min(seeds) >= FEW_SEEDS:
        return f"± and error bars: {interval} of the mean over seeds (Student's t)."
    if max(seeds) < FEW_SEEDS:
        return f"± and error bars: half the range over the two seeds, too few for a {interval}."
    return f"± and error bars: {interval} of the mean from three seeds on, below that the range over the seeds."


def markdown_table(summaries: Sequence[Summary]) -> str:
    """The results as a Markdown table, with a line about its ± below it; numbers are aligned right."""
    lines = [
        "| " + " | ".join(column.title for column in COLUMNS) + " |",
        "|" + "|".join("---:" if column.numeric else "---" for column in COLUMNS) + "|",
    ]
    lines += ["| " + " | ".join(_escaped(column.cell(row)) for column in COLUMNS) + " |" for row in summaries]
    return "\n".join([*lines, "", spread_note(summaries) if summaries else "No results."]) + "\n"


def terminal_table(summaries: Sequence[Summary], title: str) -> Table:
    """The results as a rich table; a rule separates the criteria."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    note = spread_note(summaries) if summaries else "No results."
    table = Table(
        title=escape(title),
        caption=note,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    for column in COLUMNS:
        head = f"{column.head}\n{column.unit}" if column.unit else column.head
        table.add_column(head.replace(" ", "\n", 1), justify="right" if column.numeric else "left", no_wrap=True)
    for row, following in zip(summaries, [*summaries[1:], None], strict=True):
        last = following is None or following.method != row.method
        table.add_row(*(escape(column.cell(row)) for column in COLUMNS), end_section=last)
    return table


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
