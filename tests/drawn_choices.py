"""What must hold for what `select` chooses: targets, restrictions, balances."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc


@dataclass(frozen=True)
class Wish:
    """What to ask of a net."""

    target: sc.Target
    scope: str = "layer"
    round_to: int = 1
    keep_at_least: int = 1
    criterion: str = "l2"
    form: str = "live"
    residual: bool = False

    @property
    def traced(self) -> dict[str, Any]:
        """Options of `trace`."""
        return {"form": self.form, "prune_residual": self.residual}

    @property
    def selected(self) -> dict[str, Any]:
        """Options of `select`."""
        return {"scope": self.scope, "round_to": self.round_to, "keep_at_least": self.keep_at_least}


SCOPES = st.sampled_from(["layer", "global"])
WISHES = st.builds(
    Wish,
    st.one_of(
        st.builds(lambda s: sc.Target(sparsity=s), st.floats(0.2, 0.95)),
        st.builds(lambda f: sc.Target(max_macs=f), st.floats(0.3, 1)),
        st.builds(lambda f: sc.Target(max_params=f), st.floats(0.3, 1)),
    ),
    SCOPES,
    st.sampled_from([1, 1, 1, 2, 3]),
    st.sampled_from([1, 1, 2]),
    st.sampled_from(["l2", "l1", "bn_scale", "random"]),
    st.sampled_from(["live", "live", "graph"]),
    st.sampled_from([False, False, True]),
)


def chosen(model: nn.Module, graph: sc.Graph, wish: Wish) -> tuple[dict[str, Tensor], sc.Plan] | None:
    """Scores and plan; None where nothing can go, or the budget lies below what the options allow."""
    if not graph.prunable:
        return None
    scores = sc.score(graph, sc.observe(model, graph), wish.criterion)
    try:
        return scores, sc.select(graph, scores, wish.target, **wish.selected)
    except sc.SecateurError as error:
        assert "cannot be reached" in str(error), error
        return None


def check_choice(graph: sc.Graph, plan: sc.Plan, wish: Wish) -> None:
    """The target is met and not exceeded; what was to stay stays."""
    kept = kept_of(graph, plan)
    check_target(graph, plan, wish, kept)
    check_restrictions(graph, plan, wish, kept)


def kept_of(graph: sc.Graph, plan: sc.Plan) -> dict[str, int]:
    """Channels that every group keeps, read off its first slot."""
    stay = {(cut.tensor, cut.dim): set(cut.kept) for cut in plan.cuts}
    counts = {}
    for group in graph.groups:
        slot = group.slots[0]
        rows = stay.get((slot.tensor, slot.dim))
        counts[group.name] = sum(1 for row in slot.indices.tolist() if rows is None or set(row) <= rows)
    return counts


def check_target(graph: sc.Graph, plan: sc.Plan, wish: Wish, kept: Mapping[str, int]) -> None:
    target = wish.target
    if target.sparsity is not None:
        assert isinstance(target.sparsity, float)
        wanted = target.sparsity * plan.channels[0]
        assert plan.removed_channels <= wanted + 1e-6
        if wish.scope == "layer":
            for group in graph.prunable:
                assert group.channels - kept[group.name] <= target.sparsity * group.channels + 1e-6
        elif wish.keep_at_least == wish.round_to == 1 and min(kept[group.name] for group in graph.prunable) > 2:
            assert wanted - plan.removed_channels < step_sizes(graph, wish)
        return
    costs, limit = (plan.macs, target.max_macs) if target.max_macs is not None else (plan.params, target.max_params)
    assert limit is not None and costs[1] <= limit * costs[0]
    assert plan.is_identity or limit < 1


def step_sizes(graph: sc.Graph, wish: Wish) -> int:
    """More channels than any one step removes, each counted as often as its group counts."""
    by_name = {group.name: group for group in graph.groups}
    parts = [*graph.balances, *((group.name,) for group in graph.prunable)]
    return max(sum(by_name[name].weight for name in part) for part in parts) * max(1, wish.round_to)


def check_restrictions(graph: sc.Graph, plan: sc.Plan, wish: Wish, kept: Mapping[str, int]) -> None:
    widths = {(cut.tensor, cut.dim): len(cut.kept) for cut in plan.cuts}
    shared = Counter(place for group in graph.prunable for place in {(slot.tensor, slot.dim) for slot in group.outputs})
    for group in graph.groups:
        lost = group.channels - kept[group.name]
        assert group.locked is None or lost == 0
        assert kept[group.name] >= min(wish.keep_at_least, group.channels)
        for slot in group.outputs if lost else ():
            place = slot.tensor, slot.dim
            assert shared[place] > 1 or widths[place] % wish.round_to == 0
    for part in graph.balances:
        assert len({kept[name] for name in part}) == 1


def costs_of_all_steps(graph: sc.Graph, scores: dict[str, Tensor], scope: str, name: str, whole: int) -> list[int]:
    """The costs along the sequence of steps: each is asked for exactly, then one less, and so on."""
    found, budget = [], whole
    while True:
        try:
            plan = sc.select(graph, scores, sc.Target(**{name: budget}), scope=scope)
        except sc.SecateurError:
            return found
        found.append(plan.macs[1] if name == "max_macs" else plan.params[1])
        budget = found[-1] - 1
