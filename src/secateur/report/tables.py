"""The tables of results, defined once: for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.report import format as fmt
from secateur.report.records import Record
from secateur.report.statistics import FEW_SEEDS, Estimate, Summary

if TYPE_CHECKING:
    from rich.table import Table

Value = float | str
NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """One column: what stands in its head, what a cell says, and what it sorts by."""

    head: str
    unit: str
    cell: Callable[[Summary], str]
    value: Callable[[Summary], Value]
    numeric: bool = True
    always: bool = True  # or only where rows differ in it
    terminal: bool = True  # which has less room

    @property
    def title(self) -> str:
        """Head and unit on one line."""
        return f"{self.head} ({self.unit})" if self.unit else self.head


def _known(value: Estimate | None) -> str:
    return fmt.accuracy(value) if value else NOTHING


def _mean(value: Estimate | None) -> float:
    return value.mean if value else -1.0


COLUMNS = (
    Column("method", "", lambda s: s.method, lambda s: s.method, numeric=False),
    Column("scope", "", lambda s: s.scope or NOTHING, lambda s: s.scope, numeric=False, always=False, terminal=False),
    Column(
        "of",
        "",
        lambda s: NOTHING if s.unpruned else s.target,
        lambda s: s.target,
        numeric=False,
        always=False,
        terminal=False,
    ),
    Column("removed", "%", lambda s: fmt.share(s.sparsity), lambda s: s.sparsity),
    Column(
        "epochs",
        "",
        lambda s: NOTHING if s.epochs is None else str(s.epochs),
        lambda s: -1 if s.epochs is None else s.epochs,
        always=False,
        terminal=False,
    ),
    Column("params", "", lambda s: fmt.count(s.params), lambda s: s.params),
    Column(
        "weights left",
        "%",
        lambda s: NOTHING if s.weights_left is None else f"{s.weights_left * 100:.1f}",
        lambda s: -1.0 if s.weights_left is None else s.weights_left,
        always=False,
        terminal=False,
    ),
    Column("MACs", "", lambda s: fmt.count(s.macs), lambda s: s.macs),
    Column("MACs kept", "%", lambda s: f"{s.macs_kept * 100:.0f}", lambda s: s.macs_kept),
    Column("dense", "%", lambda s: fmt.accuracy(s.accuracy_dense), lambda s: s.accuracy_dense.mean),
    Column(
        "pruned",
        "%",
        lambda s: NOTHING if s.prunes == "nothing" else fmt.accuracy(s.accuracy_pruned),
        lambda s: -1.0 if s.prunes == "nothing" else s.accuracy_pruned.mean,
    ),
    Column("repaired", "%", lambda s: _known(s.accuracy_repaired), lambda s: _mean(s.accuracy_repaired), always=False),
    Column("fine-tuned", "%", lambda s: fmt.accuracy(s.accuracy_finetuned), lambda s: s.accuracy_finetuned.mean),
    Column(
        "training",
        "%",
        lambda s: _known(s.train_finetuned),
        lambda s: _mean(s.train_finetuned),
        always=False,
        terminal=False,
    ),
    Column("latency", "ms", lambda s: fmt.significant(s.latency_ms), lambda s: s.latency_ms),
    Column("speed-up", "", lambda s: fmt.times(s.speedup.mean), lambda s: s.speedup.mean),
    Column(
        "verified difference",
        "",
        lambda s: fmt.difference(s.verified_difference),
        lambda s: s.verified_difference or 0.0,
        always=False,
    ),
)


def shown_columns(summaries: Sequence[Summary], *, terminal: bool = False) -> tuple[Column, ...]:
    """The columns in which these settings have something to say."""
    return tuple(
        column
        for column in COLUMNS
        if (column.terminal or not terminal) and (column.always or _is_worth_it(column, summaries))
    )


def _is_worth_it(column: Column, summaries: Sequence[Summary]) -> bool:
    """Whether an optional column is shown: a scope where the method does not tell it, a number where one is known."""
    if column.head == "scope":
        return len({(s.method, s.scope) for s in summaries}) > len({s.method for s in summaries})
    pruned = [s for s in summaries if s.prunes != "nothing"] or summaries
    if column.head in ("of", "epochs"):
        return len({column.cell(s) for s in pruned}) > 1
    return any(column.cell(s) != NOTHING for s in summaries)


@dataclass(frozen=True)
class TrialColumn:
    """One column of the table of single trials. `kind` is how the page's script writes a value:

    text, count (thousands apart), fixed (as many decimals as `decimals` says), times, exponent.
    """

    head: str
    kind: str
    value: Callable[[Record], Value | None]
    decimals: int = 0
    always: bool = True


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 2)


TRIAL_COLUMNS = (
    TrialColumn("method", "text", lambda r: r.name),
    TrialColumn("scope", "text", lambda r: r.scope, always=False),
    TrialColumn("removed %", "count", lambda r: round(100 * r.sparsity, 2)),
    TrialColumn("of", "text", lambda r: r.target, always=False),
    TrialColumn("seed", "count", lambda r: r.seed),
    TrialColumn("epochs", "count", lambda r: r.epochs, always=False),
    TrialColumn("dense %", "fixed", lambda r: _percent(r.accuracy_dense), 2),
    TrialColumn("pruned %", "fixed", lambda r: None if r.prunes == "nothing" else _percent(r.accuracy_pruned), 2),
    TrialColumn("repaired %", "fixed", lambda r: _percent(r.accuracy_repaired), 2, always=False),
    TrialColumn("fine-tuned %", "fixed", lambda r: _percent(r.accuracy_finetuned), 2),
    TrialColumn("validation %", "fixed", lambda r: _percent(r.validation_finetuned), 2, always=False),
    TrialColumn("training %", "fixed", lambda r: _percent(r.train_finetuned), 2, always=False),
    TrialColumn("params", "count", lambda r: r.params.after),
    TrialColumn("weights left %", "fixed", lambda r: _percent(r.weights_left), 2, always=False),
    TrialColumn("MACs", "count", lambda r: r.macs.after),
    TrialColumn("dense ms", "fixed", lambda r: round(r.latency_ms.before, 3), 3),
    TrialColumn("pruned ms", "fixed", lambda r: round(r.latency_ms.after, 3), 3),
    TrialColumn("speed-up", "times", lambda r: round(r.speedup, 3)),
    TrialColumn("verified", "exponent", lambda r: _short(r.verified_difference), always=False),
    TrialColumn("seconds", "fixed", lambda r: round(r.seconds, 1), 1),
    TrialColumn("trial", "text", lambda r: r.key),
)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.1e}")


def trial_table(records: Sequence[Record]) -> dict[str, Any]:
    """The single trials as the page's script wants them: column by column, each text written once."""
    return {
        "rows": len(records),
        "columns": [
            _packed(column.head, column.kind, column.decimals, values)
            for column in TRIAL_COLUMNS
            for values in [[column.value(record) for record in records]]
            if column.always or len(set(values)) > 1 or (column.kind != "text" and values[0] is not None)
        ],
    }


