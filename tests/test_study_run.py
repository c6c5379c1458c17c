"""What a trial is: every kind of it on the digits, counted again by hand, and the same bits after an interruption."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("pydantic")

from secateur.errors import ArtifactError
from secateur.report import Record
from secateur.study import bench as benches
from secateur.study import run as running
from secateur.study import trials_of
from secateur.study.bench import Bench
from secateur.study.dense import Workplace, trained
from secateur.study.recording import layer_weights
from secateur.study.results import Point, Result
from secateur.study.run import run_trial
from secateur.weightlayers import weight_layers
from study_kills import numbers
from study_work import finished, small

DENSE = 2  # epochs
RECIPES = {
    "training": {"epochs": DENSE, "batch_size": 128, "lr": 0.05},
    "tuning": {"epochs": 2, "batch_size": 128, "lr": 0.02},
}
GRADUAL = {"schedule": "linear", "steps": 2}
WEIGHTS = {"criterion": "magnitude", "prunes": "weights"}
METHODS = {
    "one shot": {"criterion": "l1"},
    "steps": {"criterion": "l1", **GRADUAL, "epochs": 3},
    "epochs per step": {"criterion": "l1", **GRADUAL, "epochs_per_step": 1},
    "layer by layer": {"criterion": "l1", "schedule": "layer_by_layer", "epochs": 2},
    "ensemble": {"criterion": ["l1", "taylor"]},
    "data driven": {"criterion": "taylor"},
    "gamma": {"criterion": "bn_scale", "penalty": {"kind": "gamma", "epochs": 1}},
    "group": {"criterion": "group_norm", "penalty": {"kind": "group", "epochs": 1}},
    "l1": {"criterion": "l1", "penalty": {"kind": "l1", "epochs": 1}},
    "distilled": {"criterion": "l1", "distillation": {}},
    "unrepaired": {"criterion": "l1", "repair": False},
    "not tuned": {"criterion": "l1", "epochs": 0},
    "macs": {"criterion": "l1", "target": "macs"},
    "params": {"criterion": "l1", "target": "params"},
    "weights": WEIGHTS,
    "gradual weights": {**WEIGHTS, "schedule": "cubic", "steps": 2, "hold": "epoch"},
    "lottery ticket": {**WEIGHTS, **GRADUAL, "rewind": "weights"},
    "2:4": {**WEIGHTS, "pattern": "2:4", "ignore": ["stem"]},
    "new values": {"criterion": "sparsegpt", "prunes": "weights"},
    "unpruned": {"criterion": "unpruned", "prunes": "nothing"},
    "smaller": {"criterion": "smaller", "prunes": "nothing"},
    "smaller params": {"criterion": "smaller", "prunes": "nothing", "target": "params"},
}
CHANNELS = [name for name, method in METHODS.items() if method.get("prunes", "channels") == "channels"]
MASKED = [name for name, method in METHODS.items() if method.get("prunes") == "weights"]


def trial_of(name, **changes):
    (trial,) = trials_of(small(**{**RECIPES, "methods": [METHODS[name]], **changes}))
    return trial


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def done(place):
    """The results of all these trials, made when first asked for, and the models that were evaluated."""
    results: dict[str, Result] = {}

    def result(name):
        if name not in results:
            results[name] = run_trial(trial_of(name), place)
        return results[name]

    return result


def begun(monkeypatch):
    """The epochs that begin from now on."""
    from secateur.data import Batches

    epochs, before = [], Batches.set_epoch

    def told(self, epoch):
        epochs.append(epoch)
        before(self, epoch)

    monkeypatch.setattr(Batches, "set_epoch", told)
    return epochs


# -- every kind --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_trial_of_every_kind_is_recorded(name, done, place):
    trial, record = trial_of(name), done(name).record
    assert record.key == trial.key
    assert (record.seed, record.sparsity, record.prunes) == (0, trial.sparsity, trial.method.prunes)
    assert record.method == trial.method.title
    for value in (record.accuracy_dense, record.accuracy_pruned, record.accuracy_finetuned):
        assert 0.05 < value <= 1
    dense = trained(trial.dense, place)
    assert (record.accuracy_dense, record.validation_dense, record.train_dense) == (
        dense.scores.test,
        dense.scores.validation,
        dense.scores.train,
    )
    assert record.accuracy_finetuned * 359 == pytest.approx(
        round(record.accuracy_finetuned * 359)
    )  # so many test images
    assert Record.from_json(record.to_json()) == record
    assert Result.from_json(done(name).to_json()) == done(name)


@pytest.mark.parametrize("name", METHODS)
def test_the_epochs_of_the_curve_are_those_that_were_announced(name, done):
    trial, result = trial_of(name), done(name)
    stages = [point.stage for point in result.curve]
    own = DENSE if name.startswith("smaller") else 0  # trained from scratch as long as dense model and tuning
    assert len(stages) == DENSE + trial.epochs + own
    assert result.record.epochs == trial.epochs
    assert stages[:DENSE] == ["dense"] * DENSE
    assert "dense" not in stages[DENSE:]
    for stage in set(stages):
        assert [p.epoch for p in result.curve if p.stage == stage] == list(range(1, stages.count(stage) + 1))


def test_epochs_go_where_the_method_says(done):
    def stages(name):
        return [point.stage for point in done(name).curve[DENSE:]]

    assert stages("one shot") == ["tune 1"] * 2
    assert stages("steps") == ["tune 1", "tune 2", "tune 2"]
    assert stages("epochs per step") == ["tune 1", "tune 2"]
    assert stages("gamma") == stages("group") == stages("l1") == ["penalty", "tune 1", "tune 1"]
    assert stages("not tuned") == []
    assert stages("smaller") == ["from scratch"] * 4


BEFORE = {"steps": 1, "epochs per step": 1, "gamma": 1, "gradual weights": 1}


@pytest.mark.parametrize("name", [*BEFORE, "one shot", "not tuned", "weights", "unpruned", "smaller"])
def test_epochs_before_the_last_pruning_are_counted(name, done):
    assert done(name).record.epochs_before == BEFORE.get(name, 0)


def test_models_are_evaluated_in_the_precision_and_layout_of_training(monkeypatch, tmp_path):
    from secateur.study import dense

    asked, plain = [], dense.evaluate

    def told(model, *args, **options):
        weight = next(tensor for tensor in model.parameters() if tensor.dim() == 4)
        layout = weight.is_contiguous(memory_format=torch.channels_last)
        asked.append((torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"), layout))
        return plain(model, *args, **options)

    monkeypatch.setattr(dense, "evaluate", told)
    for bf16, channels_last in ((True, False), (False, True)):
        recipe = {**RECIPES["training"], "bf16": bf16, "channels_last": channels_last}
        found = run_trial(trial_of("not tuned", training=recipe), Workplace(tmp_path)).record
        assert len(asked) == 3 + 2 + 3  # dense; cut and repaired; tuned
        assert {precision for precision, _ in asked} == {torch.bfloat16 if bf16 else False}
        assert all(layout for _, layout in asked) or not channels_last
        assert found.fingerprint["settings"]["evaluation"] == ("bfloat16" if bf16 else "float32")
        asked.clear()


def test_as_many_epochs_are_trained_as_are_counted(monkeypatch, tmp_path):
    epochs = begun(monkeypatch)
    trial = trial_of("steps")
    result = run_trial(trial, Workplace(tmp_path))
    assert len(epochs) == len(result.curve) == DENSE + trial.epochs


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_are_gone_and_that_was_proved(name, done):
    record = done(name).record
    assert record.params.after < record.params.before
    assert record.macs.after < record.macs.before
    assert record.verified_difference < 1e-5
    assert any(row.after < row.before for row in record.widths)
    if record.target == "channels":
        removed = sum(row.before - row.after for row in record.widths)
        assert removed > 0
    assert (record.accuracy_repaired is None) == (name == "unrepaired")


def test_budgets_are_met_and_hardly_more_than_that(done):
    macs, params = done("macs").record, done("params").record
    assert 0.4 < macs.macs.kept <= 0.5
    assert 0.4 < params.params.kept <= 0.5
    assert (macs.target, params.target, done("one shot").record.target) == ("macs", "params", "channels")


def test_every_layer_keeps_what_was_asked_for(tmp_path):
    method = {"criterion": "l1", "scope": "global", "keep_at_least": 14, "epochs": 0}
    record = run_trial(trial_of("one shot", methods=[method], sparsities=[0.3]), Workplace(tmp_path)).record
    kept = [row.after for row in record.widths if row.after < row.before]
    assert kept and min(kept) >= 14


def test_steps_end_where_one_shot_does(done):
    once, twice = done("one shot").record, done("steps").record
    assert twice.params == done("epochs per step").record.params
    assert twice.params.kept == pytest.approx(once.params.kept, abs=0.1)


def test_a_smaller_network_is_as_large_as_a_pruned_one(done):
    assert done("smaller").record.params == done("one shot").record.params
    assert done("smaller").record.macs == done("one shot").record.macs
    assert done("smaller params").record.params.kept == pytest.approx(done("params").record.params.kept, abs=0.05)
    assert done("smaller").record.verified_difference is None


def test_the_unpruned_control_is_the_dense_model_fine_tuned(done):
    record = done("unpruned").record
    assert record.accuracy_pruned == record.accuracy_dense
    assert (record.params.kept, record.macs.kept, record.sparsity) == (1.0, 1.0, 0.0)
    assert record.weights_left > 0.99
    assert record.unpruned and not done("smaller").record.unpruned


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(monkeypatch, tmp_path, place):
    """A trial done anew, and the models that its record is about: (record, dense, cut, tuned)."""
    found = {}
    before = running.record_of

    def kept(bench, stages, start):
        found["models"] = (bench.dense.model, stages.cut, stages.tuned)
        return before(bench, stages, start)

    monkeypatch.setattr(running, "record_of", kept)

    def again(name):
        fresh = replace(place, folder=tmp_path)
        (tmp_path / "dense").symlink_to(place.folder / "dense")
        return (run_trial(trial_of(name), fresh).record, *found["models"])

    return again


def counted(model):
    """(all, those that are not zero) of the weights of convolutions and linear maps, in a loop of its own."""
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    weights = [module.weight for module in model.modules() if isinstance(module, kinds)]
    return sum(w.numel() for w in weights), sum(int((w != 0).sum()) for w in weights)


@pytest.mark.parametrize("name", ["weights", "2:4", "one shot", "gradual weights", "new values"])
def test_weights_left_are_those_that_an_independent_count_finds(name, evaluated, done):
    record, dense, _, tuned = evaluated(name)
    there, (_, left) = counted(dense)[0], counted(tuned)
    assert record.weights_left == left / there
    assert sum(row.left for row in record.layers) == left
    assert sum(row.before for row in record.layers) == there
    assert numbers_of(record) == numbers_of(done(name).record)  # and the trial gives the same numbers every time


def numbers_of(record):
    values = numbers(row := _row(record))
    assert values["key"] == row.key
    return values


def _row(record):
    from secateur.study.store import Row

    return Row(record.key, "", record.seconds, record, None)


@pytest.mark.parametrize("name", MASKED)
def test_masked_weights_stay_zero_and_nothing_gets_smaller(name, done):
    record = done(name).record
    assert record.params.kept == 1.0 == record.macs.kept
    assert record.target == "weights"
    assert record.verified_difference is None
    assert record.weights_left == pytest.approx(0.5, abs=0.06)  # the first and last layers may be left alone


def test_2_of_4_is_2_of_every_4(evaluated):
    _, _, cut, tuned = evaluated("2:4")
    for model in (cut, tuned):
        for layer in weight_layers(model):
            if layer.name == "stem.weight":
                continue
            inputs = dict(model.named_parameters())[layer.name].detach().movedim(1, -1)
            assert ((inputs.reshape(-1, 4) != 0).sum(1) == 2).all(), layer.name


def test_a_lottery_ticket_is_made_of_the_weights_that_training_began_with(evaluated, place):
    _, _, cut, tuned = evaluated("lottery ticket")
    trial = trial_of("lottery ticket")
    initial = place.task(trial.dense).fresh(trial.net, trial.seed).state_dict()
    state = cut.state_dict()
    masked = [layer.name for layer in weight_layers(cut)]
    for name in masked:
        kept = state[name] != 0
        assert torch.equal(state[name][kept], initial[name][kept])
        assert not kept.all() and kept.any()
    assert any(not torch.equal(tuned.state_dict()[name], state[name]) for name in masked)


def test_layers_that_are_gone_count_as_nothing():
    dense = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    (first, second) = layer_weights(dense, torch.nn.Sequential(torch.nn.Linear(4, 1)))
    assert (first.before, first.left, second.before, second.left) == (12, 4, 6, 0)


# -- interrupted -------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As a kill is: nobody catches it."""


