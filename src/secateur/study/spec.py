"""The study file: strict TOML, checked to the last field before anything runs. `secateur study schema` prints this."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from secateur.errors import InputError, UnknownNameError
from secateur.training.recipes import Recipe

TEXTS = ("sst2",)  # data sets of sentences
Option = bool | int | float | str
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Table(BaseModel):
    """A table of the file: unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class Net(Table):
    """A network; a plain string is its name."""

    name: str = Field(
        description="one of Secateur's networks (`resnet20`), timm:NAME, torchvision:NAME, package.module:callable; "
        "for text hf:NAME or hf:FOLDER, also inside the data folder"
    )
    options: dict[str, Option] = Field({}, description="arguments of one of Secateur's networks, such as width")
    epochs: int | None = Field(None, ge=1, description="of its dense training, where others need more or fewer")
    calibration: int | None = Field(
        None, ge=1, description="samples for it, where wide layers need more to be repaired"
    )
    label: str = Field("", description="what the report calls it; by default its name and options")
    stands_for: str = Field("", description="the network of the reference numbers beside it; by default its label")

    @property
    def title(self) -> str:
        """What the report calls it."""
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return self.label or (f"{self.name} ({options})" if options else self.name)


class DataSet(Table):
    """A data set; a plain string is its name. The validation part is split off the training images by the seed."""

    name: str = Field(description="digits, cifar10, cifar100, imagefolder with options.folder, or sst2")
    options: dict[str, Option] = Field(
        {}, description="arguments of the data set: size and folder of an image folder, max_length of sentences"
    )
    validation: float = Field(0.1, gt=0, lt=1, description="fraction of the training images held out for validation")
    train_samples: int | None = Field(None, ge=1, description="use only so many training samples, drawn by the seed")

    @property
    def title(self) -> str:
        """What the report calls it."""
        return self.name if self.train_samples is None else f"{self.name}, {self.train_samples:,} training samples"


class Training(Table):
    """How models are trained; the last epoch is taken, so that nothing is selected."""

    epochs: int = Field(description="passes over the training images")
    batch_size: int = Field(128, ge=1, description="images per step")
    steps_per_epoch: int | None = Field(
        None, ge=1, description="end an epoch after so many steps; each draws its images anew"
    )
    lr: float = Field(0.1, description="the highest learning rate")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd or adamw")
    momentum: float = Field(0.9, description="of sgd")
    nesterov: bool = Field(True, description="of sgd")
    weight_decay: float = Field(5e-4, description="on every trained parameter")
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="of the learning rate")
    milestones: tuple[float, ...] = Field((), description="of step: epochs after which lr is multiplied by gamma")
    gamma: float = Field(0.1, description="of step")
    warmup_epochs: float = Field(0.0, description="over which lr rises from 0")
    label_smoothing: float = Field(0.0, description="of the cross-entropy")
    clip_norm: float | None = Field(None, description="limit of the norm of all gradients together")
    bf16: bool = Field(False, description="forward, loss and evaluation under bfloat16 autocast")
    channels_last: bool = Field(False, description="memory layout in training and evaluation; often faster")
    augment: bool = Field(True, description="crops and flips, as the data set allows")

    def recipe(self, seed: int, epochs: int | None = None) -> Recipe:
        """The same for `fit`, perhaps for fewer epochs: what is measured in epochs shrinks with them."""
        values = self.model_dump(exclude={"batch_size", "steps_per_epoch", "augment"})
        if epochs is not None and epochs != self.epochs:
            part = epochs / self.epochs
            values |= {"epochs": epochs, "warmup_epochs": self.warmup_epochs * part}
            values["milestones"] = tuple(milestone * part for milestone in self.milestones)
        return Recipe(**values, seed=seed)

    def __str__(self) -> str:
        short = "" if self.steps_per_epoch is None else f" of at most {self.steps_per_epoch} steps"
        kind = ", bfloat16" if self.bf16 else ""
        return f"{self.epochs} epochs{short}, {self.optimizer}, lr {self.lr:g}, batches of {self.batch_size}{kind}"

    @model_validator(mode="after")
    def _is_a_recipe(self) -> Training:
        self.recipe(0)
        return self


