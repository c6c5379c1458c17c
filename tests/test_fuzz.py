"""The same laws over thousands of generated nets: `make fuzz`, which prints what it has seen.

The nets come in numbered portions; a portion always holds the same nets, so that one that failed can be run alone, and
a run that was stopped goes on where it was: `make fuzz FIRST=37 NETS=100` draws portion 37 and no other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest

from drawn_laws import checked_nets
from drawn_nets import KINDS

PORTION = 50
FIRST, NETS = int(os.environ.get("SECATEUR_FUZZ_FIRST", "0")), int(os.environ.get("SECATEUR_FUZZ_NETS", "0"))
NAMES = sorted(KINDS)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # simplifying a net that fails takes its time
@pytest.mark.skipif(NETS == 0, reason="`make fuzz` says how many nets")
@pytest.mark.parametrize("number", range(FIRST, FIRST + -(-NETS // PORTION)))
def test_every_law_holds_on_thousands_of_nets(number: int, record_property: Callable[[str, object], None]) -> None:
    kind = NAMES[number % len(NAMES)]
    tally = checked_nets(kind, PORTION, seed=number)
    record_property("generated nets", json.dumps(tally.values()))
    tally.assert_meaningful(kind)
