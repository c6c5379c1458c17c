"""Results in, something to show out: tables, charts and one self-contained HTML page. Reads records, never torch."""

from secateur.report.page import write_report
from secateur.report.records import Pair, Record, read_records, write_records
from secateur.report.statistics import Estimate, Summary, estimate, summarise
from secateur.report.tables import markdown_table, terminal_table

__all__ = [
    "Estimate",
    "Pair",
    "Record",
    "Summary",
    "estimate",
    "markdown_table",
    "read_records",
    "summarise",
    "terminal_table",
    "write_records",
    "write_report",
]