@pytest.mark.parametrize("name", ["steps", "gradual weights", "lottery ticket", "gamma", "distilled", "smaller"])
def test_a_trial_interrupted_while_fine_tuning_ends_with_the_same_bits(name, done, place, tmp_path, monkeypatch):
    fresh = replace(place, folder=tmp_path)
    (tmp_path / "dense").symlink_to(place.folder / "dense")
    done(name)  # and with it the dense model
    epochs = begun(monkeypatch)
    train = Bench.train
    stage_at = {"smaller": 3, "gamma": 2}.get(name, 2)  # the epoch that does not come to its end

    from secateur.data import Batches

    telling = Batches.set_epoch

    def stopping(self, epoch):
        telling(self, epoch)
        if len(epochs) == stage_at:
            raise Stop

    monkeypatch.setattr(Batches, "set_epoch", stopping)
    with pytest.raises(Stop):
        run_trial(trial_of(name), fresh)
    monkeypatch.setattr(Batches, "set_epoch", telling)
    assert list((tmp_path / "trials" / trial_of(name).key).glob("*.pt"))  # something was done, and written down
    again = run_trial(trial_of(name), fresh)
    assert Bench.train is train
    assert numbers_of(again.record) == numbers_of(done(name).record)
    assert again.curve == done(name).curve
    needed = len(again.curve) - DENSE
    assert len(epochs) == needed + 1  # only the epoch that was interrupted is trained twice