class Penalty(Table):
    """Training with a penalty before anything is pruned; its epochs count as fine-tuning."""

    kind: Literal["gamma", "group", "l1", "l2"] = Field(
        description="gamma: network slimming's; group: DepGraph's; l1, l2: of weights"
    )
    strength: float = Field(1e-4, gt=0, description="what multiplies the penalty")
    epochs: int = Field(ge=1, description="how long, with the recipe of fine-tuning")


class Distillation(Table):
    """Fine-tuning that also follows the dense model's answers (Hinton 2015)."""

    temperature: float = Field(4.0, gt=0, description="softens both answers")
    weight: float = Field(0.9, ge=0, le=1, description="of the teacher in the loss")
    hidden: float = Field(0.0, ge=0, description="of text: what multiplies the distance of hidden states (Jiao 2020)")


class Method(Table):
    """One way to prune. Everything that is not said is what `prune` or `make_masks` does by default."""

    criterion: str | tuple[str, ...] = Field(
        description="what is important, see `secateur criteria`; several: the mean of their ranks"
    )
    label: str = Field("", description="what the report calls it; by default made from what is said here")
    prunes: Literal["channels", "weights", "nothing"] = Field(
        "channels",
        description="channels are removed, weights are masked; nothing: the criterion is unpruned or smaller",
    )
    target: Literal["sparsity", "macs", "params"] = Field(
        "sparsity", description="what sparsities are fractions of: channels (or weights), MACs, or parameters removed"
    )
    of: str | tuple[str, ...] | None = Field(
        None, description="with target params: only the parameters of these modules count (patterns), such as *.encoder"
    )
    sparsities: tuple[Fraction, ...] | None = Field(None, description="for this method; by default the study's")
    scope: str | None = Field(None, description="what competes: layer, global, row, isomorphic")
    pattern: str | tuple[int, int] | None = Field(None, description='of weights: "2:4", or a block [4, 4]')
    schedule: str = Field("one_shot", description="one_shot, linear, geometric, cubic, stepwise, layer_by_layer")
    steps: int | None = Field(None, ge=1, description="prunings on the way, with training in between")
    fraction_per_step: float | None = Field(
        None, gt=0, lt=1, description="of geometric: what each pruning removes of what is left; steps follow from it"
    )
    epochs: int | None = Field(
        None, ge=0, description="of fine-tuning in all, shared among the steps; default tuning's"
    )
    epochs_per_step: int | None = Field(None, ge=0, description="instead of epochs: after every pruning so many")
    repair: bool | tuple[str, ...] | None = Field(
        None, description="steps of repair; true: least squares and BatchNorm; by default what the study says"
    )
    hold: Literal["step", "epoch"] = Field("step", description="when masks are set again while training")
    within: str | tuple[str, ...] | None = Field(None, description="of weights: only these layers (patterns)")
    ignore: tuple[str, ...] = Field((), description="layers that keep their outputs (patterns)")
    biases: bool = Field(False, description="of weights: biases too")
    propagate: bool = Field(False, description="of weights: each layer sees what the pruned ones before it give")
    round_to: int = Field(1, ge=1, description="of channels: widths that are multiples of it")
    keep_at_least: int = Field(1, ge=1, description="of channels: so many stay in every layer, lest one empties")
    prune_residual: bool = Field(False, description="of channels: widths under LayerNorm and RMSNorm, too")
    penalty: Penalty | None = Field(None, description="training with a penalty first")
    distillation: Distillation | None = Field(None, description="learn from the dense model while fine-tuning")
    rewind: Literal["none", "weights"] = Field(
        "none", description="weights: those that stay go back to where training began (lottery tickets)"
    )

    @property
    def title(self) -> str:
        """What the report calls it."""
        if self.label:
            return self.label
        criterion = self.criterion if isinstance(self.criterion, str) else " + ".join(self.criterion)
        said = [criterion, *filter(None, [self.scope, _pattern_word(self.pattern)])]
        if self.prunes == "weights":
            said.append("weights")
        if self.schedule != "one_shot":
            said.append(self.schedule.replace("_", " ") + (f" x{self.steps}" if self.steps else ""))
        said += [
            word
            for word, is_said in (("distilled", self.distillation), ("unrepaired", self.repair is False))
            if is_said
        ]
        return ", ".join(said)

    @model_validator(mode="after")
    def _exists(self) -> Method:
        from secateur.criteria.table import CRITERIA
        from secateur.masking import WEIGHT_METHODS
        from secateur.repairing import STEPS
        from secateur.schedules import NAMES
        from secateur.selection import SCOPES

        tables: dict[str, Collection[str]] = {
            "channels": CRITERIA,
            "weights": WEIGHT_METHODS,
            "nothing": ("unpruned", "smaller"),
        }
        names = (self.criterion,) if isinstance(self.criterion, str) else self.criterion
        for name in names:
            if name not in tables[self.prunes]:
                raise UnknownNameError(f"criterion for {self.prunes}", name, tables[self.prunes])
        if self.prunes != "channels" and len(names) > 1:
            raise InputError("several criteria together are for channels.")
        scopes = getattr(WEIGHT_METHODS[names[0]], "scopes", ()) if self.prunes == "weights" else SCOPES
        if self.scope is not None and self.scope not in scopes:
            raise UnknownNameError(f"scope for {names[0]}", self.scope, scopes)
        if self.schedule not in NAMES:
            raise UnknownNameError("schedule", self.schedule, NAMES)
        for step in self.repair if isinstance(self.repair, tuple) else ():
            if step not in STEPS:
                raise UnknownNameError("step of repair", step, STEPS)
        self._check_kind()
        return self

    def _check_kind(self) -> None:
        """Raise InputError about a field that is for the other kind of pruning."""
        given = {name for name, field in Method.model_fields.items() if getattr(self, name) != field.get_default()}
        foreign = {
            "channels": {"pattern", "within", "biases", "propagate", "hold", "rewind"},
            "weights": {"round_to", "keep_at_least", "prune_residual", "of"},
            "nothing": set(Method.model_fields)
            - {"criterion", "label", "prunes", "sparsities", "epochs", "target", "of"},
        }[self.prunes]
        wrong = sorted(given & foreign)
        if wrong:
            raise InputError(f"{wrong[0]} has no meaning where {self.prunes} are pruned.")
        kept, colon, of = self.pattern.partition(":") if isinstance(self.pattern, str) else ("1", ":", "2")
        if not (colon and kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of)):
            raise InputError(f"pattern keeps n of m, such as '2:4', with 0 < n < m; got {self.pattern!r}.")
        if self.of is not None and self.target != "params":
            raise InputError("of says which parameters count: it goes with target = 'params'.")
        if self.prunes == "weights" and self.target != "sparsity":
            raise InputError("weights are pruned to a sparsity: masks save no MACs. Leave out target.")
        if self.prunes == "weights" and self.schedule == "layer_by_layer":
            raise InputError("layer_by_layer is for channels.")
        if self.steps is not None and self.schedule == "one_shot":
            raise InputError(f"steps = {self.steps} needs a schedule that takes steps, such as linear.")
        if self.fraction_per_step is not None and (self.schedule != "geometric" or self.steps is not None):
            raise InputError("fraction_per_step goes with schedule = 'geometric', and without steps.")
        if self.epochs_per_step is not None and (self.epochs is not None or self.schedule == "layer_by_layer"):
            raise InputError("epochs_per_step stands instead of epochs, and not with layer_by_layer.")


