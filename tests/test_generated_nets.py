"""Laws over networks of images that hypothesis makes up; and what `select` promises about budgets, on such nets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import secateur as sc
from drawn_choices import SCOPES, Wish, chosen, costs_of_all_steps
from drawn_images import IMAGES
from drawn_laws import TOLERANCE, checked_nets
from drawn_nets import Drawn, nets
from drawn_oracle import distance, outputs, snapshot, weights, zeroed

NETS = 6  # per kind of block; `make fuzz` draws thousands
LONG = ("ghost", "odd", "reads sizes", "selective kernel")  # a third of the time of all
SOME = st.one_of([nets(kind) for kind in ("residual", "branches", "parts", "shuffle", "convolution")])


@pytest.mark.untraced
@pytest.mark.timeout(1200)  # simplifying a net that fails takes its time
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in LONG else k for k in IMAGES])
def test_every_law_holds_on_generated_nets(kind: str) -> None:
    checked_nets(kind, NETS).assert_meaningful(kind)


@settings(max_examples=10)
@given(SOME, st.floats(0.4, 0.95), st.sampled_from(["max_macs", "max_params"]), SCOPES)
def test_budgets_are_met_within_one_step(net: Drawn, fraction: float, name: str, scope: str) -> None:
    """One step fewer exceeds the budget: asking for one MAC or parameter less than the plan has left costs a step."""
    graph = sc.trace(net.model, net.batch(2))
    choice = chosen(net.model, graph, Wish(sc.Target(**{name: fraction}), scope))
    if choice is None or choice[1].is_identity:
        return
    scores, plan = choice
    whole, left = plan.macs if name == "max_macs" else plan.params
    costs = costs_of_all_steps(graph, scores, scope, name, whole)
    assert left == max(cost for cost in costs if cost <= int(fraction * whole))


@settings(max_examples=10)
@given(SOME, SCOPES)
def test_pruning_in_steps_composes_on_generated_nets(net: Drawn, scope: str) -> None:
    if not sc.trace(net.model, net.batch(2)).prunable:
        return
    before = snapshot(net.model)
    *_, last = sc.prune_steps(net.model, net.batch(2), sc.Target(sparsity=0.5), scope=scope, steps=2)
    assert weights(sc.shrink(net.model, last.total)) == weights(last.model)
    assert last.total.removed_channels <= 0.5 * last.total.channels[0]
    assert snapshot(net.model) == before


@settings(max_examples=10)
@given(SOME)
def test_the_reference_differs_from_the_dense_net(net: Drawn) -> None:
    graph = sc.trace(net.model, net.batch(2))
    choice = chosen(net.model, graph, Wish(sc.Target(sparsity=0.6)))
    if choice is not None and choice[1].cuts:
        gap = distance(outputs(net.model, net.batch(2)), outputs(zeroed(net.model, choice[1]), net.batch(2)))
        assert gap > TOLERANCE
        assert all(bool(torch.isfinite(y).all()) for y in outputs(net.model, net.batch(2)))
