"""Trials: the cells of a study's grid, controls included, each with a key that names all it depends on."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from secateur.schedules import LAYER_BY_LAYER, steps_of
from secateur.study.spec import DataSet, Latency, Method, Net, Study, Table, Training

MAGNITUDE = {"channels": "l2", "weights": "magnitude"}
BY_SIZE = {"channels": {"l1", "l2"}, "weights": {"magnitude"}}
DEFAULT_STEPS = 4  # prunings on the way, where a schedule but no number of them is given
_ROUNDING = 0.01  # of a pruning: fractions are given to four digits or so
_WORD = 48  # characters of a key's words: it is a file name, too
_OWN = ("epochs", "calibration")  # what a network may have instead of the study's
_LABELS = {"net": {"label", "stands_for"}, "method": {"label", "sparsities"}}


class Dense(Table):
    """A dense model to be trained: what decides its weights. Trials of the same one share it."""

    net: Net
    data: DataSet
    training: Training
    seed: int

    @property
    def key(self) -> str:
        """Equal settings, equal key; it is also a file name."""
        return _key([self.net.name, self.data.name, f"s{self.seed}"], self)


class Trial(Table):
    """One model, pruned by one method at one sparsity, fine-tuned and measured."""

    net: Net
    data: DataSet
    method: Method
    sparsity: float
    seed: int
    training: Training
    tuning: Training
    calibration: int
    latency: Latency
    control: bool = False

    @property
    def dense(self) -> Dense:
        """The dense model that it starts from."""
        return Dense(net=self.net, data=self.data, training=self.training, seed=self.seed)

    @property
    def key(self) -> str:
        """Equal settings, equal key, whatever the study and its labels are called; it is also a file name."""
        criterion = self.method.criterion
        word = criterion if isinstance(criterion, str) else "+".join(criterion)
        return _key([self.net.name, self.data.name, word, f"{self.sparsity:g}", f"s{self.seed}"], self)

    @property
    def steps(self) -> int | None:
        """Prunings on the way; None where the model decides (layer_by_layer)."""
        method = self.method
        if method.schedule == "one_shot" or not self.sparsity:
            return 1
        if method.fraction_per_step is not None:
            return max(1, math.ceil(math.log1p(-self.sparsity) / math.log1p(-method.fraction_per_step) - _ROUNDING))
        return method.steps or (None if method.schedule == LAYER_BY_LAYER else self._schedules_own_steps())

    @property
    def epochs(self) -> int:
        """Of training after the dense model's."""
        method = self.method
        first = method.penalty.epochs if method.penalty else 0
        if method.epochs_per_step is not None:
            return first + (self.steps or 1) * method.epochs_per_step
        return first + (self.tuning.epochs if method.epochs is None else method.epochs)

    def _schedules_own_steps(self) -> int:
        return steps_of(self.method.schedule, self.sparsity) or DEFAULT_STEPS

    def __str__(self) -> str:
        removed = f", {100 * self.sparsity:g} %" if self.sparsity else ""
        return f"{self.net.title} on {self.data.title}, {self.method.title}{removed}, seed {self.seed}"


def trials_of(study: Study) -> tuple[Trial, ...]:
    """The whole grid, seed by seed, so that every finished seed can be read on its own; no key is there twice."""
    methods = [(method, False) for method in study.methods] + [(method, True) for method in controls_of(study)]
    found: dict[str, Trial] = {}
    for seed in study.seeds:
        for net in study.models:
            for data in study.data:
                for method, control in methods:
                    for sparsity in _levels(method, study):
                        trial = Trial(
                            net=net.model_copy(update=dict.fromkeys(_OWN)),
                            data=data,
                            method=_resolved(method, study),
                            sparsity=sparsity,
                            seed=seed,
                            training=_training(net, study),
                            tuning=study.tuning,
                            calibration=net.calibration or study.calibration,
                            latency=study.latency,
                            control=control,
                        )
                        found.setdefault(trial.key, trial)
    return tuple(found.values())


def controls_of(study: Study) -> list[Method]:
    """The methods that a study has besides those it asks for, so that its numbers can be judged."""
    found, wanted = [], study.controls
    for kind in ("channels", "weights"):
        same = [method for method in study.methods if method.prunes == kind]
        asked = {method.criterion for method in same if isinstance(method.criterion, str)}
        if same and wanted.random and "random" not in asked:
            found.append(_as_control(study, same, "random"))
        if same and wanted.magnitude and not asked & BY_SIZE[kind]:
            found.append(_as_control(study, same, MAGNITUDE[kind]))
    if wanted.unpruned:
        found.append(Method(criterion="unpruned", prunes="nothing", label="unpruned"))
    if wanted.smaller:
        first = next((method for method in study.methods if method.prunes == "channels"), None)
        target = first.target if first else "params"  # zeros cost what the parameters that are left would
        levels = wanted.smaller if isinstance(wanted.smaller, tuple) else _all_levels(study.methods, study)
        smaller = Method(criterion="smaller", prunes="nothing", label="smaller", sparsities=levels)
        found.append(smaller.model_copy(update={"target": target, "of": first.of if first else None}))
    return found


def _as_control(study: Study, same: list[Method], criterion: str) -> Method:
    """The first method of that kind, with another criterion and nothing that helps it learn."""
    first = same[0]
    plain: dict[str, Any] = {"penalty": None, "distillation": None, "propagate": False, "label": ""}
    if first.penalty is not None and first.epochs_per_step is None:  # its epochs are spent on fine-tuning
        plain["epochs"] = (study.tuning.epochs if first.epochs is None else first.epochs) + first.penalty.epochs
    several = {level for method in same for level in method.sparsities or ()}
    own = tuple(sorted(several)) if all(method.sparsities for method in same) else None
    return first.model_copy(update={**plain, "criterion": criterion, "sparsities": own})


def _levels(method: Method, study: Study) -> tuple[float, ...]:
    if method.criterion == "unpruned":
        return (0.0,)
    return method.sparsities if method.sparsities is not None else study.sparsities


def _all_levels(methods: Iterable[Method], study: Study) -> tuple[float, ...]:
    return tuple(sorted({level for method in methods for level in _levels(method, study)}))


def _resolved(method: Method, study: Study) -> Method:
    """With what the study says where the method says nothing."""
    repair = study.repair if method.repair is None and method.prunes != "nothing" else method.repair
    return method.model_copy(update={"repair": repair, "sparsities": None})


def _training(net: Net, study: Study) -> Training:
    """Of a dense model: the study's, for as long as this network needs."""
    return study.training if net.epochs is None else study.training.model_copy(update={"epochs": net.epochs})


def _key(words: list[str], settings: Table) -> str:
    """Readable words and a digest of every setting that is not at its default, labels aside.

    Defaults are left out, so that a later version's new field leaves the keys of old trials as they are.
    """
    values = settings.model_dump(mode="json", exclude_defaults=True, exclude=_LABELS)
    values.pop("control", None)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]
    return "-".join([*(re.sub(r"[^A-Za-z0-9.+_]+", "_", word)[:_WORD] for word in words), digest])
