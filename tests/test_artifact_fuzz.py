"""Hostile and damaged files: a clear error or the model that was saved; no code run, nothing written, no memory."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pretrained_for_tests import BUILDERS, WIDTH, gpt2, mlp_plan, randomised
from secateur.artifacts import TENSORS, load, save
from secateur.errors import ArtifactError, PlanMismatchError
from secateur.plans import Cut, Edit, Plan, Width, tensor_shapes
from secateur.shrinking import shrink
from test_artifacts import Result, assert_same

Json = Any
MANY = 2000  # examples of a slow test


# What watches over a load

FORBIDDEN = (
    "exec",
    "compile",
    "pickle.",
    "marshal.",
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "webbrowser.",
)
HARMLESS = ("os.listdir", "os.scandir")
LIBRARIES = {"torch", "transformers", "secateur", "numpy", "safetensors", "huggingface_hub", *sys.stdlib_module_names}
_watching: list[list[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    foreign = event == "import" and arguments[0].partition(".")[0] not in LIBRARIES
    forbidden = event.startswith(FORBIDDEN) and event not in HARMLESS
    if foreign or ((writes or forbidden) and not _importing()):
        _watching[-1].append(f"{event} {arguments}"[:200])


def _importing() -> bool:
    """Whether a library is just importing a part of itself, which runs code, of its own."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame.f_back is not None


sys.addaudithook(_audit)  # stays for the life of the process, hence the list


@contextmanager
def harmless(memory: int = 2**28) -> Iterator[None]:
    """Fail if code is run, a pickle opened, a process or connection made, a file written, or much memory asked for."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, limits[1]))
    _watching.append([])
    try:
        yield
    finally:
        seen = _watching.pop()
        resource.setrlimit(resource.RLIMIT_AS, limits)
        assert not seen, seen


def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    crimes = [
        lambda: exec("1"),
        lambda: eval("1"),
        lambda: __import__("no_library_of_ours"),
        lambda: pickle.loads(pickle.dumps(os.getcwd)),
        lambda: os.system("true"),
        lambda: subprocess.run(["true"], check=True),
        lambda: socket.create_connection(("127.0.0.1", 1)),
        lambda: (tmp_path / "new").write_text(""),
    ]
    for crime in crimes:
        with pytest.raises(AssertionError), harmless(), suppress(OSError):
            crime()
    with pytest.raises((MemoryError, RuntimeError)), harmless():
        torch.ones(2**28)
    with harmless():
        torch.ones(2**20)


# A small file that has something in every field of the plan


class Block(nn.Module):
    """Reads a size off its input, as a module does that is replaced by its graph form."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).reshape(x.shape[0], 4)


def dense(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"block": Block(), "norm": nn.BatchNorm1d(4), "attention": nn.MultiheadAttention(4, 2)})
    return model.eval()


PROGRAM = {
    "args": ["tuple", ["value", 0]],
    "kwargs": ["dict"],
    "steps": [
        ["module:inner", ["tuple", ["value", 0]], ["dict"], ["value", 1]],
        ["torch.Tensor.reshape", ["tuple", ["value", 1], ["size", ["value", 0], 0], ["attribute", "", "width", None]],
         ["dict"], ["value", 2]],
    ],
    "guards": [[["size", ["value", 0], 1], 3, "keep"]],
    "output": ["value", 2],
    "sizes": {"width": 4},
}  # fmt: skip


@cache
def sample() -> tuple[bytes, str]:
    """A valid file, and the plan in it as JSON."""
    kept = (0, 2)
    model = dense()
    ends = ("block.inner.weight", "block.inner.bias", "norm.weight", "norm.bias", "norm.running_mean")
    plan = Plan(
        cuts=(*(Cut(name, 0, 4, kept) for name in ends), Cut("norm.running_var", 0, 4, kept, fill=1.0)),
        edits=(Edit("block", "width", None, 4, 2),),
        shapes=tensor_shapes(model),
        widths=(Width("block.inner", 4, 2),),
        channels=(4, 2),
        macs=(12, 6),
        params=(16, 8),
        groups=("block.inner",),
        norms=(Cut("norm:0", 1, 4, kept),),
    )
    text = json.dumps({**json.loads(plan.to_json()), "replacements": [["block", PROGRAM], ["attention", None]]})
    plan = Plan.from_json(text)
    with TemporaryDirectory() as folder:
        save(Result(shrink(model, plan), plan), Path(folder) / "file")
        return (Path(folder) / "file").read_bytes(), plan.to_json()


