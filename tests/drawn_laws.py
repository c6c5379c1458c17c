"""What must hold for every net and every plan, and what a whole run must have seen to mean anything."""

from __future__ import annotations

import copy
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from drawn_choices import WISHES, Wish, check_choice, chosen
from drawn_nets import Drawn, nets
from drawn_oracle import distance, outputs, shifted, snapshot, weights, zeroed
from secateur.errors import NothingToPruneError

TOLERANCE = 1e-9  # relative to the largest output
ROUNDS = 3  # the first pruning, and those of what it left
LONGER = 6


@dataclass(frozen=True)
class Tally:
    """What the nets of a run were, so that a run that saw nothing fails."""

    nets: int = 0
    free: int = 0  # something could go
    cut: int = 0  # something went
    visible: int = 0  # and that changed the output
    shifted: int = 0  # one index of a cut could be moved
    noticed: int = 0  # and the comparison failed at least once
    graph_forms: int = 0  # a module had to be replaced by its graph form
    rounds: int = 0  # further prunings of what was left
    kinds: Counter[str] = field(default_factory=Counter)  # nets with such a block
    pruned: Counter[str] = field(default_factory=Counter)  # nets in which such a block lost something

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __str__(self) -> str:
        unseen = sorted(kind for kind in self.kinds if not self.pruned[kind])
        return (
            f"{self.nets:,} generated nets: {self.free:,} with something free, {self.cut:,} cut, {self.visible:,} of "
            f"them visibly, {self.graph_forms:,} with graph forms, {self.rounds:,} further rounds; shifted indices "
            f"noticed in {self.noticed:,} of {self.shifted:,}; kinds never pruned: {', '.join(unseen) or 'none'}"
        )

    @classmethod
    def of(cls, values: dict[str, Any]) -> Tally:
        """From the `values` of another."""
        return cls(**{name: Counter(value) if isinstance(value, dict) else value for name, value in values.items()})

    def values(self) -> dict[str, Any]:
        """Plain numbers and dicts, for JSON."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    def assert_meaningful(self, kind: str) -> None:
        """Most nets have something free; blocks of the kind were pruned; the oracle sees, and can fail."""
        assert self.free >= 0.8 * self.nets, self
        assert self.visible >= 0.9 * self.cut, self
        assert self.noticed >= 0.8 * self.shifted > 0, self
        assert self.pruned[kind] > 0, f"{kind}: pruned in none of {self.kinds[kind]} nets"


def checked_nets(kind: str, count: int, seed: int = 0) -> Tally:
    """Draw nets with a block of the kind and check every law on each; fails with the simplest net that breaks one."""
    found: list[Tally] = []

    @hypothesis.seed(zlib.crc32(f"{kind} {seed}".encode()))
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(nets(kind), WISHES, st.sampled_from([None, 0.3, 0.5, 0.8]))
    def check(net: Drawn, wish: Wish, sparsity: float | None) -> None:
        found.append(check_laws(net, wish))
        if sparsity is not None:
            check_prune(net, sparsity, wish)

    check()
    return sum(found, Tally())


# -- the laws --------------------------------------------------------------------------------------------------------


def check_laws(net: Drawn, wish: Wish) -> Tally:
    """Every law for one net; what it was."""
    model, batch = net.model, net.batch(2)
    untouched = snapshot(model)
    tally = Tally(nets=1, kinds=Counter(set(net.kinds)))
    graph = sc.trace(model, batch, **wish.traced)
    check_locks(graph)
    check_nothing_is_the_identity(net, graph)
    choice = chosen(model, graph, wish)
    if choice is not None:
        plan = choice[1]
        small = sc.shrink(model, plan)
        check_equality(net, plan, small)
        check_choice(graph, plan, wish)
        before = sc.count(model, batch)
        assert (plan.params[0], plan.macs[0]) == (before.params, before.macs)
        check_counts(net, plan, small)
        check_json(net, plan, small)
        tally = replace(seen(net, plan, small, tally), rounds=check_again_and_again(net, plan, small, wish))
    assert snapshot(model) == untouched, "the caller's model was changed"
    return replace(tally, free=int(bool(graph.prunable)))


def check_prune(net: Drawn, sparsity: float, wish: Wish) -> None:
    """`prune` itself is right and had to lock nothing afterwards; or says that there is nothing to do."""
    before = snapshot(net.model)
    try:
        pruned = sc.prune(net.model, net.batch(2), sparsity=sparsity, prune_residual=wish.residual)
    except NothingToPruneError:
        return
    assert snapshot(net.model) == before, "the caller's model was changed"
    check_equality(net, pruned.plan, pruned.model)
    assert pruned.summary.verified_difference < TOLERANCE
    assert not any("failed the verification" in why for why in pruned.summary.locked.values()), pruned.summary.locked


def check_locks(graph: sc.Graph) -> None:
    for group in graph.groups:
        assert group.locked is None or group.locked.strip(), f"{group.name} is locked without a reason"
    names = [group.name for group in graph.groups]
    assert len(set(names)) == len(names)


def check_nothing_is_the_identity(net: Drawn, graph: sc.Graph) -> None:
    if not graph.prunable:
        return
    scores = sc.score(graph, sc.observe(net.model, graph), "l2")
    plan = sc.select(graph, scores, sc.Target(sparsity=0.0))
    same = sc.shrink(net.model, plan)
    assert plan.is_identity and snapshot(same) == snapshot(net.model)
    for a, b in zip(outputs(net.model, net.batch(2)), outputs(same, net.batch(2)), strict=True):
        assert torch.equal(a, b)


def check_equality(net: Drawn, plan: sc.Plan, small: nn.Module) -> None:
    """Shrunk equals zeroed at two batch sizes; at another length too, or there is an error that says why not."""
    reference = zeroed(net.model, plan)
    for batch in (net.batch(2), net.batch(3)):
        off = distance(outputs(reference, batch), outputs(small, batch))
        assert off < TOLERANCE, f"shrunk is off by {off:.1e}"
    if net.takes in ("image", "both"):
        return
    longer = net.batch(2, LONGER)
    try:
        expected = outputs(reference, longer)
    except RuntimeError:
        return  # the net knows one length only
    try:
        off = distance(expected, outputs(small, longer))
    except sc.SecateurError:
        return
    assert off < TOLERANCE, f"shrunk is off by {off:.1e} at another length"


def check_counts(net: Drawn, plan: sc.Plan, small: nn.Module) -> None:
    after = sc.count(small, net.batch(2))
    assert plan.params[1] == after.params
    if "einsum" in repr(net.model) and any(len(cut.kept) == 1 for cut in plan.cuts):
        assert plan.macs[1] >= after.macs  # a sum over one channel is a multiplication to einsum, and counts nothing
    else:
        assert plan.macs[1] == after.macs


def check_json(net: Drawn, plan: sc.Plan, small: nn.Module) -> None:
    again = sc.Plan.from_json(plan.to_json())
    assert again == plan
    assert weights(sc.shrink(copy.deepcopy(net.model), again)) == weights(small)


def check_again_and_again(net: Drawn, first: sc.Plan, small: nn.Module, wish: Wish) -> int:
    """Prune what was pruned: every round is right, and all rounds together are one plan. How many rounds there were."""
    total, batch = first, net.batch(2)
    later = replace(wish, target=sc.Target(sparsity=0.35), criterion="random", round_to=1, keep_at_least=1)
    for number in range(1, ROUNDS):
        choice = chosen(small, sc.trace(small, batch, **wish.traced), later)
        if choice is None or choice[1].is_identity:
            return number - 1
        total, small = total.then(choice[1]), sc.shrink(small, choice[1])
        once = sc.shrink(net.model, sc.Plan.from_json(total.to_json()))
        assert weights(once) == weights(small), f"round {number}: the composed plan gives other weights"
        for a, b in zip(outputs(small, batch), outputs(once, batch), strict=True):
            assert torch.equal(a, b), f"round {number}: the composed plan gives another model"
        check_equality(net, total, small)
        check_counts(net, total, small)
        assert (total.params[0], total.macs[0]) == (first.params[0], first.macs[0])
    return ROUNDS - 1


# -- what a run has seen ---------------------------------------------------------------------------------------------


def seen(net: Drawn, plan: sc.Plan, small: nn.Module, tally: Tally) -> Tally:
    """The tally of one net, with what went and whether the oracle would have noticed a mistake."""
    if not plan.cuts:
        return tally
    batch = net.batch(2)
    expected = outputs(zeroed(net.model, plan), batch)
    wrong = [distance(expected, outputs(model, batch)) > TOLERANCE for model in one_index_off(net.model, plan)]
    return replace(
        tally,
        cut=1,
        visible=int(distance(outputs(net.model, batch), expected) > TOLERANCE),
        shifted=int(bool(wrong)),
        noticed=int(any(wrong)),
        graph_forms=int(any(r.program for r in plan.replacements)),
        pruned=Counter(set(kinds_pruned(net, plan, small))),
    )


def one_index_off(model: nn.Module, plan: sc.Plan) -> Iterator[nn.Module]:
    """The negative controls: shrunk with one position of one weight exchanged for its neighbour.

    Three, from the first layers to the last, because one may say nothing: a unit whose ReLU is off for all inputs is as
    good as any other, and a norm over two channels gives 1 and -1 whatever they are.
    """
    found = [(cut, shifted(cut.kept, cut.size)) for cut in plan.cuts if "weight" in cut.tensor]
    usable = [(cut, kept) for cut, kept in found if kept is not None]
    for cut, kept in [*usable[:1], *usable[len(usable) // 2 :][:1], *usable[-1:]]:
        cuts = tuple(replace(other, kept=kept) if other is cut else other for other in plan.cuts)
        yield sc.shrink(model, replace(plan, cuts=cuts))


def kinds_pruned(net: Drawn, plan: sc.Plan, small: nn.Module) -> Iterator[str]:
    """The kinds of the blocks that lost parameters; of those without parameters, the ones that give fewer channels."""
    cut = {tensor.split(".")[1] for tensor in (c.tensor for c in plan.cuts) if tensor.startswith("blocks.")}
    widths = [block_widths(model, net.batch(2)) for model in (net.model, small)]
    for number, kind in net.kinds_by_block.items():
        if str(number) in cut or widths[0][number] != widths[1][number]:
            yield kind


def block_widths(model: Any, batch: Any) -> dict[int, tuple[int, ...]]:
    """The shape of what every block gives."""
    found: dict[int, tuple[int, ...]] = {}
    handles = [
        block.register_forward_hook(lambda m, args, y, n=n: found.__setitem__(n, tuple(y.shape)))
        for n, block in enumerate(model.blocks)
    ]
    outputs(model, batch)
    for handle in handles:
        handle.remove()
    return found
