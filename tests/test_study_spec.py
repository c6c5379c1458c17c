"""The study file: strict, explained, and every trial with a key that stays what it is."""

import copy
import json
import typing
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from secateur.errors import InputError, UnknownNameError
from secateur.study import read_study, trials_of
from secateur.study.reading import references_of
from secateur.study.spec import Study, Table, field_lines, parse, read_profiles
from secateur.study.trials import controls_of
from study_work import SMALL, small

STUDIES = sorted((Path(__file__).parent.parent / "studies").glob("*.toml"))
TOML = """\
name = "small"
models = ["digits_net"]
data = ["digits"]
sparsities = [0.3, 0.5]
training = { epochs = 2 }
tuning = { epochs = 1 }
methods = [{ criterion = "l1" }, { criterion = "magnitude", prunes = "weights" }]
"""
PROFILES = """
[profiles.cpu]
seeds = [0]
training = { epochs = 1, lr = 0.2 }

[profiles.gpu]
seeds = [0, 1, 2, 3]
models = ["resnet20"]
"""


def changed(where, value):
    """The small study with something else at a place such as methods.0.criterion; None leaves the place out."""
    fields = copy.deepcopy(SMALL)
    *path, last = (int(part) if part.isdecimal() else part for part in where.split("."))
    table = fields
    for part in path:
        table = table.setdefault(part, {}) if isinstance(table, dict) else table[part]
    if value is None:
        del table[last]
    else:
        table[last] = value
    return fields


def refused(fields):
    """What is said about a study that is refused; one line per wrong field after the first."""
    with pytest.raises(InputError) as caught:
        parse(fields, "study.toml")
    first, *lines = str(caught.value).splitlines()
    assert first == "study.toml:"
    assert lines
    return "\n".join(lines)


