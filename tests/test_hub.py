"""Folders: transformers models that need nothing but their folder, and the Hub mixin, on local folders only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrained_for_tests import BUILDERS, gpt2, library, llama, mlp_plan, output, randomised
from secateur.artifacts import TENSORS, describe, load, save
from secateur.errors import ArtifactError, InputError, PlanMismatchError
from secateur.plans import Cut, Plan, named_tensors, tensor_shapes
from secateur.pruning import prune
from secateur.shrinking import shrink
from test_artifacts import Result, dense, plan_for


def pruned(model: nn.Module) -> Result:
    plan = mlp_plan(model)
    return Result(shrink(model, plan), plan)


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    """Equal bit for bit, buffers that are not persistent and ties between tensors too."""
    ours, theirs = named_tensors(actual), named_tensors(expected)
    assert list(ours) == list(theirs) and list(actual.state_dict()) == list(expected.state_dict())
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].device == tensor.device
        assert torch.equal(ours[name], tensor), name


@pytest.fixture(params=BUILDERS)
def result(request: pytest.FixtureRequest) -> Result:
    return pruned(randomised(BUILDERS[request.param]()))


# A folder for a transformers model


def test_a_folder_is_all_that_loading_needs(result: Result, tmp_path: Path) -> None:
    save(result, tmp_path / "small-1.5")
    small: Any = load(tmp_path / "small-1.5")
    assert type(small) is type(result.model) and not small.training
    assert_same(small, result.model)
    assert torch.equal(output(small), output(result.model))
    assert output(small).abs().max() > 0
    output_of_dense = output(randomised(type(small)(small.config), seed=1))
    assert not torch.equal(output(small), output_of_dense)


def test_it_loads_into_a_model_of_the_users_too(result: Result, tmp_path: Path) -> None:
    save(result, tmp_path)
    model = randomised(type(result.model)(result.model.config), seed=1)
    for place in (tmp_path, tmp_path / TENSORS):
        assert_same(load(place, model.train()), result.model)
        assert load(place, model).training


def test_a_loaded_model_trains_and_is_saved_again(result: Result, tmp_path: Path) -> None:
    save(result, tmp_path / "a")
    small = load(tmp_path / "a")
    save(small, tmp_path / "b", plan=describe(tmp_path / "a").plan)
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
    options = {"decoder_input_ids": torch.ones(1, 3, dtype=torch.long)} if small.config.is_encoder_decoder else {}
    small(input_ids=torch.ones(1, 3, dtype=torch.long), **options).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


@pytest.mark.parametrize("name", BUILDERS)
def test_what_prune_made_comes_back(name: str, tmp_path: Path) -> None:
    model = randomised(BUILDERS[name]())
    tokens = torch.arange(6)[None] + 3
    inputs = {"input_ids": tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})}
    result = prune(model, inputs, sparsity=0.5)
    assert not result.plan.is_identity
    save(result, tmp_path)
    small = load(tmp_path)
    assert_same(small, result.model)
    assert torch.equal(output(small), output(result.model))


def test_tied_tensors_are_tied_again(tmp_path: Path) -> None:
    save(pruned(gpt2()), tmp_path)
    small = load(tmp_path)
    assert small.lm_head.weight is small.transformer.wte.weight
    assert "lm_head.weight" not in describe(tmp_path).tensors


def test_buffers_that_are_not_persistent_are_those_that_were_saved(tmp_path: Path) -> None:
    result = pruned(llama())
    rotary = result.model.model.rotary_emb
    rotary.inv_freq.mul_(0.5)  # nothing in the config would tell
    expected = rotary.inv_freq.clone()
    save(result, tmp_path)
    assert torch.equal(load(tmp_path).model.rotary_emb.inv_freq, expected)
    assert "inv_freq" not in "".join(load(tmp_path).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_precision_is_that_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    result = pruned(randomised(llama()).to(dtype))
    result.model.lm_head.float()
    save(result, tmp_path)
    assert_same(load(tmp_path), result.model)
    assert load(tmp_path).config.dtype == dtype


def test_config_generation_config_and_tokenizer_are_kept(tmp_path: Path) -> None:
    transformers = library()
    from tokenizers import Tokenizer, models

    vocabulary = {"[UNK]": 0, "prune": 1, "me": 2}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    result = pruned(gpt2())
    result.model.generation_config.max_new_tokens = 7
    result.model.config.id2label = {0: "bad", 1: "good", 2: "ugly"}
    save(result, tmp_path, tokenizer=tokenizer, metadata={"note": "hello"})
    small = load(tmp_path)
    assert small.generation_config.max_new_tokens == 7
    assert small.config.id2label == {0: "bad", 1: "good", 2: "ugly"}
    assert small.config.n_inner == result.model.config.n_inner  # of the dense model
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab() == vocabulary
    known = transformers.AutoConfig.from_pretrained(tmp_path)
    known.name_or_path = ""
    assert known.to_dict() == small.config.to_dict()
    assert describe(tmp_path).metadata == {"note": "hello"}
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_an_identity_plan_and_a_model_on_the_meta_device(tmp_path: Path) -> None:
    model = randomised(llama())
    save(model, tmp_path)
    assert_same(load(tmp_path), model)
    with torch.device("meta"):
        empty = llama()
    assert_same(load(tmp_path, empty), model)  # the folder has every buffer,
    save(model, tmp_path / "file.safetensors")
    with pytest.raises(ArtifactError, match=r"no values for 'inv_freq' of module 'model\.rotary_emb'"):
        load(tmp_path / "file.safetensors", empty)  # the file has not


def test_the_path_chooses_the_form(tmp_path: Path) -> None:
    result = pruned(gpt2())
    save(result, tmp_path / "file.safetensors")
    save(result, f"{tmp_path}{os.sep}folder.safetensors{os.sep}")
    (tmp_path / "old").write_bytes(b"")
    save(result, tmp_path / "old")
    assert (tmp_path / "file.safetensors").is_file() and (tmp_path / "old").is_file()
    assert (tmp_path / "folder.safetensors").is_dir()
    for name in ("file.safetensors", "folder.safetensors", "old"):
        assert_same(load(tmp_path / name, randomised(gpt2(), seed=1)), result.model)


# What a folder cannot be


def test_only_transformers_models_become_folders(tmp_path: Path) -> None:
    plain = Result(shrink(dense(), plan_for(dense())), plan_for(dense()))
    with pytest.raises(ArtifactError, match=r"Only a transformers model, which its config can rebuild"):
        save(plain, tmp_path)
    with pytest.raises(ArtifactError, match="Only a transformers model"):
        save(plain, f"{tmp_path}/new/")
    with pytest.raises(ArtifactError, match="tokenizer is saved in a folder"):
        save(plain, tmp_path / "file", tokenizer=object())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    save(plain, tmp_path / "file")
    with pytest.raises(InputError, match=r"pass the dense model, load\(path, build_model\(\)\)"):
        load(tmp_path / "file")
    save(plain, tmp_path / TENSORS)
    with pytest.raises(ArtifactError, match=r"there is no file .*config\.json"):
        load(tmp_path)
    assert tensor_shapes(load(tmp_path, dense(seed=1))) == tensor_shapes(plain.model)


def test_a_tokenizer_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer is saved in a folder.*becomes a file"):
        save(pruned(gpt2()), tmp_path / "small.safetensors", tokenizer=object())  # type: ignore[arg-type]


def changed(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


UNKNOWN = [
    "NoSuchModel",
    "torch.nn.Linear",
    "os.system",
    "__class__",
    "AutoModel",
    "PreTrainedModel",
    "pipeline",
    "../x",
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_only_models_of_the_installed_library_are_built(name: str, tmp_path: Path) -> None:
    save(pruned(gpt2()), tmp_path)
    changed(tmp_path, architectures=[name])
    with pytest.raises(ArtifactError, match=r"is no model of the installed transformers .* pass the dense model"):
        load(tmp_path)


@pytest.mark.parametrize("entry", [None, [], "GPT2LMHeadModel", [7], ["GPT2LMHeadModel", "GPT2Model"]])
def test_one_class_must_be_named(entry: Any, tmp_path: Path) -> None:
    save(pruned(gpt2()), tmp_path)
    changed(tmp_path, architectures=entry)
    with pytest.raises(ArtifactError, match="must name one class"):
        load(tmp_path)


def test_a_class_of_the_users_own_is_not_taken_for_the_librarys(tmp_path: Path) -> None:
    original = library().GPT2LMHeadModel
    own = type("GPT2LMHeadModel", (original,), {"__module__": "mine"})
    result = pruned(own(gpt2().config))
    save(result, tmp_path)
    with pytest.raises(ArtifactError, match=r"names the class 'mine\.GPT2LMHeadModel'"):
        load(tmp_path)
    assert_same(load(tmp_path, own(result.model.config)), result.model)


def test_a_config_of_another_size_names_the_first_tensor(tmp_path: Path) -> None:
    save(pruned(gpt2()), tmp_path)
    changed(tmp_path, n_inner=40)
    with pytest.raises(PlanMismatchError, match=r"another architecture.*'transformer\.h\.0\.mlp\.c_fc\.weight'"):
        load(tmp_path)


def test_a_write_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(pruned(randomised(gpt2())), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*No space left"):
        save(pruned(randomised(gpt2(), seed=1)), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# The Hub mixin, on local folders


def net_class() -> Any:
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install 'secateur[hf]'")
    pytest.importorskip("jinja2", reason="model cards need jinja2")
    from secateur.hub import HubMixin

    class Net(nn.Module, HubMixin):
        def __init__(self, width: int = 4, scale: float = 1.0) -> None:
            super().__init__()
            self.body, self.head, self.scale = nn.Linear(3, width), nn.Linear(width, 2), scale

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.body(x))) * self.scale

    return Net


def net_plan(model: nn.Module, kept: tuple[int, ...]) -> Plan:
    shapes = tensor_shapes(model)
    ends = (("body.weight", 0), ("body.bias", 0), ("head.weight", 1))
    return Plan(cuts=tuple(Cut(name, dim, shapes[name][dim], kept) for name, dim in ends), edits=(), shapes=shapes)


def test_a_pruned_net_of_ones_own_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = net_class()
    model = net(width=8, scale=2.0)
    plan = net_plan(model, (1, 4, 5, 7))
    small: Any = shrink(model, plan)
    small.save_pretrained(tmp_path, plan=plan)
    loaded = net.from_pretrained(tmp_path)
    assert_same(loaded, small)
    assert type(loaded) is net and loaded.scale == 2.0 and not loaded.training and loaded.pruning_plan == plan
    x = torch.randn(2, 3)
    assert torch.equal(loaded(x), small(x))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", TENSORS]
    assert json.loads((tmp_path / "config.json").read_text()) == {"width": 8, "scale": 2.0}
    assert "library_name: secateur" in (tmp_path / "README.md").read_text()
    assert capsys.readouterr().out == ""


def test_saving_again_needs_no_plan_and_more_pruning_only_its_own(tmp_path: Path) -> None:
    net = net_class()
    model = net(width=8)
    first = net_plan(model, (1, 4, 5, 7))
    shrink(model, first).save_pretrained(tmp_path / "a", plan=first)
    loaded = net.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()
    second = net_plan(loaded, (0, 2))
    smaller: Any = shrink(loaded, second)
    with pytest.raises(PlanMismatchError):
        smaller.save_pretrained(tmp_path / "c")
    for _ in range(2):
        smaller.save_pretrained(tmp_path / "c", plan=second)
        assert_same(net.from_pretrained(tmp_path / "c"), smaller)
    assert net.from_pretrained(tmp_path / "c").pruning_plan.cuts[0].kept == (1, 5)


def test_a_plan_that_was_forgotten_is_asked_for(tmp_path: Path) -> None:
    model = net_class()(width=8)
    small: Any = shrink(model, net_plan(model, (0, 1)))
    with pytest.raises(
        InputError, match=r"if it was pruned, pass the plan: save_pretrained\(folder, plan=pruned\.plan"
    ):
        small.save_pretrained(tmp_path)
    assert not (tmp_path / TENSORS).exists()


def test_a_net_that_was_not_pruned_needs_no_plan(tmp_path: Path) -> None:
    net = net_class()
    model = net(width=5)
    model.save_pretrained(tmp_path)
    assert_same(net.from_pretrained(tmp_path), model)


def test_a_pickle_is_no_way_in(tmp_path: Path) -> None:
    net = net_class()
    net().save_pretrained(tmp_path)
    (tmp_path / TENSORS).unlink()
    torch.save(net().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"there is no file .*model\.safetensors"):
        net.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / TENSORS)
    with pytest.raises(ArtifactError, match="this is a pickle in a zip archive"):
        net.from_pretrained(tmp_path)


def test_uploading_sends_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.hub_mixin as hub

    class Api:
        sent: dict[str, bytes]

        def __init__(self, token: object) -> None:
            pass

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path: Path, **_: Any) -> str:
            Api.sent = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            return "address"

    monkeypatch.setattr(hub, "HfApi", Api)
    model = net_class()(width=8)
    plan = net_plan(model, (0, 3))
    small: Any = shrink(model, plan)
    assert small.push_to_hub("me/small", plan=plan) == "address"
    small.save_pretrained(tmp_path, plan=plan)
    assert Api.sent == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
