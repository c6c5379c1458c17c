"""Laws over networks of sequences that hypothesis makes up: attention, recurrence, experts, everything in between."""

from __future__ import annotations

import pytest

from drawn_laws import checked_nets
from drawn_sequences import SEQUENCES

NETS = 8  # per kind of block; `make fuzz` draws thousands
LONG = ("recurrent", "shared", "moved data", "gated", "experts")  # a third of the time of all


@pytest.mark.untraced
@pytest.mark.timeout(1200)  # simplifying a net that fails takes its time
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in LONG else k for k in SEQUENCES])
def test_every_law_holds_on_generated_nets(kind: str) -> None:
    checked_nets(kind, NETS).assert_meaningful(kind)