class Controls(Table):
    """What every study has, so that its numbers mean something; each can be declined."""

    random: bool = Field(True, description="the same pruning at random")
    magnitude: bool = Field(True, description="the same pruning by size: l2 for channels, magnitude for weights")
    unpruned: bool = Field(True, description="the dense model, fine-tuned as long")
    smaller: bool | tuple[Fraction, ...] = Field(
        True,
        description="narrower dense networks of the same cost, trained from scratch as long; or at which sparsities",
    )


class Latency(Table):
    """How the time of one forward pass is measured: dense and pruned model in turns."""

    batches: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 64), min_length=1, description="batch sizes")
    length: Annotated[int, Field(ge=1)] | Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (
        Field(128, description="of text: tokens per sentence; of several the last one is that of MACs")
    )
    runtime: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "eager", description="eager, eager_channels_last, compiled or onnxruntime, or several"
    )
    threads: int = Field(1, ge=1, description="CPU threads")
    seconds: float = Field(0.3, gt=0, description="per model, runtime, length and batch size")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of sentences, in tokens."""
        return self.length if isinstance(self.length, tuple) else (self.length,)

    @property
    def runtimes(self) -> tuple[str, ...]:
        """By name."""
        return (self.runtime,) if isinstance(self.runtime, str) else self.runtime


class Reference(Table):
    """Published numbers to stand beside ours."""

    file: str = Field(description="CSV beside the study file: model,data,method,sparsity,stage,accuracy (in %),note")
    source: str = Field(description="the document they are from")
    notes: tuple[str, ...] = Field((), description="footnotes: known errors, what differs from its protocol")


class Study(Table):
    """models x data x methods x sparsities x seeds, with one recipe for training and one for fine-tuning."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100, description="identifies the study in a store")
    title: str = Field("", description="headline of the report")
    description: str = Field("", description="what is asked, in a sentence or two")
    models: tuple[Annotated[Net, BeforeValidator(_named)], ...] = Field(min_length=1, description="networks")
    data: tuple[Annotated[DataSet, BeforeValidator(_named)], ...] = Field(min_length=1, description="data sets")
    methods: tuple[Method, ...] = Field(min_length=1, description="ways to prune")
    sparsities: tuple[Fraction, ...] = Field(min_length=1, description="fractions to remove")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="of weights, batches and the validation split")
    training: Training = Field(description="of the dense models; each is trained once per seed and shared")
    tuning: Training = Field(description="of pruned models and controls, after pruning")
    calibration: int = Field(1024, ge=1, description="training samples for criteria and repair")
    repair: bool | tuple[str, ...] = Field(True, description="repair without gradients before fine-tuning")
    controls: Controls = Field(Controls(), description="what every study has unless declined")
    latency: Latency = Field(Latency(), description="how time is measured")
    reference: Reference | None = Field(None, description="published numbers to compare with")

    @model_validator(mode="after")
    def _makes_sense(self) -> Study:
        from secateur.data.sources import SOURCES
        from secateur.measuring.runtimes import RUNTIMES
        from secateur.nets import NETS

        for net in self.models:
            if ":" not in net.name and net.name not in NETS:
                raise UnknownNameError("network", net.name, NETS)
            if ":" in net.name and net.options:
                raise InputError(f"{net.name}: options are for Secateur's own networks.")
        for data in self.data:
            if data.name not in (*SOURCES, *TEXTS):
                raise UnknownNameError("data set", data.name, (*SOURCES, *TEXTS))
        taught = [method.title for method in self.methods if method.distillation and method.distillation.hidden]
        images = [data.name for data in self.data if data.name not in TEXTS]
        if taught and images:
            raise InputError(f"{taught[0]}: hidden states are those of text classifiers; {images[0]} are images.")
        for runtime in self.latency.runtimes:
            if runtime not in RUNTIMES:
                raise UnknownNameError("runtime", runtime, RUNTIMES)
        for what, found in (
            ("model", [net.title for net in self.models]),
            ("data set", [data.title for data in self.data]),
            ("method", [method.title for method in self.methods]),
            ("seed", list(map(str, self.seeds))),
            ("sparsity", list(map(str, self.sparsities))),
        ):
            twice = [name for name in found if found.count(name) > 1]
            if twice:
                raise InputError(f"{what} {twice[0]!r} is there twice: give each a label of its own, or leave one out.")
        return self