def written(folder, content):
    path = folder / "study.toml"
    path.write_text(content, encoding="utf-8")
    return path


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "suggestion"),
    [
        ("sparsity", "did you mean 'sparsities'?"),
        ("modles", "did you mean 'models'?"),
        ("xyzzy", "known here: calibration, controls, data"),
        ("methods.0.critrion", "did you mean 'criterion'?"),
        ("methods.0.sparsity", "did you mean 'sparsities'?"),
        ("methods.0.penalty.strenght", "did you mean 'strength'?"),
        ("methods.0.distillation.temprature", "did you mean 'temperature'?"),
        ("training.epoch", "did you mean 'epochs'?"),
        ("tuning.learning_rate", "known here: augment, batch_size"),
        ("controls.smallr", "did you mean 'smaller'?"),
        ("latency.batch", "did you mean 'batches'?"),
        ("reference.filename", "did you mean 'file'?"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(where, suggestion):
    said = refused(changed(where, 1))
    name = where.replace(".0.", "[0].")
    assert f"{name}: unknown key; {suggestion}" in said


def test_an_unknown_key_of_a_model_or_a_data_set_is_named():
    assert "models[0].lable: unknown key; did you mean 'label'?" in refused(
        changed("models", [{"name": "digits_net", "lable": "x"}])
    )
    assert "data[0].validaton: unknown key; did you mean 'validation'?" in refused(
        changed("data", [{"name": "digits", "validaton": 0.2}])
    )


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("tuning.lr", "0.3", "tuning.lr: "),
        ("training.epochs", "3", "training.epochs: "),
        ("training.epochs", 3.5, "training.epochs: "),
        ("training.epochs", 0, "epochs"),
        ("training.lr", -1.0, "lr"),
        ("training.optimizer", "adam", "training.optimizer: "),
        ("training.nesterov", "yes", "training.nesterov: "),
        ("training.batch_size", 0, "training.batch_size: "),
        ("sparsities", [30], "sparsities[0]: "),
        ("sparsities", [1.0], "sparsities[0]: "),
        ("sparsities", [-0.1], "sparsities[0]: "),
        ("sparsities", ["0.3"], "sparsities[0]: "),
        ("sparsities", [], "sparsities: "),
        ("sparsities", [0.5, 0.3, 0.5], "sparsity '0.5' is there twice"),
        ("sparsities", 0.5, "sparsities: "),
        ("methods.0.sparsities", [30], "methods[0].sparsities[0]: "),
        ("seeds", [0, 1, 0], "seed '0' is there twice"),
        ("seeds", [0.5], "seeds[0]: "),
        ("seeds", [True], "seeds[0]: "),
        ("models", ["digits_net", "digits_net"], "model 'digits_net' is there twice"),
        ("models", [], "models: "),
        ("models", ["digit_net"], "no network named 'digit_net'. Did you mean 'digits_net'?"),
        ("models", [{"name": "timm:resnet18", "options": {"width": 3}}], "options are for Secateur's own networks"),
        ("data", ["digit"], "no data set named 'digit'. Did you mean 'digits'?"),
        ("data", ["digits", "digits"], "data set 'digits' is there twice"),
        ("data", [{"name": "digits", "validation": 1.0}], "data[0].validation: "),
        ("name", "With Spaces", "name: "),
        ("name", "../up", "name: "),
        ("name", "n" * 101, "name: "),
        ("name", 3, "name: "),
        ("name", None, "name: missing; identifies the study in a store"),
        ("training", None, "training: missing; of the dense models"),
        ("methods", None, "methods: missing; ways to prune"),
        ("training.epochs", None, "training.epochs: missing; passes over the training images"),
        ("methods.0.criterion", None, "methods[0].criterion: missing; what is important"),
        ("methods.0.criterion", "taylr", "no criterion for channels named 'taylr'. Did you mean 'taylor'?"),
        ("methods.0.criterion", ["l1", "taylr"], "no criterion for channels named 'taylr'"),
        ("methods.0.criterion", "wanda", "no criterion for channels named 'wanda'"),
        ("methods.0.schedule", "liner", "no schedule named 'liner'. Did you mean 'linear'?"),
        ("methods.0.prunes", "filters", "methods[0].prunes: "),
        ("methods.0.target", "flops", "methods[0].target: "),
        ("methods.0.scope", "locl", "no scope for l1 named 'locl'. Did you mean 'global'? Known: global, iso"),
        ("methods.0.scope", "row", "no scope for l1 named 'row'"),
        ("methods.0.repair", ["least_square"], "no step of repair named 'least_square'. Did you mean 'least_squares'?"),
        ("methods.0.pattern", "2:4", "pattern has no meaning where channels are pruned"),
        ("methods.0.rewind", "weights", "rewind has no meaning where channels are pruned"),
        ("methods.0.steps", 3, "steps = 3 needs a schedule that takes steps"),
        ("methods.0.fraction_per_step", 0.2, "fraction_per_step goes with schedule = 'geometric'"),
        ("methods.0", {"criterion": "magnitude", "prunes": "weights", "target": "macs"}, "masks save no MACs"),
        ("methods.0", {"criterion": "magnitude", "prunes": "weights", "round_to": 8}, "round_to has no meaning"),
        ("methods.0", {"criterion": "magnitude", "prunes": "weights", "scope": "rows"}, "Did you mean 'row'?"),
        ("methods.0", {"criterion": "wanda", "prunes": "weights", "scope": "global"}, "no scope for wanda"),
        ("methods.0", {"criterion": ["magnitude", "wanda"], "prunes": "weights"}, "several criteria"),
        ("methods.0", {"criterion": "unpruned", "prunes": "nothing", "schedule": "linear"}, "schedule has no meaning"),
        ("methods.0", {"criterion": "l1", "epochs": 3, "epochs_per_step": 1}, "epochs_per_step stands instead"),
        ("methods", [{"criterion": "l1"}, {"criterion": "l1"}], "method 'l1' is there twice: give each a label"),
        ("methods.0.penalty", {"kind": "gama", "epochs": 1}, "methods[0].penalty.kind: "),
        ("methods.0.distillation", {"weight": 1.5}, "methods[0].distillation.weight: "),
        ("latency.runtime", "eagre", "no runtime named 'eagre'. Did you mean 'eager'?"),
        ("latency.runtime", ["eager", "eagre"], "no runtime named 'eagre'. Did you mean 'eager'?"),
        ("latency.length", [], "latency.length"),
        ("latency.batches", [0], "latency.batches[0]: "),
        ("methods.0.of", "stem", "of says which parameters count: it goes with target = 'params'"),
        ("methods.0.distillation", {"hidden": 0.5}, "hidden states are those of text classifiers; digits are images"),
        ("calibration", 0, "calibration: "),
        ("controls.smaller", [2.0], "controls.smaller"),
    ],
)
def test_what_makes_no_sense_is_refused_where_it_stands(where, value, words):
    assert words in refused(changed(where, value))


