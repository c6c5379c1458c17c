"""Secateur prunes PyTorch models, proves the smaller model right, and measures what that cost and gained."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.artifacts import load, save
    from secateur.coupling.groups import Graph, Group, Slot, trace
    from secateur.criteria.table import score
    from secateur.errors import SecateurError, VerificationError
    from secateur.evidence import Evidence, observe
    from secateur.exporting import export
    from secateur.hub import HubMixin
    from secateur.inputs import Inputs
    from secateur.measuring.counts import count
    from secateur.measuring.latency import measure
    from secateur.plans import Plan
    from secateur.pruning import Pruned, Step, prune, prune_steps
    from secateur.rebinding import rebind_optimizer_
    from secateur.repairing import repair
    from secateur.selection import select
    from secateur.shrinking import shrink, zero_channels
    from secateur.targets import Target
    from secateur.training.evaluating import evaluate
    from secateur.training.loop import fit
    from secateur.training.recipes import Recipe
    from secateur.verification import verify

# Names are imported when first used, so that `secateur --help` does not wait for torch.
_HOME = {
    "Evidence": "evidence",
    "Graph": "coupling.groups",
    "HubMixin": "hub",
    "Group": "coupling.groups",
    "Inputs": "inputs",
    "Plan": "plans",
    "Pruned": "pruning",
    "Recipe": "training.recipes",
    "SecateurError": "errors",
    "Slot": "coupling.groups",
    "Step": "pruning",
    "Target": "targets",
    "VerificationError": "errors",
    "count": "measuring.counts",
    "evaluate": "training.evaluating",
    "export": "exporting",
    "fit": "training.loop",
    "load": "artifacts",
    "measure": "measuring.latency",
    "observe": "evidence",
    "prune": "pruning",
    "prune_steps": "pruning",
    "rebind_optimizer_": "rebinding",
    "repair": "repairing",
    "save": "artifacts",
    "score": "criteria.table",
    "select": "selection",
    "shrink": "shrinking",
    "trace": "coupling.groups",
    "verify": "verification",
    "zero_channels": "shrinking",
}

__all__ = [
    "Evidence",
    "Graph",
    "Group",
    "HubMixin",
    "Inputs",
    "Plan",
    "Pruned",
    "Recipe",
    "SecateurError",
    "Slot",
    "Step",
    "Target",
    "VerificationError",
    "count",
    "evaluate",
    "export",
    "fit",
    "load",
    "measure",
    "observe",
    "prune",
    "prune_steps",
    "rebind_optimizer_",
    "repair",
    "save",
    "score",
    "select",
    "shrink",
    "trace",
    "verify",
    "zero_channels",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(importlib.import_module(f"secateur.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
