"""What a finished trial leaves: a record, and the curve of every training on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from secateur.errors import ArtifactError
from secateur.report.records import Record
from secateur.training import Epoch


class Point(NamedTuple):
    """One epoch of training."""

    stage: str  # "dense", "penalty", "tune 1", ...
    epoch: int  # from 1
    loss: float
    accuracy: float
    lr: float


@dataclass(frozen=True)
class Result:
    """What a finished trial leaves in the store."""

    record: Record
    curve: tuple[Point, ...]

    def to_json(self) -> str:
        """One line that `from_json` turns into an equal result."""
        return json.dumps({"record": asdict(self.record), "curve": self.curve}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Raises ArtifactError where the text is no result."""
        try:
            raw = json.loads(text)
            return cls(Record.from_json(json.dumps(raw["record"])), tuple(Point(*row) for row in raw["curve"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"no result of a trial: {error}.") from error


def points(stage: str, history: Sequence[Epoch]) -> list[Point]:
    """The epochs of one training as points of a curve."""
    return [Point(stage, epoch.number + 1, epoch.loss, epoch.accuracy, epoch.lr) for epoch in history]