def expected() -> nn.Module:
    return shrink(dense(), Plan.from_json(sample()[1]))


def with_plan(text: str) -> bytes:
    """The sample with another text as its plan; the checksum is left as it was."""
    content = sample()[0]
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["secateur.plan"] = text
    new = json.dumps(header).encode()
    return struct.pack("<Q", len(new)) + new + content[8 + length :]


def loaded(content: bytes, *, forged: bool = False) -> nn.Module | None:
    """The model in a file, or None where it was refused by a clear error. `forged`: as if the checksum were right."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        model = unpruned()
        with mock.patch("secateur.artifacts._matches", return_value=True) if forged else nullcontext(), harmless():
            try:
                small = load(path, model)
            except (ArtifactError, PlanMismatchError) as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
                return None
            if forged and hasattr(small, "__getitem__"):
                with suppress(Exception):  # whatever a forged plan computes, the watch is on
                    small["block"](torch.ones(2, 3))
            return small


@cache
def unpruned() -> nn.Module:
    return dense(seed=1)  # loading does not change it


def assert_as_saved_or_refused(content: bytes) -> bool:
    small = loaded(content)
    if small is not None:
        assert_same(small, expected())
    return small is not None


def test_the_untouched_file_loads() -> None:
    content, text = sample()
    assert assert_as_saved_or_refused(content)
    small: Any = loaded(with_plan(text), forged=True)
    assert_same(small, expected())
    assert small["block"](torch.ones(2, 3)).shape == (2, 2)
    assert not assert_as_saved_or_refused(with_plan(text.replace('"macs":[12,6]', '"macs":[12,7]')))


def test_the_sample_has_something_in_every_field_of_a_plan() -> None:
    plan = json.loads(sample()[1])
    assert set(plan) == {field.name for field in fields(Plan)} | {"format"}
    assert all(plan.values())


# Damage


@pytest.mark.parametrize("step", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_truncated_at_every_length(step: int) -> None:
    content = sample()[0]
    for length in range(0, len(content), step):
        assert loaded(content[:length]) is None, length
        assert loaded(content[:length], forged=True) is None, length


@pytest.mark.parametrize("step", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_every_single_bit_flipped(step: int) -> None:
    content = sample()[0]
    survived = 0
    for place in range(0, 8 * len(content), step):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        survived += assert_as_saved_or_refused(bytes(flipped))
    assert survived <= 8  # such as white space before the tensors


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid file with some bytes changed, and up to one stretch cut out and one put in."""
    content = bytearray(sample()[0])
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    for _ in range(draw(st.integers(0, 1))):
        start = draw(st.integers(0, len(content) - 1))
        del content[start : start + draw(st.integers(0, len(content)))]
    for _ in range(draw(st.integers(0, 1))):
        start = draw(st.integers(0, len(content)))
        content[start:start] = draw(st.binary(max_size=40))
    return bytes(content)


def check_damage(content: bytes) -> None:
    assert_as_saved_or_refused(content)
    small = loaded(content, forged=True)
    if small is not None:
        assert tensor_shapes(small) == tensor_shapes(expected())


test_random_damage = given(content=damaged())(check_damage)
test_much_random_damage = pytest.mark.slow(settings(max_examples=MANY)(given(content=damaged())(check_damage)))


@given(content=st.binary(max_size=200) | st.binary(max_size=200).map(lambda rest: struct.pack("<Q", len(rest)) + rest))
def test_noise_is_refused(content: bytes) -> None:
    assert loaded(content) is None and loaded(content, forged=True) is None


# Plans changed on purpose, under a forged checksum

