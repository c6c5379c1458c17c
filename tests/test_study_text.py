"""A study of text classifiers: sentences instead of images, everything else as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("sqlalchemy")
pytest.importorskip("datasets")

from pretrained_for_tests import library
from secateur.data.text import wordpiece
from secateur.errors import InputError
from secateur.study.dense import Workplace
from secateur.study.run import run_trial
from secateur.study.spec import parse
from secateur.study.tasks import task_of
from secateur.study.trials import Trial, trials_of

GOOD, BAD = ("fine", "great", "moving", "funny"), ("dull", "awful", "boring", "flat")
FILLERS = ("a", "film", "the", "plot", "acting", "is", "truly", "story", "and", "with")


def phrases(number: int, seed: int) -> dict[str, list[Any]]:
    """Sentences whose one strong word says what they are."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (number,), generator=generator).tolist()
    sentences = []
    for label in labels:
        words = [FILLERS[i] for i in torch.randint(len(FILLERS), (5,), generator=generator).tolist()]
        words[int(torch.randint(5, (1,), generator=generator))] = (BAD, GOOD)[label][
            int(torch.randint(4, (1,), generator=generator))
        ]
        sentences.append(" ".join(words))
    return {"sentence": sentences, "label": labels}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A folder with data and a classifier as such folders look."""
    t = library()
    import pyarrow
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("text")
    (root / "sst2").mkdir()
    for part, number, seed in (("train", 400, 0), ("validation", 100, 1)):
        pyarrow.parquet.write_table(pyarrow.table(phrases(number, seed)), root / "sst2" / f"{part}-00000.parquet")
    tokenizer = wordpiece([*GOOD, *BAD, *FILLERS] * 3, 200)
    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32,
    )  # fmt: skip
    t.BertForSequenceClassification(config).save_pretrained(root / "classifier")
    tokenizer.save_pretrained(root / "classifier")
    return Workplace(root / "runs", data_dir=root)


def trials(place: Workplace, **changes: Any) -> list[Trial]:
    assert place.data_dir is not None
    recipe = {"batch_size": 16, "lr": 2e-3, "optimizer": "adamw"}
    fields: dict[str, Any] = {
        "name": "text",
        "models": [{"name": "hf:classifier", "label": "BERT"}],  # a folder inside that of the data
        "data": [{"name": "sst2", "options": {"max_length": 16}}],
        "sparsities": [0.5],
        "seeds": [0],
        "calibration": 64,
        "training": {"epochs": 4, **recipe},
        "tuning": {"epochs": 1, **recipe},
        "latency": {"batches": [1, 2], "length": [4, 8], "seconds": 0.001},
        "methods": [
            {"criterion": "taylor_fo", "target": "macs"},
            {
                "criterion": "l1",
                "target": "params",
                "of": "bert.encoder",
                "distillation": {"temperature": 2.0, "weight": 0.5, "hidden": 1.0},
            },
            {"criterion": "wanda", "prunes": "weights"},
        ],
        "controls": {"random": False, "magnitude": False, "smaller": False},
    }
    return list(trials_of(parse({**fields, **changes}, "test")))


def test_heads_and_units_go_weights_are_masked_and_the_dense_model_is_shared(place: Workplace) -> None:
    taylor, l1, wanda, unpruned = (run_trial(trial, place).record for trial in trials(place))
    assert {record.accuracy_dense for record in (taylor, l1, wanda, unpruned)} == {taylor.accuracy_dense}
    assert taylor.accuracy_dense > 0.9
    assert taylor.macs.after <= 0.5 * taylor.macs.before and taylor.verified_difference < 1e-9
    encoder = 4 * (32 * 32 + 32) + (2 * 32 * 48 + 48 + 32) + 2 * 64  # attention, feed-forward, norms
    removed = l1.params.before - l1.params.after  # of the encoder only, half of which has to go
    assert 0.5 * encoder <= removed < 0.7 * encoder and l1.accuracy_repaired is not None
    assert wanda.params.after == wanda.params.before and wanda.weights_left == pytest.approx(0.5, abs=0.02)
    for record in (taylor, l1, wanda, unpruned):
        assert record.fingerprint["data"]["train"] == 360 and record.fingerprint["data"]["test"] == 100
        assert [(timing.length, timing.batch) for timing in record.timings] == [(4, 1), (4, 2), (8, 1), (8, 2)]
        assert record.accuracy_finetuned > 0.8
    assert len(list((place.folder / "dense").glob("*.safetensors"))) == 1


def test_the_data_belongs_to_the_tokenizer_and_the_split_to_the_seed(place: Workplace) -> None:
    net, data = trials(place)[0].net, trials(place)[0].data
    one, other, again = (task_of(net, data, seed, place.data_dir, None) for seed in (0, 1, 0))
    assert one.digest == again.digest != other.digest
    batch = next(iter(one.part("test")))
    assert batch["input_ids"].shape[0] == batch["labels"].shape[0] == 100
    example = one.example(3, 8)
    assert example["input_ids"].shape == (3, 8) and "labels" not in example
    first, second = one.calibration(64, 0)[0], one.calibration(64, 0)[0]
    assert torch.equal(first["input_ids"], second["input_ids"])


def test_what_does_not_go_together_is_refused(place: Workplace) -> None:
    net, data = trials(place)[0].net, trials(place)[0].data
    images = data.model_copy(update={"name": "digits", "options": {}})
    with pytest.raises(InputError, match="reads text"):
        task_of(net, images, 0, place.data_dir, None)
    with pytest.raises(InputError, match="takes a text classifier"):
        task_of(net.model_copy(update={"name": "digits_net"}), data, 0, place.data_dir, None)
    with pytest.raises(InputError, match="max_length"):
        task_of(net, data.model_copy(update={"options": {"size": 3}}), 0, place.data_dir, None)
    long = trials(place, data=[{"name": "sst2", "options": {"max_length": 64}}])[0]
    with pytest.raises(InputError, match="exceeds the model's 32 positions"):
        run_trial(long, place)
