"""Products of vectors, and distances: sums over a dimension that dead zeros leave alone."""

from __future__ import annotations

from secateur.coupling.labels import Labels
from secateur.coupling.rules.state import NotCovered, State, argument, rule
from secateur.coupling.tape import Node

_SUMMED = "summed with entries that are not zero where channels are gone"


@rule("mv")
def matrix_vector(state: State, node: Node) -> list[Labels]:
    """(M, K) by (K,)."""
    return [_matrix_vector(state, state.of(node.args[0]), state.of(node.args[1]))]


@rule("addmv")
def matrix_vector_with_bias(state: State, node: Node) -> list[Labels]:
    """bias + (M, K) by (K,)."""
    product = _matrix_vector(state, state.of(node.args[1]), state.of(node.args[2]))
    return [state.algebra.add(product, state.of(node.args[0]))]


def _matrix_vector(state: State, matrix: Labels, vector: Labels) -> Labels:
    matrix, vector = _outermost(state, matrix, 1), _outermost(state, vector, 0)
    row = state.algebra.reshape(vector, (1, *vector.shape))
    return state.algebra.reshape(state.algebra.contract(matrix, row, 1), matrix.shape[:1])


def _outermost(state: State, labels: Labels, dim: int) -> Labels:
    """Where a flattened kernel brings several factors along a dimension, channels stay free and its taps are fixed."""
    along = [factor for factor in labels.factors if factor.span == (dim,)]
    for factor in along[1:]:
        state.algebra.atoms.lock(factor.ids, f"{state.algebra.place}: flattened with the channels")
    return state.algebra.simplify(labels)


@rule("dot", "vdot", "linalg_vecdot")
def dot(state: State, node: Node) -> list[Labels]:
    """The sum of the products of two vectors."""
    left, right = (_outermost(state, state.of(entry), len(state.of(entry).shape) - 1) for entry in node.args[:2])
    last = max(len(left.shape), len(right.shape)) - 1
    result = state.algebra.contract(left, right, last)
    return [state.algebra.reshape(result, state.shape(node))]


@rule("_trilinear")
def trilinear(state: State, node: Node) -> list[Labels]:
    """The product of three tensors, broadcast with new dimensions of length 1, summed over `sumdim`."""
    operands = [_expanded(state, node, position) for position in range(3)]
    state.role(node.args[1], 0, "output")
    for dim in (1, 2):
        state.role(node.args[1], dim, "input")
    algebra = state.algebra
    product = algebra.product(algebra.product(operands[0], operands[1], _SUMMED), operands[2], _SUMMED)
    summed = [int(dim) % len(product.shape) for dim in argument(node, 6, "sumdim")]
    result = algebra.reduce(product, summed, sums=True, why=_SUMMED)
    return [algebra.reshape(result, state.shape(node))]


def _expanded(state: State, node: Node, position: int) -> Labels:
    """An operand with its new dimensions of length 1."""
    shape = list(state.of(node.args[position]).shape)
    for dim in sorted(node.args[3 + position]):
        shape.insert(int(dim), 1)
    return state.algebra.reshape(state.of(node.args[position]), shape)


@rule("_cdist_forward", "_euclidean_dist")
def distances(state: State, node: Node) -> list[Labels]:
    """(..., P, K) and (..., R, K) -> (..., P, R): zero minus zero adds nothing to any norm of a difference."""
    left, right = state.of(node.args[0]), state.of(node.args[1])
    if len(left.shape) != len(right.shape):
        raise NotCovered
    rank, algebra = len(left.shape), state.algebra
    rows = algebra.reshape(left, (*left.shape[:-1], 1, left.shape[-1]))
    columns = algebra.reshape(right, (*right.shape[:-2], 1, *right.shape[-2:]))
    difference = algebra.add(rows, columns, "compared with a tensor of fixed size")
    result = algebra.reduce(difference, [rank], sums=True, why=_SUMMED)
    return [algebra.reshape(result.with_zero(False), state.shape(node))]
