"""The table of rules: ATen op name -> how labels pass through it.

A rule gets the propagation state and the recorded node, and returns the labels of the node's outputs. Most ops are one
call of `Algebra`. An op that is not in the table, or a form of it that its rule does not cover (NotCovered), locks what
it touches and is reported in `Graph.unknown`: the engine may be conservative, it may never be wrong.
"""

from __future__ import annotations

import torch

from secateur.coupling.rules import (  # they enter their rules
    attention,
    creation,
    indexing,
    normalisation,
    parametrised,
    parts,
    products,
    recurrent,
    reductions,
    shapes,
    weights,
    windows,
)
from secateur.coupling.rules.pointwise import POINTWISE, pointwise
from secateur.coupling.rules.state import RULES, Rule
from secateur.coupling.tape import Node

__all__ = [
    "attention",
    "creation",
    "indexing",
    "normalisation",
    "parametrised",
    "parts",
    "products",
    "recurrent",
    "reductions",
    "rule_for",
    "shapes",
    "weights",
    "windows",
]


def rule_for(node: Node) -> Rule | None:
    """The rule of an op; ops that torch itself tags as pointwise share one."""
    name = node.name.removeprefix("aten.")
    if node.name in RULES:
        return RULES[node.name]
    if node.name.startswith("aten.") and (name in POINTWISE or torch.Tag.pointwise in node.op.tags):
        return pointwise
    return None
