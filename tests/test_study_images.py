"""A study on a folder of images, as ImageNet comes: class folders inside the data folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sqlalchemy")
pytest.importorskip("datasets")

from secateur.errors import DataError
from secateur.study.dense import Workplace
from secateur.study.run import run_trial
from secateur.study.spec import parse
from secateur.study.trials import Trial, trials_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Two classes: red and blue."""
    from PIL import Image

    root = tmp_path_factory.mktemp("folder")
    generator = torch.Generator().manual_seed(0)
    for part, number in (("train", 60), ("val", 20)):
        for label, name in enumerate(("red", "blue")):
            folder = root / "pictures" / part / name
            folder.mkdir(parents=True)
            for count in range(number):
                pixels = torch.randint(100, (36, 44, 3), generator=generator, dtype=torch.uint8)
                pixels[..., 2 * label] += 120
                Image.fromarray(pixels.numpy()).save(folder / f"{count}.png")
    return Workplace(root / "runs", data_dir=root, cache_dir=root / "cache")


def trial(**options: Any) -> Trial:
    recipe = {"batch_size": 32, "lr": 0.05}
    fields = {
        "name": "pictures",
        "models": [{"name": "resnet20", "options": {"width": 4}}],
        "data": [{"name": "imagefolder", "options": {"folder": "pictures", "size": 32, **options}}],
        "sparsities": [0.4],
        "seeds": [0],
        "calibration": 64,
        "training": {"epochs": 6, **recipe},
        "tuning": {"epochs": 1, **recipe},
        "latency": {"batches": [1], "seconds": 0.001},
        "methods": [{"criterion": "l1", "schedule": "layer_by_layer"}],
        "controls": {"random": False, "magnitude": False, "unpruned": False, "smaller": False},
    }
    (only,) = trials_of(parse(fields, "test"))
    return only


def test_a_folder_of_images_is_learned_and_pruned_layer_by_layer(place: Workplace) -> None:
    record = run_trial(trial(), place).record
    assert (record.data, record.fingerprint["data"]["test"]) == ("imagefolder", 40)
    assert record.accuracy_dense > 0.8 and record.accuracy_finetuned > 0.7
    assert record.macs.after < 0.7 * record.macs.before and record.verified_difference < 1e-9
    assert record.epochs == 1


@pytest.mark.parametrize(("folder", "said"), [("../elsewhere", "inside"), ("nothing", "no folder")])
def test_a_folder_elsewhere_or_nowhere_is_refused(place: Workplace, folder: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        run_trial(trial(folder=folder), place)
    assert not Path("elsewhere").exists()
