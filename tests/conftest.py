"""What every test runs under: one thread, seeded generators, and how many networks hypothesis draws."""

import json
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("fast", max_examples=60, deadline=None, derandomize=True, print_blob=True)
settings.register_profile(
    "thorough", max_examples=1000, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile(os.environ.get("SECATEUR_HYPOTHESIS", "fast"))


@contextmanager
def untraced() -> Iterator[None]:
    """Coverage does not see what runs inside, which takes half as long without it; a debugger goes on seeing it."""
    tracer = sys.gettrace()
    if not type(tracer).__module__.startswith("coverage"):
        yield
        return
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Tests marked so run untraced. (The mark `no_cover` works in one process; those of pytest-xdist trace on.)"""
    marked = item.get_closest_marker("untraced") or item.get_closest_marker("browser")
    with untraced() if marked else nullcontext():
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the generated nets of `make fuzz` were, all processes together."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    called = [report for report in reports if getattr(report, "when", "") == "call"]
    properties = [pair for report in called for pair in report.user_properties]
    portions = [json.loads(value) for name, value in properties if name == "generated nets"]
    if portions:
        from drawn_laws import Tally

        terminalreporter.write_line(str(sum(map(Tally.of, portions), Tally())))
