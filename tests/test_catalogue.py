"""What `secateur criteria` lists: complete, true, and every name of it works."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.catalogue import Entry, catalogue
from secateur.collecting import COLLECTORS
from secateur.criteria.table import CRITERIA
from secateur.masking import WEIGHT_METHODS

ENTRIES = catalogue()
CHANNELS = (
    "random l1 l1_greedy l2 fpgm bn_scale slimming group_norm output_norm output_norm_greedy output_norm_pre thinet "
    "taylor taylor_fo activation_mean apoz activation_variance obd hessian lamp"
)
WEIGHTS = "random magnitude hybrid wanda sparsegpt obd snip synflow lamp ln_structured"


def test_nothing_is_missing() -> None:
    for prunes, names, table in (("channels", CHANNELS, CRITERIA), ("weights", WEIGHTS, WEIGHT_METHODS)):
        listed = [entry.name for entry in ENTRIES if entry.prunes == prunes]
        assert listed == sorted(names.split()) == sorted(table)


def named(entry: Entry) -> str:
    return f"{entry.prunes}-{entry.name}"


@pytest.mark.parametrize("entry", ENTRIES, ids=named)
def test_every_line_says_what_it_is_and_where_it_comes_from(entry: Entry) -> None:
    assert entry.meaning.endswith((".", ":")) or len(entry.meaning) > 20
    assert entry.source.endswith(".") or "arXiv" in entry.source or "Optimal Brain" in entry.source
    assert entry.needs in ("nothing", "data", "gradients", "training") and entry.cost


@pytest.mark.parametrize("entry", ENTRIES, ids=named)
def test_every_listed_name_works_and_needs_no_more_than_it_says(entry: Entry) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()
    data = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 3)]
    labelled = entry.needs == "gradients"
    given = data if labelled else [x for x, _ in data]
    if entry.prunes == "channels":
        evidence = None if entry.needs in ("nothing", "training") else given
        pruned = sc.prune(model, data[0][0], criterion=entry.name, sparsity=0.5, data=evidence)
        assert pruned.plan.channels == (14, 7)
    else:
        found = sc.make_masks(model, entry.name, 0.5, data=given)
        assert 0.4 < found.sparsity <= 0.5


def test_every_need_has_a_cost() -> None:
    from secateur.catalogue import COSTS

    assert set(COSTS) == set(COLLECTORS)