def test_every_wrong_field_is_named_at_once():
    fields = changed("training.epoch", 3)
    fields["sparsities"] = [30]
    fields["methods"] = [{"criterion": "taylr"}, {"critrion": "l1"}]
    said = refused(fields)
    for words in ("training.epoch: ", "sparsities[0]: ", "taylr", "methods[1].critrion: ", "methods[1].criterion: mis"):
        assert words in said
    assert len(said.splitlines()) == 5


@pytest.mark.parametrize("content", ["name = ", "a = 1\na = 2", "\x00", "name = 'x'\nname.y = 3"])
def test_what_is_no_toml_is_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"study\.toml is no TOML"):
        read_study(written(tmp_path, content))


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "study.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"study\.toml is no TOML"):
        read_study(tmp_path / "study.toml")


def test_a_date_is_refused(tmp_path):
    with pytest.raises(InputError, match="no dates"):
        read_study(written(tmp_path, TOML + "description = 2024-01-01\n"))


def test_a_number_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="tuning"):
        read_study(written(tmp_path, TOML.replace("epochs = 1 }", "epochs = 1, lr = nan }")))


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_study(tmp_path / "nowhere.toml")


def test_an_empty_file_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="name: missing") as caught:
        read_study(written(tmp_path, ""))
    assert len(str(caught.value).splitlines()) == 1 + 7  # the required fields


# -- profiles --------------------------------------------------------------------------------------------------------


def test_a_profile_replaces_what_it_names_and_keeps_the_rest(tmp_path):
    path = written(tmp_path, TOML + PROFILES)
    cpu, gpu = read_study(path, "cpu"), read_study(path, "gpu")
    assert (cpu.seeds, cpu.training.epochs, cpu.training.lr, cpu.models[0].name) == ((0,), 1, 0.2, "digits_net")
    assert (gpu.seeds, gpu.training.epochs, gpu.training.lr, gpu.models[0].name) == ((0, 1, 2, 3), 2, 0.1, "resnet20")
    assert cpu.methods == gpu.methods
    assert set(read_profiles(path)) == {"cpu", "gpu"}


