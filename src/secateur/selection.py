"""Scores + target + scope -> Plan: which channels go.

Removal is one sequence of steps. A step takes the lowest-scored channels that a group can lose at once (one, or enough
to stay at a multiple of `round_to`; in balanced groups, equally many of each). The scope only orders the steps: by how
much of the group is gone (`layer`, so that all layers shrink evenly), or by score (`global`). The target only says
where to stop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from torch import Tensor, float64

from secateur.coupling.groups import Graph, Slot
from secateur.criteria.table import check_scores
from secateur.errors import InputError, NothingToPruneError, TargetError, UnknownNameError
from secateur.plans import Cut, Edit, Plan, Width, human
from secateur.targets import Cost, Target, macs_of, params_of

SCOPES = ("global", "isomorphic", "layer")


@dataclass(frozen=True, eq=False)
class Block:
    """A group, or balanced groups that lose equally many channels each."""

    groups: tuple[int, ...]
    orders: tuple[npt.NDArray[np.int64], ...]  # per group: channels in the order in which they go
    scores: npt.NDArray[np.float64]  # of the j-th channel to go, ascending
    original: int  # channels per group in the model that the target is about
    sizes: tuple[int, ...]  # channels per group that each successive step removes
    weight: int  # how often one channel of every group counts

    @property
    def channels(self) -> int:
        """Channels per group now."""
        return len(self.scores)


@dataclass(frozen=True)
class Step:
    """The next channels of a block to go: `upto` of each of its groups are gone after it."""

    block: int
    upto: int
    size: int
    key: float


def select(
    graph: Graph,
    scores: Mapping[str, Tensor],
    target: Target,
    *,
    scope: str | None = None,
    round_to: int = 1,
    keep_at_least: int = 1,
    normalise: bool = True,
    dense: Graph | None = None,
) -> Plan:
    """Choose the channels to remove; see `Target` for how far.

    `scores`: per group name (channels,), higher means keep. `scope`: by default global where a budget is to be met, and
    layer for a sparsity. `layer`, every group loses the same fraction, rounded down; `global`, all channels compete,
    their scores first divided by their group's mean magnitude unless `normalise` is False (DepGraph, arXiv 2301.12900);
    `isomorphic`, the same among groups of equal structure (the same kinds of slots, whatever their names and widths),
    each such class losing the same fraction (Fang 2024, arXiv 2407.04616). `round_to`: widths that shrink end at a
    multiple of it (in a layer of several groups, each group's part). `keep_at_least`: channels that every group keeps.
    `dense`: the graph of the model that the target is about, where `graph` is of a model shrunk from it.

    Raises TargetError for a target that cannot be reached (naming the reachable limit), InputError for scores that do
    not fit, NothingToPruneError when every group is locked.
    """
    limits = (scope or default_scope(target), round_to, keep_at_least)
    kept = channels_to_keep(graph, scores, target, *limits, normalise=normalise, dense=dense or graph)
    return make_plan(graph, kept, macs_of(graph), params_of(graph))


def default_scope(target: Target) -> str:
    """What competes where the caller does not say: a budget is spent where it costs least (decision 0009)."""
    return "layer" if target.sparsity is not None else "global"


def channels_to_keep(
    graph: Graph,
    scores: Mapping[str, Tensor],
    target: Target,
    scope: str,
    round_to: int,
    keep_at_least: int,
    *,
    normalise: bool,
    dense: Graph,
) -> list[npt.NDArray[np.int64]]:
    """What `select` decides: per group of `graph` the channels that stay, ascending."""
    _check_options(dense, scope, round_to, keep_at_least)
    check_scores(graph, scores)
    blocks = _blocks(graph, dense, scores, round_to, keep_at_least, normalise and scope != "layer")
    if isinstance(target.sparsity, Mapping):
        gone = _until_patterns(graph, blocks, target.sparsity)
    elif target.sparsity is not None and scope == "layer":
        gone = [_rounded_down(block, target.sparsity) for block in blocks]
    elif target.sparsity is not None:
        gone = _until_sparsity(graph, dense, blocks, _ordered_steps(graph, blocks, scope), target.sparsity)
    else:
        full = [group.channels for group in dense.groups]
        goal = target.absolute(macs_of(dense)(full), params_of(dense, target.of)(full))
        costs = {"max_macs": macs_of(graph), "max_params": params_of(graph, target.of)}
        gone = _until_budget(graph, blocks, _ordered_steps(graph, blocks, scope), goal, costs)
    kept = [np.arange(group.channels) for group in graph.groups]
    for block, count in zip(blocks, gone, strict=True):
        for group, order in zip(block.groups, block.orders, strict=True):
            kept[group] = np.sort(order[count:])
    return kept


def _check_options(graph: Graph, scope: str, round_to: int, keep_at_least: int) -> None:
    if scope not in SCOPES:
        raise UnknownNameError("scope", scope, SCOPES)
    for name, value in (("round_to", round_to), ("keep_at_least", keep_at_least)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is a whole number of channels, at least 1; got {value!r}.")
    if not graph.prunable:
        reasons = "; ".join(f"{group.name}: {group.locked}" for group in graph.groups) or "no layer has channels"
        norms = ("normalised over", "reduced by mean", "reduced by var", "reduced by std")
        closed = any(part in (group.locked or "") for group in graph.groups for part in norms)
        opened = graph.open_norms or not closed
        hint = "" if opened else " prune_residual=True opens the widths under LayerNorm and RMSNorm."
        raise NothingToPruneError(f"nothing can be pruned in this model.{hint} {reasons}.")


def _blocks(
    graph: Graph, dense: Graph, scores: Mapping[str, Tensor], round_to: int, keep_at_least: int, normalise: bool
) -> list[Block]:
    numbers = {group.name: number for number, group in enumerate(graph.groups)}
    original = dict(zip(_identities(dense), (group.channels for group in dense.groups), strict=True))
    identities = dict(zip((group.name for group in graph.groups), _identities(graph), strict=True))
    fixed = _fixed_positions(graph)
    blocks = []
    for group in graph.prunable:
        names = graph.together(group.name)
        if group.name != names[0]:
            continue
        members = tuple(numbers[name] for name in names)
        values = [scores[name].detach().cpu().to(float64).numpy() for name in names]
        orders = tuple(np.argsort(value, kind="stable") for value in values)
        if normalise:
            values = [value / (np.abs(value).mean() or 1.0) for value in values]
        ranked = [value[order] for value, order in zip(values, orders, strict=True)]
        blocks.append(
            Block(
                groups=members,
                orders=orders,
                scores=np.mean(ranked, axis=0),
                original=original.get(identities[group.name], group.channels),
                sizes=_step_sizes(graph, members, fixed, round_to, keep_at_least),
                weight=sum(graph.groups[number].weight for number in members),
            )
        )
    return blocks


def _identities(graph: Graph) -> list[tuple[Hashable, int]]:
    """What a group and the same group of a model shrunk from it have in common: the dimensions it touches.

    Groups that touch the same ones are told apart by their order.
    """
    seen: Counter[Hashable] = Counter()
    found: list[tuple[Hashable, int]] = []
    for group in graph.groups:
        found.append((group.signature, seen[group.signature]))
        seen[group.signature] += 1
    return found


def _step_sizes(
    graph: Graph, members: Sequence[int], fixed: Mapping[tuple[str, int], int], round_to: int, keep_at_least: int
) -> tuple[int, ...]:
    """How many channels each step removes from every group of a block: widths end at multiples of `round_to`."""
    groups = [graph.groups[number] for number in members]
    floor = max(keep_at_least, *(group.least for group in groups))
    slots = [slot for group in groups for slot in group.outputs]
    lengths = [(slot.indices.shape[1], fixed.get((slot.tensor, slot.dim), 0)) for slot in slots]
    channels = groups[0].channels
    widths = np.arange(channels - 1, floor - 1, -1)
    for positions, others in set(lengths):
        widths = widths[(positions * widths + others) % round_to == 0]
    return tuple((-np.diff(widths, prepend=channels)).tolist())


def _fixed_positions(graph: Graph) -> Counter[tuple[str, int]]:
    """Per (tensor, dim) the positions that belong to locked groups."""
    fixed: Counter[tuple[str, int]] = Counter()
    for group in graph.groups:
        if group.locked is not None:
            for slot in group.slots:
                fixed[slot.tensor, slot.dim] += slot.indices.size
    return fixed


def _ordered_steps(graph: Graph, blocks: Sequence[Block], scope: str) -> list[Step]:
    steps = []
    for number, block in enumerate(blocks):
        before = block.original - block.channels  # gone in earlier prunings
        running = np.maximum.accumulate(_means(block))  # rounding must not reorder equal scores
        upto = 0
        for size, score in zip(block.sizes, running.tolist(), strict=True):
            upto += size
            key = (before + upto) / block.original if scope == "layer" else score
            steps.append(Step(number, upto, size, key))
    ordered = sorted(steps, key=lambda step: (step.key, step.block, step.upto))
    return _evenly_by_class(graph, blocks, ordered) if scope == "isomorphic" else ordered


def _evenly_by_class(graph: Graph, blocks: Sequence[Block], steps: Sequence[Step]) -> list[Step]:
    """The same steps, so that at any point every class of blocks has lost about the same fraction of its channels."""
    along = {(slot.tensor, slot.dim) for group in graph.groups for slot in group.slots}
    structures = [_structure(graph, block, along) for block in blocks]
    gone: Counter[Hashable] = Counter()
    whole: Counter[Hashable] = Counter()
    for structure, block in zip(structures, blocks, strict=True):
        whole[structure] += block.original * block.weight
        gone[structure] += (block.original - block.channels) * block.weight
    spread = []
    for step in steps:
        structure = structures[step.block]
        gone[structure] += step.size * blocks[step.block].weight
        spread.append(replace(step, key=gone[structure] / whole[structure]))
    return sorted(spread, key=lambda step: step.key)  # stable: inside a class the order stays


def _structure(graph: Graph, block: Block, along: Collection[tuple[str, int]]) -> Hashable:
    """What a block is made of, names and widths aside: per slot its role, its dimension and the tensor's kernel.

    A kernel is the tensor's shape behind its first two dimensions, without those that groups run `along`: their widths.
    """
    slots = [slot for number in block.groups for slot in graph.groups[number].slots]
    shapes = [list(enumerate(graph.shapes[slot.tensor])) for slot in slots]
    kernels = [
        tuple(size for dim, size in shape[2:] if (slot.tensor, dim) not in along)
        for slot, shape in zip(slots, shapes, strict=True)
    ]
    kinds = zip(slots, shapes, kernels, strict=True)
    return tuple(sorted((slot.role, slot.dim, len(shape), kernel) for slot, shape, kernel in kinds))


def _means(block: Block) -> npt.NDArray[np.float64]:
    """The mean score of the channels that each step removes."""
    if set(block.sizes) <= {1}:
        return block.scores[: len(block.sizes)]
    bounds = pairwise(np.cumsum([0, *block.sizes]).tolist())
    return np.array([block.scores[start:stop].mean() for start, stop in bounds])


def _until_patterns(graph: Graph, blocks: Sequence[Block], patterns: Mapping[str, float]) -> list[int]:
    """Per block the channels to remove for {layer pattern: fraction}; a layer that no pattern names keeps all."""
    unused = set(patterns)
    gone = []
    for block in blocks:
        layers = [layer for number in block.groups for layer in graph.groups[number].layers]
        hits = {pattern for pattern in patterns for layer in layers if fnmatchcase(layer, pattern)}
        unused -= hits
        fractions = {patterns[pattern] for pattern in hits}
        if len(fractions) > 1:
            raise TargetError(
                f"layers {', '.join(layers)} lose channels together, but sparsity= asks for {sorted(fractions)}."
            )
        gone.append(_rounded_down(block, fractions.pop() if fractions else 0.0))
    if unused:
        prunable = sorted({layer for group in graph.prunable for layer in group.layers})
        raise TargetError(
            f"sparsity= names {sorted(unused)}, which match no prunable layer. Prunable: {', '.join(prunable)}."
        )
    return gone


def _rounded_down(block: Block, fraction: float) -> int:
    """The most channels that whole steps remove without passing `fraction` of the original."""
    allowance = math.floor(fraction * block.original + 1e-9) - (block.original - block.channels)
    reachable = np.cumsum([0, *block.sizes])
    return int(reachable[np.searchsorted(reachable, max(allowance, 0), side="right") - 1])


def _until_sparsity(
    graph: Graph, dense: Graph, blocks: Sequence[Block], steps: Sequence[Step], sparsity: float
) -> list[int]:
    now = dict(zip(_identities(graph), (group.channels for group in graph.groups), strict=True))
    identities = dict(zip((group.name for group in dense.groups), _identities(dense), strict=True))
    before = sum(group.weight * group.channels for group in dense.prunable)
    # A group that is down to one channel is a group no more.
    after = sum(group.weight * now.get(identities[group.name], 1) for group in dense.prunable)
    left = math.floor(sparsity * before + 1e-9) - (before - after)
    gone = [0] * len(blocks)
    full: set[int] = set()
    for step in steps:
        cost = step.size * blocks[step.block].weight
        if cost > left:
            full.add(step.block)  # later steps of this block may not overtake this one
        if step.block not in full:
            gone[step.block] = step.upto
            left -= cost
    return gone


def _until_budget(
    graph: Graph, blocks: Sequence[Block], steps: Sequence[Step], goal: Target, costs: Mapping[str, Cost]
) -> list[int]:
    """The shortest run of steps that meets every budget: found by bisection, since each step only lowers the cost."""

    def gone_after(count: int) -> list[int]:
        gone = [0] * len(blocks)
        for step in steps[:count]:
            gone[step.block] = step.upto
        return gone

    def spent(count: int) -> dict[str, int]:
        kept = [group.channels for group in graph.groups]
        for block, removed in zip(blocks, gone_after(count), strict=True):
            for group in block.groups:
                kept[group] -= removed
        return {name: costs[name](kept) for name in goal.budgets}

    def met(count: int) -> bool:
        return all(cost <= goal.budgets[name] for name, cost in spent(count).items())

    if not met(len(steps)):
        least, dense = spent(len(steps)), spent(0)
        for name, cost in least.items():
            if cost > goal.budgets[name]:
                raise TargetError(
                    f"{name}={goal.budgets[name]:,} cannot be reached: with as little left as these options allow, "
                    f"{cost:,} remain ({human(cost)}, {cost / max(dense[name], 1):.4f} of the dense model)."
                )
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle + 1, high)
    return gone_after(low)


def make_plan(graph: Graph, kept: Sequence[npt.NDArray[np.int64]], macs: Cost, params: Cost) -> Plan:
    """The plan that keeps the given channels (ascending) of every group."""
    gone = [_all_but(channels, group.channels) for group, channels in zip(graph.groups, kept, strict=True)]
    cuts = _cuts(((n, slot) for n, g in enumerate(graph.groups) if len(gone[n]) for slot in g.slots), gone)
    counts, dense = [len(channels) for channels in kept], [group.channels for group in graph.groups]
    free = [(group, len(channels)) for group, channels in zip(graph.groups, kept, strict=True) if group.locked is None]
    return Plan(
        cuts=tuple(cuts),
        edits=tuple(_edits(graph, counts)),
        shapes=graph.shapes,
        widths=tuple(_widths(graph, cuts, counts)),
        channels=(sum(g.weight * g.channels for g, _ in free), sum(g.weight * count for g, count in free)),
        macs=(macs(dense), macs(counts)),
        params=(params(dense), params(counts)),
        groups=tuple(group.name for group, count in free if count < group.channels),
        replacements=tuple(c.replacement for c in graph.replacements if any(counts[g] < dense[g] for g in c.groups)),
        norms=tuple(_cuts(((n, slot) for n, slot in graph.norms if len(gone[n])), gone)),
    )


def _all_but(positions: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """The numbers in [0, size) that are not among `positions`, ascending."""
    others = np.ones(size, bool)
    others[positions] = False
    return np.flatnonzero(others)


def _cuts(slots: Iterable[tuple[int, Slot]], gone: Sequence[npt.NDArray[np.int64]]) -> list[Cut]:
    """What removing the channels `gone` (per group) takes from the dimensions that the (group, slot) pairs touch."""
    found: dict[tuple[str, int], list[tuple[int, Slot]]] = {}
    for group, slot in slots:
        found.setdefault((slot.tensor, slot.dim), []).append((group, slot))
    cuts = []
    for (tensor, dim), parts in found.items():
        removed = np.concatenate([slot.indices[gone[group]].ravel() for group, slot in parts])
        size = parts[0][1].size
        stay = _all_but(removed, size)
        cuts.append(Cut(tensor, dim, size, tuple(stay.tolist()), parts[0][1].fill))
    return cuts


def _edits(graph: Graph, kept: Sequence[int]) -> Iterator[Edit]:
    for attribute, form in graph.attributes.items():
        after = form.at(kept)
        if after != attribute.value:
            yield Edit(attribute.module, attribute.name, attribute.index, attribute.value, after)


def _widths(graph: Graph, cuts: Sequence[Cut], kept: Sequence[int]) -> Iterator[Width]:
    dense = [group.channels for group in graph.groups]
    after = {(cut.tensor, cut.dim): len(cut.kept) for cut in cuts}
    blocks: dict[tuple[str, int], set[int]] = {}
    for slot in (slot for group in graph.groups for slot in group.outputs):
        blocks.setdefault((slot.tensor, slot.dim), set()).add(slot.indices.shape[1])
    for producer in graph.producers:
        place = (producer.tensor, producer.dim)
        size, sizes = graph.shapes[producer.tensor][producer.dim], blocks.get(place, {1})
        before, now = size * producer.copies.at(dense), after.get(place, size) * producer.copies.at(kept)
        yield Width(producer.layer, before, now, sizes.pop() if len(sizes) == 1 else 1)