def read_study(path: Path | str, profile: str | None = None) -> Study:
    """The study in a file, at the scale of one of its profiles.

    Without `profile`, the file as it is, where it has no profiles; else "gpu" on a machine with one, and "cpu".
    Raises InputError that names every wrong field, of whichever profile, and what was probably meant; OSError where
    there is no such file.
    """
    found = read_profiles(path)
    if profile is None:
        return found[_default_profile(found)]
    if profile not in found or not profile:
        raise UnknownNameError(f"profile of {path}", profile, filter(None, found))
    return found[profile]


def read_profiles(path: Path | str) -> dict[str, Study]:
    """The study in a file at every scale that it has; under "" where it has no profiles."""
    file = Path(path)
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no TOML: {error}.") from error
    profiles = raw.pop("profiles", {})
    if not isinstance(profiles, dict) or not all(isinstance(part, dict) for part in profiles.values()):
        raise InputError(f"{file}: profiles are tables such as [profiles.cpu], of what differs at that scale.")
    whole = {name: _merged(raw, part) for name, part in profiles.items()} or {"": raw}
    return {name: parse(fields, f"{file}, profile {name}" if name else str(file)) for name, fields in whole.items()}


def parse(fields: Mapping[str, Any], where: str) -> Study:
    """A study from plain values. Raises InputError that names every wrong field."""
    try:
        return Study.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        problems = error.errors()
        inner = {problem["loc"][:place] for problem in problems for place in range(len(problem["loc"]))}
        # A list of which every item is wrong would also be called too short.
        lines = dict.fromkeys(_line(p) for p in problems if p["type"] != "too_short" or p["loc"] not in inner)
        raise InputError(f"{where}:\n" + "\n".join(f"  {line}" for line in lines)) from None
    except TypeError as error:
        raise InputError(f"{where}: {error}; a study holds no dates.") from error