def test_the_seconds_of_a_trial_count_epochs_that_an_interrupted_run_had_done(done, place, tmp_path, monkeypatch):
    done("one shot")  # and with it the dense model
    fresh = replace(place, folder=tmp_path)
    (tmp_path / "dense").symlink_to(place.folder / "dense")
    fit = benches.fit

    def long_ago(*given, **options):
        fitted = fit(*given, **options)
        return replace(fitted, history=tuple(replace(epoch, seconds=1000.0) for epoch in fitted.history))

    monkeypatch.setattr(benches, "fit", long_ago)
    result = run_trial(trial_of("one shot"), fresh)
    epochs = len(result.curve) - DENSE
    assert 1000 * epochs < result.record.seconds < 1000 * (epochs + 1)


def test_a_finished_trial_is_read_and_not_done_again(done, place, monkeypatch):
    result = done("one shot")
    monkeypatch.setattr(running, "METHODS", {})
    assert run_trial(trial_of("one shot"), place) == result


@pytest.mark.parametrize("content", [b"", b"{", b'{"record": {}, "curve": []}', b"\xff\xfe", b"[]", b"null"])
def test_a_damaged_result_is_made_anew(content, done, place):
    name = "not tuned"
    result = done(name)
    path = place.folder / "trials" / trial_of(name).key / "result.json"
    path.write_bytes(content)
    assert numbers_of(run_trial(trial_of(name), place).record) == numbers_of(result.record)
    assert numbers_of(Result.from_json(path.read_text()).record) == numbers_of(result.record)


