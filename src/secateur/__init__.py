"""Secateur prunes PyTorch models, proves the smaller model right, and measures what that cost and gained."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.artifacts import load, save
    from secateur.coupling.groups import Graph, Group, Slot, trace
    from secateur.criteria.table import score
    from secateur.criteria.wrappers import ensemble, greedy, normalised
    from secateur.errors import SecateurError, VerificationError
    from secateur.evidence import Evidence, observe
    from secateur.exporting import export
    from secateur.hub import HubMixin
    from secateur.inputs import Inputs
    from secateur.language import perplexity
    from secateur.layerwise import prune_layerwise, prune_layerwise_
    from secateur.masking import Gradual, ln_structured, make_masks, threshold_masks
    from secateur.masks import Masks
    from secateur.measuring.counts import count
    from secateur.measuring.latency import measure
    from secateur.ordering import select_in_order
    from secateur.plans import Plan
    from secateur.pruning import Pruned, Step, prune, prune_steps
    from secateur.rebinding import rebind_optimizer_
    from secateur.recovery import distillation, equal_budget, from_scratch, lottery_tickets, rewound
    from secateur.regularising import GammaPenalty, GroupPenalty, WeightPenalty
    from secateur.repairing import repair
    from secateur.selection import select
    from secateur.shrinking import shrink, zero_channels
    from secateur.targets import Target
    from secateur.training.distilling import with_hidden_states
    from secateur.training.evaluating import evaluate
    from secateur.training.hooks import Snapshot
    from secateur.training.loop import fit
    from secateur.training.recipes import Recipe
    from secateur.verification import verify

# Names are imported when first used, so that `secateur --help` does not wait for torch.
_HOME = {
    "Evidence": "evidence",
    "GammaPenalty": "regularising",
    "Gradual": "masking",
    "Graph": "coupling.groups",
    "Group": "coupling.groups",
    "GroupPenalty": "regularising",
    "HubMixin": "hub",
    "Inputs": "inputs",
    "Masks": "masks",
    "Plan": "plans",
    "Pruned": "pruning",
    "Recipe": "training.recipes",
    "SecateurError": "errors",
    "Slot": "coupling.groups",
    "Snapshot": "training.hooks",
    "Step": "pruning",
    "Target": "targets",
    "VerificationError": "errors",
    "WeightPenalty": "regularising",
    "count": "measuring.counts",
    "distillation": "recovery",
    "ensemble": "criteria.wrappers",
    "equal_budget": "recovery",
    "evaluate": "training.evaluating",
    "export": "exporting",
    "fit": "training.loop",
    "from_scratch": "recovery",
    "greedy": "criteria.wrappers",
    "ln_structured": "masking",
    "load": "artifacts",
    "lottery_tickets": "recovery",
    "make_masks": "masking",
    "measure": "measuring.latency",
    "normalised": "criteria.wrappers",
    "observe": "evidence",
    "perplexity": "language",
    "prune": "pruning",
    "prune_layerwise": "layerwise",
    "prune_layerwise_": "layerwise",
    "prune_steps": "pruning",
    "rebind_optimizer_": "rebinding",
    "repair": "repairing",
    "rewound": "recovery",
    "save": "artifacts",
    "score": "criteria.table",
    "select": "selection",
    "select_in_order": "ordering",
    "shrink": "shrinking",
    "threshold_masks": "masking",
    "trace": "coupling.groups",
    "verify": "verification",
    "with_hidden_states": "training.distilling",
    "zero_channels": "shrinking",
}

__all__ = [
    "Evidence",
    "GammaPenalty",
    "Gradual",
    "Graph",
    "Group",
    "GroupPenalty",
    "HubMixin",
    "Inputs",
    "Masks",
    "Plan",
    "Pruned",
    "Recipe",
    "SecateurError",
    "Slot",
    "Snapshot",
    "Step",
    "Target",
    "VerificationError",
    "WeightPenalty",
    "count",
    "distillation",
    "ensemble",
    "equal_budget",
    "evaluate",
    "export",
    "fit",
    "from_scratch",
    "greedy",
    "ln_structured",
    "load",
    "lottery_tickets",
    "make_masks",
    "measure",
    "normalised",
    "observe",
    "perplexity",
    "prune",
    "prune_layerwise",
    "prune_layerwise_",
    "prune_steps",
    "rebind_optimizer_",
    "repair",
    "rewound",
    "save",
    "score",
    "select",
    "select_in_order",
    "shrink",
    "threshold_masks",
    "trace",
    "verify",
    "with_hidden_states",
    "zero_channels",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(importlib.import_module(f"secateur.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