def setting_table(summaries: Sequence[Summary], marks: Sequence[str]) -> dict[str, Any]:
    """The same for settings, where there are too many for rows of HTML; `marks` are the rows' classes."""
    columns = []
    for column in shown_columns(summaries):
        cells = [column.cell(s) for s in summaries]
        packed = _packed(column.title, "text", 0, cells)
        if column.numeric:
            packed |= {"kind": "said", "sorts": [_rounded(column.value(s)) for s in summaries]}
        columns.append(packed)
    return {"rows": len(summaries), "columns": columns, "marks": list(marks)}


def _rounded(value: Value) -> Value:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _packed(head: str, kind: str, decimals: int, values: Sequence[Value | None]) -> dict[str, Any]:
    found: dict[str, Any] = {"head": head, "kind": kind, "decimals": decimals}
    if kind != "text":
        return {**found, "values": list(values)}
    texts: dict[Value | None, int] = {}
    places = [texts.setdefault(value, len(texts)) for value in values]
    if len(texts) == len(values):
        return {**found, "texts": list(values)}
    return {**found, "texts": list(texts), "values": places}


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
    columns = shown_columns(summaries)
    lines = [
        "| " + " | ".join(column.title for column in columns) + " |",
        "|" + "|".join("---:" if column.numeric else "---" for column in columns) + "|",
    ]
    lines += ["| " + " | ".join(_escaped(column.cell(row)) for column in columns) + " |" for row in summaries]
    return "\n".join([*lines, "", spread_note(summaries) if summaries else "No results."]) + "\n"


def markdown_rows(heads: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """A Markdown table of plain cells; all but the first `text` columns are aligned right."""
    rule = "|" + "|".join("---" if place < text else "---:" for place in range(len(heads))) + "|"
    lines = ["| " + " | ".join(map(_escaped, heads)) + " |", rule]
    return "\n".join([*lines, *("| " + " | ".join(map(_escaped, row)) + " |" for row in rows)]) + "\n"


def plain_table(title: str, note: str) -> Table:
    """An empty rich table in the look of all of ours."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    return Table(
        title=escape(title),
        caption=escape(note),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )


def terminal_table(summaries: Sequence[Summary], title: str) -> Table:
    """The results as a rich table; a rule separates the methods."""
    from rich.markup import escape

    table = plain_table(title, spread_note(summaries) if summaries else "No results.")
    columns = shown_columns(summaries, terminal=True)
    for column in columns:
        head = f"{column.head}\n{column.unit}" if column.unit else column.head
        table.add_column(head.replace(" ", "\n", 1), justify="right" if column.numeric else "left", no_wrap=True)
    for row, following in zip(summaries, [*summaries[1:], None], strict=True):
        last = following is None or following.method != row.method
        table.add_row(*(escape(column.cell(row)) for column in columns), end_section=last)
    return table


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