HOSTILE: tuple[Json, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 2**31, 2**63, 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf")),
    *(
        "",
        "block",
        "norm",
        "forward",
        "__class__",
        "__init__.__globals__",
        "os.system",
        "torch.load",
        "../../x",
        "\0\n",
    ),
    *("torch.ops.aten.add", "module:__class__", "module:..", "torch.Tensor.__class__", "x" * 5000),
    *([], {}, [[]], [0, 2**40], ["value", 2**62], ["leaf", "__class__"], ["dtype", "load"], {"": 0}, {"forward": 1}),
)


def deep(levels: int = 5000) -> str:
    """JSON nested deeper than a parser goes along with."""
    return "[" * levels + "]" * levels


def places(value: Json) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, as keys from the top."""
    yield ()
    entries: Iterable[tuple[Any, Json]] = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    for key, entry in entries:
        yield from ((key, *rest) for rest in places(entry))


def put(value: Json, place: tuple[Any, ...], new: Json) -> Json:
    """A copy with another value at that place."""
    if not place:
        return new
    changed = copy.copy(value)
    changed[place[0]] = put(value[place[0]], place[1:], new)
    return changed


def at(value: Json, place: tuple[Any, ...]) -> Json:
    for key in place:
        value = value[key]
    return value


def variants(value: Json) -> Iterator[Json]:
    """What a value could be changed into by leaving out, doubling and adding entries."""
    if isinstance(value, list) and value:
        yield from (value[1:], value[:-1], [*value, value[-1]], value[::-1], [value])
    if isinstance(value, dict):
        yield {**value, "extra": 1}
        yield from ({key: entry for key, entry in value.items() if key != gone} for gone in value)


def one_of_each_kind(value: Json) -> list[tuple[Any, ...]]:
    """Places that differ in more than the position in a list."""
    kinds = {tuple(key if isinstance(key, str) else "*" for key in place): place for place in places(value)}
    return list(kinds.values())


def check_plan(text: str) -> bool:
    """Refused, or a model of the shapes that the plan announces."""
    small = loaded(with_plan(text), forged=True)
    if small is not None:
        assert tensor_shapes(small) == Plan.from_json(text).shapes_after()
    return small is not None


@pytest.mark.untraced
@pytest.mark.parametrize("field", [field.name for field in fields(Plan)])
@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_every_part_of_a_plan_replaced_by_every_hostile_value(field: str, share: int) -> None:
    plan = json.loads(sample()[1])
    inside = one_of_each_kind(plan[field]) if share > 1 else list(places(plan[field]))
    refused = 0
    for number, place in enumerate(inside):
        values = [*HOSTILE, *variants(at(plan[field], place))]
        for value in values[number % share :: share]:
            refused += not check_plan(json.dumps(put(plan, (field, *place), value)))
    assert refused


@pytest.mark.parametrize("field", [field.name for field in fields(Plan)])
def test_nesting_and_numbers_without_end(field: str) -> None:
    plan = json.loads(sample()[1])
    for place in one_of_each_kind(plan[field]):
        for text in (deep(), "9" * 5000, '{"a":' * 3000 + "1" + "}" * 3000):
            marked = json.dumps(put(plan, (field, *place), "MARK"))
            assert not check_plan(marked.replace('"MARK"', text))


@st.composite
def plans(draw: st.DrawFn) -> str:
    """The sample's plan with one to three places changed."""
    plan = json.loads(sample()[1])
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(HOSTILE),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    )
    for _ in range(draw(st.integers(1, 3))):
        field = draw(st.sampled_from([key for key in plan if not isinstance(plan[key], int)] or [*plan]))
        place = (field, *draw(st.sampled_from(list(places(plan[field])))))
        known = [at(plan, other) for other in places(plan)]  # a part of the plan in the wrong place
        choices = anything | st.sampled_from(known) | st.sampled_from([None, *variants(at(plan, place))])
        plan = put(plan, place, draw(choices))
    return json.dumps(plan)


def check_changed_plan(text: str) -> None:
    check_plan(text)