def test_without_a_profile_the_machine_decides(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    path = written(tmp_path, TOML + PROFILES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert read_study(path) == read_study(path, "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_study(path) == read_study(path, "cpu")
    assert read_study(written(tmp_path, TOML)).seeds == (0, 1, 2)


@pytest.mark.parametrize("name", ["gpus", "", "CPU"])
def test_a_profile_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(UnknownNameError, match=r"profile of .*cpu, gpu"):
        read_study(written(tmp_path, TOML + PROFILES), name)
    with pytest.raises(UnknownNameError, match="profile"):
        read_study(written(tmp_path, TOML), "cpu")


def test_a_mistake_in_any_profile_is_found(tmp_path):
    path = written(tmp_path, TOML + PROFILES + "sparsity = [0.5]\ntraining = { epoch = 3 }\n")
    with pytest.raises(InputError, match="profile gpu") as caught:
        read_study(path, "cpu")
    assert "sparsity: unknown key; did you mean 'sparsities'?" in str(caught.value)
    assert "training.epoch: unknown key; did you mean 'epochs'?" in str(caught.value)


@pytest.mark.parametrize("profiles", ["profiles = 3", "profiles = ['cpu']", "[profiles]\ncpu = 3"])
def test_profiles_are_tables(tmp_path, profiles):
    with pytest.raises(InputError, match=r"profiles are tables such as \[profiles\.cpu\]"):
        read_study(written(tmp_path, TOML + profiles))


# -- what is explained -----------------------------------------------------------------------------------------------


def tables(table=Study):
    """A table and all tables in it."""
    yield table
    for field in table.model_fields.values():
        stack = [field.annotation]
        while stack:
            part = stack.pop()
            if isinstance(part, type) and issubclass(part, Table):
                yield from tables(part)
            stack += typing.get_args(part)


def test_every_field_of_every_table_is_documented():
    found = set(tables())
    assert {table.__name__ for table in found} >= {
        "Study",
        "Net",
        "DataSet",
        "Training",
        "Method",
        "Penalty",
        "Latency",
    }
    lines = list(field_lines())
    assert all(meaning.strip() for _, _, _, meaning in lines)
    names = {name.rpartition(".")[2].removesuffix("[]") for name, _, _, _ in lines}
    for table in found:
        assert table.__doc__
        assert set(table.model_fields) <= names
    assert len({name for name, *_ in lines}) == len(lines)


def test_types_and_defaults_are_words_that_a_reader_knows():
    lines = {name: (kind, default) for name, kind, default, _ in field_lines()}
    assert lines["seeds"] == ("list of int", "[0, 1, 2]")
    assert lines["name"] == ("str", "required")
    assert lines["methods[]"][0] == "tables"
    assert lines["methods[].target"] == ("sparsity | macs | params", '"sparsity"')
    assert lines["training"][0] == "table"
    assert lines["training.lr"] == ("float", "0.1")
    assert not any("typing" in kind or "<" in kind or "class" in kind for kind, _ in lines.values())


def test_the_json_schema_is_closed_and_complete():
    schema = Study.model_json_schema()
    objects = [schema, *schema["$defs"].values()]
    assert all(part["additionalProperties"] is False for part in objects)
    assert all("description" in field for part in objects for field in part["properties"].values())
    assert set(schema["required"]) == {"name", "models", "data", "methods", "sparsities", "training", "tuning"}
    json.dumps(schema)


def test_the_json_schema_accepts_what_the_reader_accepts():
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(Study.model_json_schema())
    jsonschema.Draft202012Validator.check_schema(checker.schema)
    fields = {**SMALL, "models": [{"name": "digits_net"}], "data": [{"name": "digits"}]}
    assert not list(checker.iter_errors(fields))
    assert list(checker.iter_errors({**fields, "sparsity": 0.5}))


# -- the studies of this repository ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_our_own_studies_are_valid_and_their_grids_hold_every_trial_once(path):
    for study in read_profiles(path).values():
        trials = trials_of(study)
        assert len({trial.key for trial in trials}) == len(trials)
        assert all(len(trial.key) < 200 and "/" not in trial.key for trial in trials)
        assert {trial.seed for trial in trials} == set(study.seeds)
        references_of(study, path.parent)


# -- reference numbers -----------------------------------------------------------------------------------------------

HEAD = "model,data,method,sparsity,stage,accuracy,note\n"


def referring(folder, content=HEAD + "digits_net,digits,l1,0.3,finetuned,91.5,*\n", file="numbers.csv", **changes):
    (folder / "studies").mkdir(exist_ok=True)
    (folder / "studies" / "numbers.csv").write_text(content)
    (folder / "secret.csv").write_text(content)
    return small(reference={"file": file, "source": "a paper"}, **changes), folder / "studies"


def test_references_are_read_as_fractions(tmp_path):
    (reference,) = references_of(*referring(tmp_path))
    assert (reference.method, reference.sparsity, reference.stage) == ("l1", 0.3, "finetuned")
    assert reference.accuracy == pytest.approx(0.915)
    assert (reference.source, reference.note) == ("a paper", "*")
    assert references_of(small(), tmp_path) == []


def test_a_model_may_stand_for_the_one_of_the_document(tmp_path):
    content = HEAD + "resnet56,digits,l1,0.3,finetuned,91.5,\nother,digits,l1,0.3,finetuned,1,\n"
    model = {"name": "digits_net", "label": "ours", "stands_for": "resnet56"}
    (reference,) = references_of(*referring(tmp_path, content, models=[model]))
    assert reference.model == "ours"
    assert references_of(*referring(tmp_path, content)) == []


@pytest.mark.parametrize("file", ["../secret.csv", "/etc/passwd", "../studies/../secret.csv"])
def test_a_reference_outside_the_folder_is_refused(tmp_path, file):
    with pytest.raises(InputError, match=r"reference\.file is a path inside"):
        references_of(*referring(tmp_path, file=file))


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    study, folder = referring(tmp_path, file="link.csv")
    (folder / "link.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(InputError, match=r"reference\.file is a path inside"):
        references_of(study, folder)


@pytest.mark.parametrize(
    "content",
    [
        "model,data,method\ndigits_net,digits,l1\n",
        HEAD + "digits_net,digits,l1,a third,finetuned,91.5,\n",
        HEAD + "digits_net,digits,l1\n",
    ],
)
def test_a_bad_line_of_references_is_named(tmp_path, content):
    with pytest.raises(InputError, match=r"numbers\.csv: columns are model,data,method"):
        references_of(*referring(tmp_path, content))


def test_references_that_are_not_there_are_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        references_of(*referring(tmp_path, file="missing.csv"))


# -- keys ------------------------------------------------------------------------------------------------------------

GOLDEN = {
    "plain": "digits_net-digits-l1-0.5-s0-60d18a7f1f0c",
    "masked": "digits_net-digits-magnitude-0.5-s7-4f10e9493b37",
    "several": "resnet20-digits-l1+taylor-0.5-s0-f8b9464cd053",
    "dense": "resnet20-digits-s0-82142b51bef5",
}


def key_of(**changes):
    (trial,) = trials_of(small(**changes))
    return trial.key


def test_keys_are_what_they_always_were():
    """A key that changes makes every finished trial of it a stranger: change one only with the schema of the store."""
    masked = {"criterion": "magnitude", "prunes": "weights", "pattern": "2:4", "schedule": "cubic", "steps": 3}
    model = {"name": "resnet20", "options": {"width": 8}}
    assert key_of() == GOLDEN["plain"]
    assert key_of(methods=[masked], seeds=[7]) == GOLDEN["masked"]
    several = small(models=[model], methods=[{"criterion": ["l1", "taylor"], "target": "macs"}])
    (trial,) = trials_of(several)
    assert (trial.key, trial.dense.key) == (GOLDEN["several"], GOLDEN["dense"])


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"title": "A title", "description": "of something"},
        {"models": [{"name": "digits_net", "label": "tiny", "stands_for": "resnet56"}]},
        {"models": [{"name": "digits_net", "options": {}}]},
        {"methods": [{"criterion": "l1", "label": "L1"}]},
        {"methods": [{"criterion": "l1", "sparsities": [0.5]}], "sparsities": [0.1]},
        {"methods": [{"criterion": "l1", "schedule": "one_shot", "target": "sparsity"}]},
        {"methods": [{"criterion": "l1", "repair": True}]},
        {"repair": False, "methods": [{"criterion": "l1", "repair": True}]},
        {"reference": {"file": "a.csv", "source": "b"}},
    ],
)
def test_what_does_not_matter_does_not_change_a_key(changes):
    assert key_of(**changes) == key_of()


METHOD = {"criterion": "l1"}
MATTERS = {
    **{f"training.{name}": value for name, value in (("epochs", 2), ("lr", 0.06), ("batch_size", 64))},
    **{f"tuning.{name}": value for name, value in (("epochs", 2), ("lr", 0.03), ("batch_size", 64))},
    "training.steps_per_epoch": 3,
    "training.optimizer": "adamw",
    "training.momentum": 0.8,
    "training.nesterov": False,
    "training.weight_decay": 1e-4,
    "training.schedule": "constant",
    "training.warmup_epochs": 0.5,
    "training.label_smoothing": 0.1,
    "training.clip_norm": 1.0,
    "training.bf16": True,
    "training.channels_last": True,
    "training.augment": False,
    "models": [{"name": "digits_net", "options": {"width": 8}}],
    "data": [{"name": "digits", "validation": 0.2}],
    "data.0": {"name": "digits", "train_samples": 500},
    "sparsities": [0.6],
    "seeds": [1],
    "calibration": 100,
    "repair": False,
    "latency": {"batches": [2], "seconds": 1e-6},
    "methods.0.criterion": "l2",
    "methods.0.target": "macs",
    "methods.0.scope": "global",
    "methods.0.epochs": 3,
    "methods.0.repair": ["batch_norm"],
    "methods.0.ignore": ["stem"],
    "methods.0.round_to": 4,
    "methods.0.keep_at_least": 4,
    "methods.0.penalty": {"kind": "gamma", "epochs": 1},
    "methods.0.distillation": {},
    "methods.0": {"criterion": "l1", "schedule": "linear"},
}


def test_every_setting_that_matters_changes_the_key():
    keys = [key_of(), *(trials_of(parse(changed(*item), "here"))[0].key for item in MATTERS.items())]
    assert len(set(keys)) == len(MATTERS) + 1


def test_every_field_of_a_method_is_in_its_key():
    """A new field must be tried here, so that no setting is forgotten in keys."""
    from secateur.study.spec import Method

    weights = {"criterion": "magnitude", "prunes": "weights"}
    others = [
        {**weights, "pattern": "2:4"},
        {**weights, "hold": "epoch"},
        {**weights, "within": "stem"},
        {**weights, "biases": True},
        {**weights, "propagate": True},
        {**weights, "rewind": "weights"},
        {"criterion": "l1", "schedule": "linear", "steps": 2},
        {"criterion": "l1", "schedule": "geometric", "fraction_per_step": 0.3},
        {"criterion": "l1", "schedule": "linear", "steps": 2, "epochs_per_step": 1},
        {"criterion": "l1", "prune_residual": True},
        {"criterion": "l1", "target": "params"},
        {"criterion": "l1", "target": "params", "of": "stem"},
        weights,
        {"criterion": "l1"},
    ]
    keys = [key_of(methods=[method]) for method in others]
    assert len(set(keys)) == len(others)
    tried = {name for method in others for name in method} | {place.rpartition(".")[2] for place in MATTERS}
    assert tried | {"label", "sparsities"} >= set(Method.model_fields)


def test_the_order_of_a_file_does_not_change_keys():
    first = small(methods=[{"criterion": "l1"}, {"criterion": "fpgm"}], sparsities=[0.3, 0.5], seeds=[0, 1])
    other = small(methods=[{"criterion": "fpgm"}, {"criterion": "l1"}], sparsities=[0.5, 0.3], seeds=[1, 0])
    assert {trial.key for trial in trials_of(first)} == {trial.key for trial in trials_of(other)}
    assert [trial.key for trial in trials_of(first)] != [trial.key for trial in trials_of(other)]


def test_a_dense_model_is_shared_by_all_trials_that_start_from_it():
    study = small(methods=[{"criterion": "l1"}, {"criterion": "fpgm"}], sparsities=[0.3, 0.5], seeds=[0, 1])
    assert len({trial.dense.key for trial in trials_of(study)}) == 2
    tuned = small(tuning={"epochs": 9}, calibration=50, repair=False)
    assert {trial.dense.key for trial in trials_of(tuned)} < {trial.dense.key for trial in trials_of(study)}
    slower = small(training={"epochs": 2})
    assert not {trial.dense.key for trial in trials_of(slower)} & {trial.dense.key for trial in trials_of(study)}


# -- the grid and its controls ---------------------------------------------------------------------------------------


def grid(methods, controls=None, **changes):
    study = small(methods=methods, **{**changes, **({"controls": controls} if controls is not None else {})})
    return study, trials_of(study)


def test_a_network_may_need_more_dense_epochs_and_calibration_than_the_others():
    (slow,) = trials_of(small(models=[{"name": "digits_net", "epochs": 7, "calibration": 300}]))
    (same,) = trials_of(small(training={**SMALL["training"], "epochs": 7}, calibration=300))
    (other,) = trials_of(small())
    assert (slow.training.epochs, slow.calibration, slow.tuning, slow.net) == (7, 300, other.tuning, other.net)
    assert slow.key == same.key != other.key
    assert slow.dense.key == same.dense.key


def test_a_grid_is_the_product_of_its_axes_seed_by_seed():
    study = small(
        models=["digits_net", {"name": "digits_net", "label": "wide", "options": {"width": 8}}],
        methods=[{"criterion": "l1"}, {"criterion": "fpgm"}, {"criterion": "random"}],
        sparsities=[0.1, 0.3, 0.5, 0.7],
        seeds=[3, 1],
    )
    trials = trials_of(study)
    assert len(trials) == 2 * 3 * 4 * 2
    seeds = [trial.seed for trial in trials]
    assert seeds == [3] * 24 + [1] * 24
    assert len({trial.key for trial in trials}) == len(trials)


def test_controls_are_there_without_asking():
    methods = [{"criterion": "taylor"}, {"criterion": "wanda", "prunes": "weights"}]
    study, trials = grid(methods, {}, sparsities=[0.3, 0.5])
    names = [(method.criterion, method.prunes) for method in controls_of(study)]
    assert names == [
        ("random", "channels"),
        ("l2", "channels"),
        ("random", "weights"),
        ("magnitude", "weights"),
        ("unpruned", "nothing"),
        ("smaller", "nothing"),
    ]
    assert len(trials) == 2 * 2 + 4 * 2 + 1 + 2
    assert {trial.method.criterion for trial in trials if not trial.control} == {"taylor", "wanda"}
    assert {trial.sparsity for trial in trials if trial.method.criterion == "unpruned"} == {0.0}


@pytest.mark.parametrize("name", ["random", "magnitude", "unpruned", "smaller"])
def test_each_control_can_be_declined(name):
    everything = {method.criterion for method in controls_of(grid([{"criterion": "taylor"}], {})[0])}
    criterion = "l2" if name == "magnitude" else name
    assert criterion in everything
    less = {method.criterion for method in controls_of(grid([{"criterion": "taylor"}], {name: False})[0])}
    assert everything - less == {criterion}


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_a_control_that_is_asked_for_is_not_doubled(criterion):
    study, _ = grid([{"criterion": criterion}, {"criterion": "random"}], {})
    assert [method.criterion for method in controls_of(study)] == ["unpruned", "smaller"]


def test_a_control_is_the_first_method_with_nothing_that_helps_it():
    method = {
        "criterion": "taylor",
        "label": "ours",
        "scope": "global",
        "schedule": "linear",
        "steps": 3,
        "penalty": {"kind": "gamma", "epochs": 1},
        "distillation": {},
        "sparsities": [0.2],
    }
    _, trials = grid([method], {}, sparsities=[0.5])
    control = next(trial for trial in trials if trial.method.criterion == "random")
    assert control.control
    assert (control.method.scope, control.method.schedule, control.method.steps) == ("global", "linear", 3)
    assert (control.method.penalty, control.method.distillation, control.sparsity) == (None, None, 0.2)
    assert {trial.sparsity for trial in trials} == {0.0, 0.2}
    ours = next(trial for trial in trials if trial.method.criterion == "taylor")
    assert control.epochs == ours.epochs == ours.tuning.epochs + 1  # the penalty's go into fine-tuning


def test_smaller_networks_are_made_at_the_levels_asked_for():
    levels = {0.1, 0.5, 0.9}
    _, everywhere = grid([{"criterion": "l1"}, {"criterion": "fpgm", "sparsities": [0.9]}], {}, sparsities=[0.1, 0.5])
    assert {t.sparsity for t in everywhere if t.method.criterion == "smaller"} == levels
    _, some = grid([{"criterion": "l1"}], {"smaller": [0.5]}, sparsities=sorted(levels))
    assert [t.sparsity for t in some if t.method.criterion == "smaller"] == [0.5]
    assert all(t.control for t in some if t.method.criterion == "smaller")


def test_smaller_networks_count_the_parameters_of_the_same_modules():
    method = {"criterion": "l1", "target": "params", "of": ["conv*", "head"]}
    smaller = next(m for m in controls_of(grid([method], {})[0]) if m.criterion == "smaller")
    assert (smaller.target, smaller.of) == ("params", ("conv*", "head"))


def test_smaller_networks_cost_what_the_pruned_ones_do():
    target = {
        kind: next(m.target for m in controls_of(grid([method], {})[0]) if m.criterion == "smaller")
        for kind, method in {
            "channels": {"criterion": "l1"},
            "macs": {"criterion": "l1", "target": "macs"},
            "weights": {"criterion": "magnitude", "prunes": "weights"},
        }.items()
    }
    assert target == {"channels": "sparsity", "macs": "macs", "weights": "params"}


@pytest.mark.parametrize(
    ("method", "sparsity", "steps", "epochs"),
    [
        ({}, 0.5, 1, 6),
        ({"epochs": 0}, 0.5, 1, 0),
        ({"schedule": "linear", "steps": 3}, 0.5, 3, 6),
        ({"schedule": "linear"}, 0.5, 4, 6),
        ({"schedule": "linear", "steps": 3, "epochs_per_step": 2}, 0.5, 3, 6),
        ({"schedule": "geometric", "fraction_per_step": 0.5}, 0.75, 2, 6),
        ({"schedule": "geometric", "fraction_per_step": 0.2}, 0.488, 3, 6),
        ({"schedule": "geometric", "fraction_per_step": 0.2, "epochs_per_step": 2}, 0.5, 4, 8),
        ({"schedule": "geometric", "fraction_per_step": 0.1591, "epochs_per_step": 1}, 0.875, 12, 12),  # 1 - 2^(-1/4)
        ({"schedule": "geometric", "fraction_per_step": 0.2929, "epochs_per_step": 1}, 0.875, 6, 6),  # 1 - 2^(-1/2)
        ({"schedule": "layer_by_layer"}, 0.5, None, 6),
        ({"penalty": {"kind": "gamma", "epochs": 2}}, 0.5, 1, 8),
    ],
)
def test_prunings_and_epochs_are_counted_before_anything_runs(method, sparsity, steps, epochs):
    study = small(methods=[{"criterion": "l1", **method}], sparsities=[sparsity], tuning={"epochs": 6})
    (trial,) = trials_of(study)
    assert (trial.steps, trial.epochs) == (steps, epochs)


def test_controls_are_trained_as_long_as_what_they_control():
    method = {"criterion": "taylor", "schedule": "geometric", "fraction_per_step": 0.2, "epochs_per_step": 1}
    _, trials = grid([method], {"smaller": False}, sparsities=[0.2, 0.5, 0.8])
    by = {(trial.method.criterion, trial.sparsity): trial.epochs for trial in trials}
    for low, high in pairwise([0.2, 0.5, 0.8]):
        assert by["taylor", low] == by["random", low] == by["l2", low] < by["taylor", high]
