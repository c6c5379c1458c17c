"""Pooling, reductions, and ops that run along a dimension."""

from __future__ import annotations

from secateur.coupling.labels import Labels
from secateur.coupling.rules.normalisation import open_norm
from secateur.coupling.rules.origins import carry_nothing
from secateur.coupling.rules.state import NotCovered, State, argument, rule
from secateur.coupling.tape import Node


@rule(
    *(f"{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for rank in (1, 2, 3)),
    *(f"max_pool{rank}d_with_indices" for rank in (1, 2, 3)),
    *(f"_adaptive_avg_pool{rank}d" for rank in (2, 3)),
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d")),
    *(f"upsample_{kind}" for kind in ("trilinear3d", "_nearest_exact1d", "_nearest_exact2d")),
    *(f"{kind}_pad{rank}d" for kind in ("reflection", "replication") for rank in (1, 2, 3)),
)
def spatial(state: State, node: Node) -> list[Labels]:
    """Positions are mixed, channels are not; zeros give zeros."""
    data, name = state.of(node.args[0]), node.name
    dims = next(rank for rank in (1, 2, 3) if f"{rank}d" in name)
    rank = len(data.shape)
    data = state.algebra.collapse(data, range(rank - dims, rank), "positions are pooled")
    return [Labels(state.shape(node, number), data.factors) for number in range(len(node.outputs))]


REDUCTIONS = (
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "var_mean",
    "prod",
    "argmax",
    "argmin",
    "aminmax",
    "std_mean",
    "median",
    "nanmedian",
    "logsumexp",
    "any",
    "all",
    "linalg_vector_norm",
)
_NEVER_ZERO = ("argmax", "argmin", "logsumexp")  # of zeros they are no zeros, or numbers of positions
_NORMS = ("linalg_vector_norm", "norm")


_STATISTICS = ("mean", "var", "std", "var_mean", "std_mean")


@rule(*REDUCTIONS)
def reduction(state: State, node: Node) -> list[Labels]:
    """A sum over dead zeros is free; every other reduction over channels needs them all."""
    data, kind = state.of(node.args[0]), node.name.removeprefix("aten.")
    rank = len(data.shape)
    given = argument(node, 2 if kind in _NORMS else 1, "dim")
    if isinstance(given, bool):
        raise NotCovered
    dims = list(range(rank)) if given is None or given == [] else [given] if isinstance(given, int) else list(given)
    dims = [dim % max(1, rank) for dim in dims]
    sums = kind == "sum" or (kind in _NORMS and _order(node) > 0)
    carry_nothing(state, node)
    if kind in _STATISTICS and len(dims) == 1 and data.covered(dims[0]) and open_norm(state, node, data, dims[0]):
        if kind != "mean":  # a variance of one number is none
            state.at_least_two.extend(factor.ids for factor in data.factors if factor.spans(dims[0]))
        data = Labels(data.shape, tuple(factor for factor in data.factors if not factor.spans(dims[0])))
    reduced = state.algebra.reduce(data, dims, sums=sums, why=f"reduced by {kind} over channels")
    results = []
    for number in range(len(node.outputs)):
        labels = state.algebra.reshape(reduced, state.shape(node, number))
        results.append(labels.with_zero(False) if kind in _NEVER_ZERO or number > 0 else labels)
    return results


def _order(node: Node) -> float:
    """The order of a norm."""
    order = argument(node, 1, "p" if node.name == "aten.norm" else "ord")
    order = 2 if order is None else order
    if not isinstance(order, (int, float)):
        raise NotCovered
    return order


@rule("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "topk", "roll")
def along_a_dimension(state: State, node: Node) -> list[Labels]:
    """Every position along the dimension takes part in, or moves along, the result."""
    data, kind = state.of(node.args[0]), node.name.removeprefix("aten.")
    rank = len(data.shape)
    position = 2 if kind in ("topk", "roll") else 1
    dims = argument(node, position, "dims" if kind == "roll" else "dim", [] if kind == "roll" else -1)
    dims = [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)] or list(range(rank))
    for dim in dims:
        data = state.algebra.collapse(data, [dim], f"{kind} runs along it")
    keeps_zero = kind in ("cumsum", "roll")
    factors = data.factors if keeps_zero else data.with_zero(False).factors
    return [Labels(state.shape(node, number), factors) for number in range(len(node.outputs))]