test_plans_changed_at_random = given(text=plans())(check_changed_plan)
test_many_plans_changed_at_random = pytest.mark.slow(
    settings(max_examples=MANY)(given(text=plans())(check_changed_plan))
)


# Tensors that are no tensors of the model


@pytest.mark.parametrize(
    "name", ["../../escaped", "/etc/passwd", "block.inner.weight/../x", "\0", "__class__", "a" * 10_000]
)
def test_names_of_tensors_lead_nowhere(name: str) -> None:
    content = sample()[0]
    (length,) = struct.unpack("<Q", content[:8])
    for old in ("block.inner.bias", "norm.running_var"):
        header = json.loads(content[8 : 8 + length])
        header[name] = header.pop(old)
        new = json.dumps(header).encode()
        assert loaded(struct.pack("<Q", len(new)) + new + content[8 + length :], forged=True) is None


@pytest.mark.parametrize("shape", [[2**62], [2**40, 2**40], [2**31, 0], [0], [10**400], [], [1] * 64, [2, 1], [-2]])
def test_shapes_that_promise_more_than_there_is(shape: list[int]) -> None:
    content = sample()[0]
    (length,) = struct.unpack("<Q", content[:8])
    for end in (None, 2**62, 2**70):
        header = json.loads(content[8 : 8 + length])
        header["norm.bias"]["shape"] = shape
        if end is not None:
            header["norm.bias"]["data_offsets"][1] = end
        new = json.dumps(header).encode()
        assert loaded(struct.pack("<Q", len(new)) + new + content[8 + length :], forged=True) is None


