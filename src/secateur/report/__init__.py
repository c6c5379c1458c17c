"""Results in, something to show out: tables, charts and one self-contained HTML page. Reads records, never torch."""

from secateur.report.comparing import (
    Difference,
    Duel,
    difference_markdown,
    difference_terminal,
    differences,
    duels,
    paired,
)
from secateur.report.figures import write_figures
from secateur.report.markdown import write_markdown
from secateur.report.page import write_report
from secateur.report.records import Failure, Pair, Record, Reference, read_records, write_records
from secateur.report.statistics import Estimate, Summary, estimate, summarise
from secateur.report.tables import markdown_table, terminal_table

__all__ = [
    "Difference",
    "Duel",
    "Estimate",
    "Failure",
    "Pair",
    "Record",
    "Reference",
    "Summary",
    "difference_markdown",
    "difference_terminal",
    "differences",
    "duels",
    "estimate",
    "markdown_table",
    "paired",
    "read_records",
    "summarise",
    "terminal_table",
    "write_figures",
    "write_markdown",
    "write_records",
    "write_report",
]
