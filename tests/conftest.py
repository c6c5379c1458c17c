"""What every test runs under: one thread, seeded generators, and how many networks hypothesis draws."""

import json
import os
import sys
from collections.abc import Generator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("fast", max_examples=60, deadline=None, derandomize=True, print_blob=True)
settings.register_profile(
    "thorough", max_examples=1000, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile(os.environ.get("SECATEUR_HYPOTHESIS", "fast"))


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Sweeps run untraced. (The mark `no_cover` does that in one process; those of pytest-xdist go on tracing.)"""
    tracer = sys.gettrace()
    if item.get_closest_marker("sweep"):
        sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the generated nets of `make fuzz` were, all processes together."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    called = [report for report in reports if getattr(report, "when", "") == "call"]
    properties = [pair for report in called for pair in report.user_properties]
    portions = [json.loads(value) for name, value in properties if name == "generated nets"]
    if portions:
        from drawn_laws import Tally

        terminalreporter.write_line(str(sum(map(Tally.of, portions), Tally())))
