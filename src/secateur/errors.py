"""The errors Secateur raises on purpose: one small tree, so that one `except SecateurError` catches them all."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """Base of every error that Secateur raises on purpose."""


class InputError(SecateurError, ValueError):
    """An argument is wrong: the message says what came, what was expected and what to do."""


class TargetError(InputError):
    """A target that cannot be meant (sparsity 30) or cannot be met (the message names the reachable limit)."""


class UnknownNameError(InputError):
    """A name that is in no table; the message suggests the nearest known one."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"no {kind} named {name!r}.{hint} Known: {', '.join(names)}.")


class ExampleInputsError(InputError):
    """The example inputs do not fit the model."""


class ModelError(SecateurError, TypeError):
    """A model that cannot be pruned in this form (wrapped, compiled, scripted, quantised); says how to unwrap it."""


class NothingToPruneError(SecateurError):
    """Every group is locked; the message lists why."""


class PlanMismatchError(SecateurError):
    """A plan or a checkpoint belongs to another architecture; names the first tensor that differs."""


class VerificationError(SecateurError):
    """The shrunk model does not compute what the zeroed original computes."""


class ArtifactError(SecateurError):
    """A saved file is missing, damaged, of another kind, or not trusted."""


class ExportError(SecateurError):
    """A model that cannot be exported, or whose exported form computes something else; says why."""


class DataError(SecateurError):
    """A data set is missing, empty or malformed."""


class CalibrationError(DataError):
    """Too little data for what is to be computed from it; the message says how much would do."""


class TrainingError(SecateurError):
    """Training cannot go on (the loss is not a number) or cannot resume (the checkpoint is of another run)."""


class StorageError(TrainingError):
    """A checkpoint cannot be written: the disk is full, or not there. The run can go on from the one before it."""