def test_what_is_no_result_says_so():
    for text in ("", "[]", "null", '{"record": 1, "curve": []}', '{"record": {}}'):
        with pytest.raises(ArtifactError, match=r"no result|not a record"):
            Result.from_json(text)
    result = finished(trial_of("one shot"))
    assert Result.from_json(result.to_json()) == result
    assert isinstance(result.curve[0], Point)


# -- the dense model and the data ------------------------------------------------------------------------------------


def damaged(path, how):
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut short": content[: len(content) // 2],
            "something else": b"PK\x03\x04" + content,
            "without its facts": content.replace(b"secateur.dense", b"secateur.dence"),
            "facts cut": content.replace(b'\\"history\\"', b'\\"histories'),
        }[how]
    )
    assert path.read_bytes() != content


@pytest.mark.parametrize("how", ["empty", "cut short", "something else", "without its facts", "facts cut"])
def test_a_damaged_dense_model_is_trained_again_to_the_same_bits(how, tmp_path, monkeypatch):
    place, dense = Workplace(tmp_path), trial_of("one shot", training={**RECIPES["training"], "epochs": 1}).dense
    first = trained(dense, place)
    path = tmp_path / "dense" / f"{dense.key}.safetensors"
    damaged(path, how)
    epochs = begun(monkeypatch)
    again = trained(dense, place)
    assert epochs == [0]
    assert again.scores == first.scores
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)
    assert trained(dense, place).scores == first.scores
    assert epochs == [0]