# Folders


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved transformers model."""
    return written(good_folder("gpt2")[0], tmp_path / "folder")


@cache
def good_folder(name: str) -> tuple[dict[str, bytes], nn.Module]:
    """The files of a saved transformers model, and the model."""
    model = randomised(BUILDERS[name]())
    small = shrink(model, mlp_plan(model))
    with TemporaryDirectory() as folder:
        save(Result(small, mlp_plan(model)), folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}, small


def written(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for member, content in files.items():
        (folder / member).write_bytes(content)
    return folder


def refused(folder: Path, message: str) -> None:
    with pytest.raises((ArtifactError, PlanMismatchError), match=message), harmless():
        load(folder)


def test_an_untouched_folder_loads(folder: Path) -> None:
    with harmless():
        small = load(folder)
    assert sum(p.abs().sum() for p in small.parameters()) > 0


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("member", [TENSORS, "config.json", "generation_config.json"])
def test_pickles_in_a_folder(member: str, protocol: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / member).write_bytes(pickle.dumps(Canary(), protocol=protocol))
    refused(folder, "pickle|no safetensors file|not readable JSON")
    assert not (folder / "exploded").exists()


def test_pickles_beside_the_members_are_not_looked_at(folder: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save(Canary(), folder / name)
    (folder / "modeling_gpt2.py").write_text("raise SystemExit")
    with harmless():
        load(folder)


@pytest.mark.parametrize("member", [TENSORS, "config.json", "generation_config.json"])
def test_members_that_are_no_files(member: str, folder: Path) -> None:
    path = folder / member
    for make in (
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(folder),
        lambda: path.symlink_to(path),
        lambda: os.mkfifo(path),
        path.mkdir,
    ):
        path.unlink()
        make()
        refused(folder, "not a file|cannot read|no file")
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
            path.touch()
    path.rmdir() if path.is_dir() else path.unlink()


def test_links_are_followed_in_reading_and_replaced_in_writing(folder: Path, tmp_path: Path) -> None:
    before = load(folder)
    for name in (TENSORS, "config.json"):  # as a download cache lays them out
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert_same(load(folder), before)
    old = {name: (tmp_path / name).read_bytes() for name in (TENSORS, "config.json")}
    save(randomised(gpt2(), seed=3), folder)
    assert {name: (tmp_path / name).read_bytes() for name in old} == old
    assert not any(path.is_symlink() for path in folder.iterdir())


def edited(folder: Path, member: str, **entries: Json) -> None:
    path = folder / member
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


CONFIGS: dict[str, tuple[dict[str, Json], str]] = {
    "remote code is not looked at": ({"auto_map": {"AutoConfig": "evil--x.Config", "AutoModel": "x.M"}}, ""),
    "nor are kernels from the hub": ({"attn_implementation": "evil/kernel"}, ""),
    "nor those under private names": ({"_attn_implementation_internal": "evil/kernel"}, ""),
    "nor labels without end": ({"num_labels": 10**9}, ""),
    "nor quantisation": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ""),
    "layers without end": ({"n_layer": 10**9}, "claims n_layer = 1000000000"),
    "more layers than were saved": ({"n_layer": 900}, "far more layers than were saved"),
    "some more layers": ({"n_layer": 3}, "another architecture"),
    "a vocabulary without end": ({"vocab_size": 10**12}, "claims vocab_size"),
    "a large vocabulary": ({"vocab_size": 2**24}, "another architecture"),
    "large everything": (
        {"vocab_size": 2**24, "n_positions": 2**24, "n_embd": 2**24},
        "another architecture|cannot|not",
    ),
    "a function as a type": ({"dtype": "load"}, "names the dtype 'load'"),
    "something to fetch": ({"backbone": "hf-hub:evil/model"}, "names something to fetch"),
    "another kind of model": ({"architectures": ["BertModel"]}, "not describe|another architecture"),
    "a text as a number": ({"n_embd": "32"}, "does not describe a model"),
    "no heads": ({"n_head": 0}, "does not describe a model"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_configs(case: str, folder: Path) -> None:
    entries, message = CONFIGS[case]
    before = load(folder)
    edited(folder, "config.json", **entries)
    if message:
        refused(folder, message)
    else:
        with harmless():
            assert_same(load(folder), before)


def test_configs_that_are_no_json(folder: Path) -> None:
    for member in ("config.json", "generation_config.json"):
        old = (folder / member).read_bytes()
        for text in ("", "{", "[]", "7", '{"a": NaN}', '{"a": ' + deep(100_000) + "}", '{"a": 1, "a": 2}', "\0"):
            (folder / member).write_text(text)
            refused(folder, "JSON")
        (folder / member).write_bytes(b'{"a": "' + b"x" * 11_000_000 + b'"}')
        refused(folder, "at most")
        (folder / member).write_bytes(old)
    load(folder)


def test_the_dense_model_is_never_allocated(tmp_path: Path) -> None:
    inner = 2**23  # two matrices of a gigabyte in each of two layers
    with torch.device("meta"):
        config = gpt2().config
        config.n_inner = inner
        model = type(gpt2())(config)
    plan = mlp_plan(model, kept=(0, 5))
    assert sum(parameter.nbytes for parameter in model.parameters()) > 2**32 > 2 * inner * WIDTH * 4
    small = shrink(model, plan).to_empty(device="cpu")
    small.tie_weights()
    save(Result(randomised(small), plan), tmp_path)
    load(tmp_path)
    with harmless():
        assert_same(load(tmp_path), small)


def check_config(name: str, place: tuple[Any, ...], value: Json) -> None:
    """Refused, or the model that was saved: the tensors are in the file, and a config cannot change them."""
    files, small = good_folder(name)
    config = put(json.loads(files["config.json"]), place, value)
    with TemporaryDirectory() as folder:
        written({**files, "config.json": json.dumps(config).encode()}, Path(folder))
        with suppress(ArtifactError, PlanMismatchError), harmless():
            again = load(folder)
            assert tensor_shapes(again) == tensor_shapes(small)


@settings(max_examples=30)
@given(data=st.data())
def test_configs_changed_at_random(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*BUILDERS]))
    config = json.loads(good_folder(name)[0]["config.json"])
    place = data.draw(st.sampled_from([place for place in places(config) if place]))
    check_config(name, place, data.draw(st.sampled_from(HOSTILE)))


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_every_entry_of_a_config_replaced_by_every_hostile_value(name: str) -> None:
    config = json.loads(good_folder(name)[0]["config.json"])
    for place in places(config):
        for value in HOSTILE if place else ():
            check_config(name, place, value)
