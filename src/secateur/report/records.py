"""Record: what one trial found, as plain values. Files of records are JSON lines, written atomically."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from secateur.errors import ArtifactError
from secateur.files import write_bytes

Number = TypeVar("Number", int, float)


class Pair(NamedTuple, Generic[Number]):
    """A quantity of the dense model and of the pruned one."""

    before: Number
    after: Number

    @property
    def kept(self) -> float:
        """What remains, as a fraction of what was there."""
        return self.after / self.before

    @property
    def ratio(self) -> float:
        """How many times smaller the pruned model is."""
        return self.before / self.after


class LayerWidth(NamedTuple):
    """The output channels of one layer."""

    layer: str
    before: int
    after: int
    block: int = 1  # channels that go together: a head's share of a projection


class LayerWeights(NamedTuple):
    """The weights of one layer: how many the dense model has, and how many the evaluated one has that are not zero."""

    layer: str
    before: int
    left: int


class Timing(NamedTuple):
    """What one batch takes, dense and pruned model in turns."""

    batch: int
    dense_ms: float
    pruned_ms: float
    speedup: float  # median of dense/pruned over interleaved rounds
    noise: float  # distance of the quartiles of the pruned model's timings, over their median
    runtime: str = "eager"
    length: int | None = None  # tokens per sentence, of text


class Reference(NamedTuple):
    """One number of a published document, to stand beside ours."""

    model: str
    data: str
    method: str  # as our records call it; "" for a dense model
    sparsity: float
    stage: str  # "dense", "pruned", "finetuned"
    accuracy: float  # a fraction
    source: str  # the document
    note: str = ""


class Failure(NamedTuple):
    """A trial that ended with an error instead of a record."""

    key: str
    error: str


@dataclass(frozen=True)
class Record:
    """One trial: a trained model, pruned and fine-tuned. Accuracies are fractions in [0, 1], on test data.

    In a control that prunes nothing, "pruned" is the model before the last training.
    """

    key: str  # identifies the trial: the same settings give the same key
    model: str
    data: str
    criterion: str
    scope: str
    sparsity: float  # the fraction asked to go, of `target`
    seed: int
    accuracy_dense: float
    accuracy_pruned: float  # straight after pruning
    accuracy_finetuned: float
    params: Pair[int]
    macs: Pair[int]  # multiply-accumulates for one input
    latency_ms: Pair[float]  # medians for one batch
    speedup: float  # median of dense/pruned over interleaved rounds
    verified_difference: float | None  # shrunk against zeroed original, over the largest output; None: not shrunk
    widths: tuple[LayerWidth, ...]
    seconds: float  # wall clock of the whole trial
    accuracy_repaired: float | None = None  # after repair without gradients, before any fine-tuning
    latency_noise: float | None = None  # distance of the quartiles of the pruned model's timings, over their median
    validation_dense: float | None = None
    validation_finetuned: float | None = None
    train_dense: float | None = None
    train_finetuned: float | None = None
    method: str = ""  # what tables and charts call it; "": the criterion
    prunes: str = "channels"  # "channels", "weights" (masked, not removed: no speed-up), "nothing"
    target: str = "channels"  # what `sparsity` is a fraction of: "channels", "weights", "macs", "params"
    control: bool = False  # there to be compared with
    epochs: int | None = None  # of training after the dense model's, between and after prunings
    epochs_before: int = 0  # those of them before the last pruning, which `accuracy_pruned` profits from
    weights_left: float | None = None  # of the dense model's, recounted in the model that was evaluated
    layers: tuple[LayerWeights, ...] = ()
    timings: tuple[Timing, ...] = ()  # by length, batch size and runtime; `latency_ms` and `speedup` are the last's
    fingerprint: Mapping[str, Any] = field(default_factory=dict)  # versions, machine, data, settings

    def __post_init__(self) -> None:
        for name in ("accuracy_dense", "accuracy_pruned", "accuracy_repaired", "accuracy_finetuned", "sparsity"):
            value = getattr(self, name)
            if value is None and name == "accuracy_repaired":
                continue
            if not 0.0 <= value <= 1.0:
                raise ArtifactError(f"a record's {name} is a fraction in [0, 1], got {value!r} in trial {self.key!r}.")
        for name in ("params", "macs", "latency_ms"):
            if not all(math.isfinite(value) and value > 0 for value in getattr(self, name)):
                raise ArtifactError(f"a record's {name} is two positive numbers, got {getattr(self, name)!r}.")

    @property
    def name(self) -> str:
        """What tables and charts call the method."""
        return self.method or self.criterion

    @property
    def unpruned(self) -> bool:
        """Whether this is the control that was only fine-tuned."""
        return self.prunes == "nothing" and self.sparsity == 0

    @property
    def drop(self) -> float:
        """Accuracy lost to pruning after fine-tuning, against the same seed's dense model."""
        return self.accuracy_dense - self.accuracy_finetuned

    def to_json(self) -> str:
        """One line of JSON that `Record.from_json` turns into an equal record."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The record written by `to_json`; unknown fields are of a later version and are left out.

        Raises ArtifactError where the text is no record.
        """
        try:
            raw = dict(json.loads(text))
            known = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
            missing = [f.name for f in fields(cls) if f.name not in raw and _required(f)]
            if missing:
                raise ArtifactError(f"not a record: it lacks {', '.join(missing)}.")
            for name in ("params", "macs", "latency_ms"):
                if known.get(name) is not None:
                    known[name] = Pair(*known[name])
            for name, kind in (("widths", LayerWidth), ("layers", LayerWeights), ("timings", Timing)):
                known[name] = tuple(kind(*row) for row in known.get(name, ()))
            return cls(**known)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"not a record: {error}.") from error


def read_records(path: Path | str) -> list[Record]:
    """The records of a JSON-lines file, in order; [] where there is no file.

    A last line cut short (the machine went down while it was written) is left out. Raises ArtifactError naming any
    other line that is no record.
    """
    file = Path(path)
    if not file.exists():
        return []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{file} is not a file of records (JSON lines): {error}.") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(line))
        except ArtifactError as error:
            if number == len(lines):  # a whole line ends with a line feed, so this one was cut
                continue
            raise ArtifactError(f"{file}, line {number}: {error} Move the file away to start afresh.") from error
    return records


def write_records(path: Path | str, records: Iterable[Record]) -> None:
    """Write a JSON-lines file atomically. Raises OSError; the old file then survives."""
    write_bytes(path, "".join(record.to_json() + "\n" for record in records).encode())


def as_records(rows: Iterable[Record | Mapping[str, Any]]) -> list[Record]:
    """Records from records or plain dicts with the same fields."""
    return [row if isinstance(row, Record) else Record.from_json(json.dumps(dict(row))) for row in rows]


def studies(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records by (model, data): only within one of these are numbers compared."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.model, record.data), []).append(record)
    return found


def _required(column: Any) -> bool:
    return column.default is MISSING and column.default_factory is MISSING