def test_a_dense_model_is_trained_once_and_its_caller_gets_a_copy(tmp_path, monkeypatch):
    place, dense = Workplace(tmp_path), trial_of("one shot").dense
    epochs = begun(monkeypatch)
    first = trained(dense, place)
    with torch.no_grad():
        first.model.stem.weight.zero_()
    again = trained(dense, place)
    assert epochs == list(range(DENSE))
    assert again.model.stem.weight.abs().sum() > 0
    assert not again.model.training
    assert [replace(epoch, seconds=0) for epoch in again.history] == [replace(e, seconds=0) for e in first.history]


@pytest.mark.parametrize("images", [None, 300])
def test_train_validation_and_test_never_overlap(images, place):
    seen = {}
    for seed in (0, 1):
        trial = trial_of(
            "one shot", seeds=[seed], data=[{"name": "digits", "validation": 0.2, "train_samples": images}]
        )
        task = place.task(trial.dense)
        splits = task.splits
        parts = [
            {image.numpy().tobytes() for image in part.images}
            for part in (splits.train, splits.validation, splits.test)
        ]
        train, validation, test = parts
        assert len(splits.train) == (images or 1151)
        assert not train & validation
        assert not train & test
        assert not validation & test
        seen[seed] = parts
        calibration = task.calibration(200, seed)
        assert sum(len(labels) for _, labels in calibration) == 200
    assert seen[0][2] == seen[1][2]  # the test images are the same for all seeds, the validation images are not
    assert seen[0][1] != seen[1][1]


def test_the_fingerprint_names_versions_data_and_commit(done, place):
    import hashlib
    from importlib.metadata import version

    from secateur.study import recording

    found = done("one shot").record.fingerprint
    assert (found["torch"], found["secateur"]) == (version("torch"), version("secateur"))
    task, digest = place.task(trial_of("one shot").dense), hashlib.sha256()
    for part in (task.splits.train, task.splits.validation, task.splits.test):
        digest.update(part.images.numpy().tobytes() + part.labels.numpy().tobytes())
    assert found["data"]["sha256"] == digest.hexdigest()[:16]
    assert (found["data"]["train"], found["data"]["validation"], found["data"]["test"]) == (1295, 143, 359)
    assert found["settings"]["training"] == "2 epochs, sgd, lr 0.05, batches of 128"
    json.dumps(found)
    if recording.commit():
        assert found["commit"] == recording.commit()
        assert len(found["commit"].rstrip("+")) == 12


def test_other_data_has_another_fingerprint(place):
    def digest(count, seed=0):
        trial = trial_of("one shot", data=[{"name": "digits", "train_samples": count}], seeds=[seed])
        return place.task(trial.dense).digest

    assert digest(300) == digest(300)
    assert len({digest(300), digest(301), digest(300, 1)}) == 3