def field_lines(table: type[Table] = Study, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of every field, table by table."""
    for name, field in table.model_fields.items():
        inner = _table_in(field.annotation)
        default = "required" if field.is_required() else "" if inner else json.dumps(field.default)
        many = "[]" if inner and "tuple" in str(field.annotation) else ""
        yield f"{prefix}{name}{many}", _type_word(field.annotation, inner), default, field.description or ""
        if inner:
            yield from field_lines(inner, f"{prefix}{name}{many}.")


def _merged(base: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """The base with tables merged key by key, and everything else replaced."""
    found = dict(base)
    for name, value in part.items():
        old = found.get(name)
        found[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found


def _default_profile(found: Mapping[str, Study]) -> str:
    import torch

    wanted = "gpu" if torch.cuda.is_available() else "cpu"
    return wanted if wanted in found else next(iter(found))


def _line(problem: Any) -> str:
    """One line about one wrong field."""
    location = [part for part in problem["loc"] if not _is_union_branch(part)]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if problem["type"] == "extra_forbidden":
        known = _known_at(location)
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{where}: missing; {_description_at(location)}"
    message = re.sub(r"^Value error, ", "", problem["msg"])
    return f"{where}: {message}" if where else message


def _is_union_branch(part: object) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("bool", "str", "int", "float"))


def _known_at(location: Sequence[Any]) -> list[str]:
    return sorted(_table_at(location).model_fields)


def _description_at(location: Sequence[Any]) -> str:
    return _table_at(location).model_fields[location[-1]].description or ""


def _table_at(location: Sequence[Any]) -> type[Table]:
    table: type[Table] = Study
    for part in location[:-1]:
        if isinstance(part, str) and part in table.model_fields:
            table = _table_in(table.model_fields[part].annotation) or table
    return table


def _table_in(annotation: Any) -> type[Table] | None:
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return annotation
    return next(filter(None, map(_table_in, typing.get_args(annotation))), None)


def _type_word(annotation: Any, inner: type[Table] | None) -> str:
    if inner:
        return "tables" if "tuple" in str(annotation) else "table"
    if typing.get_origin(annotation) is Annotated:
        return _type_word(typing.get_args(annotation)[0], None)
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is tuple:
        return f"list of {_type_word(typing.get_args(annotation)[0], None)}"
    arguments = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) is dict:
        return "table"
    return " | ".join(_type_word(part, None) for part in arguments) if arguments else annotation.__name__


def _pattern_word(pattern: str | tuple[int, int] | None) -> str:
    return "x".join(map(str, pattern)) if isinstance(pattern, tuple) else pattern or ""
