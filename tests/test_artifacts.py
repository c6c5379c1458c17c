"""Saving and loading: what was saved comes back bit for bit, and nothing else is ever let in."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.artifacts import describe, load, save
from secateur.errors import ArtifactError, InputError, ModelError, PlanMismatchError, SecateurError
from secateur.plans import Cut, Edit, Plan, Width, tensor_shapes
from secateur.shrinking import shrink


def dense(seed: int = 0) -> nn.Sequential:
    """Conv, BatchNorm, ReLU, Conv; every tensor random, statistics too."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def plan_for(model: nn.Module) -> Plan:
    """Keep channels 0 and 2 of the first conv."""
    kept = (0, 2)
    ends = [("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("1.running_mean", 0), ("3.weight", 1)]
    return Plan(
        cuts=(*(Cut(name, dim, 4, kept) for name, dim in ends), Cut("1.running_var", 0, 4, kept, fill=1.0)),
        edits=(
            Edit("0", "out_channels", None, 4, 2),
            Edit("1", "num_features", None, 4, 2),
            Edit("3", "in_channels", None, 4, 2),
        ),
        shapes=tensor_shapes(model),
        widths=(Width("0", 4, 2),),
        channels=(4, 2),
        groups=("0",),
    )


@dataclass
class Result:
    """Any object with a model and a plan will do."""

    model: nn.Module
    plan: Plan


@pytest.fixture
def pruned() -> Result:
    model = dense()
    return Result(shrink(model, plan_for(model)), plan_for(model))


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


# What was saved comes back


def test_round_trip_is_bit_for_bit(pruned: Result, tmp_path: Path) -> None:
    save(pruned, tmp_path / "small.safetensors", metadata={"trained on": "digits"})
    model = dense(seed=1)
    before = copy.deepcopy(model)
    small = load(tmp_path / "small.safetensors", model)
    assert_same(small, pruned.model)
    assert_same(model, before)
    x = torch.randn(2, 2, 5, 5)
    assert torch.equal(small(x), pruned.model(x))
    assert not torch.equal(small(x), model(x))
    small(x).sum().backward()  # and it can be trained


def test_a_module_and_its_plan_save_the_same_bytes(pruned: Result, tmp_path: Path) -> None:
    save(pruned, tmp_path / "a")
    save(pruned.model, tmp_path / "b", plan=pruned.plan)
    save(pruned, str(tmp_path / "c"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_a_module_without_a_plan_fits_its_own_architecture(tmp_path: Path) -> None:
    save(dense(), tmp_path / "file")
    assert_same(load(tmp_path / "file", dense(seed=1)), dense())
    assert describe(tmp_path / "file").plan.is_identity


def test_describe_tells_plan_metadata_and_tensors(pruned: Result, tmp_path: Path) -> None:
    save(pruned, tmp_path / "file", metadata={"note": "é"})
    artifact = describe(tmp_path / "file")
    assert artifact.plan == pruned.plan
    assert artifact.metadata == {"note": "é"}
    assert str(artifact.tensors["0.weight"]) == "float32 [2, 2, 3, 3]"
    assert set(artifact.tensors) == set(pruned.model.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_given_model(training: bool, pruned: Result, tmp_path: Path) -> None:
    save(pruned, tmp_path / "file")
    small = load(tmp_path / "file", dense().train(training))
    assert all(module.training is training for module in small.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_every_dtype_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    def make(value: float) -> nn.Module:
        module = nn.Module()
        module.register_parameter("weight", nn.Parameter(torch.full((3, 2), value).to(dtype), requires_grad=False))
        module.register_buffer("flags", torch.tensor([value > 1, True]))
        module.register_buffer("count", torch.tensor(int(value)))
        return module

    save(make(1.7), tmp_path / "file")
    small = load(tmp_path / "file", make(0.3))
    for name, tensor in make(1.7).state_dict().items():
        assert small.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(small.state_dict()[name].to(torch.complex64), tensor.to(torch.complex64))


class Tied(nn.Module):
    def __init__(self, fill: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        nn.init.constant_(self.embed.weight, fill)
        self.out.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(4), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embed(ids))


def test_tied_tensors_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    save(Tied(2.0), tmp_path / "file")
    assert set(describe(tmp_path / "file").tensors) == {"embed.weight"}  # and no buffer that is not persistent
    small = load(tmp_path / "file", Tied(1.0))
    assert small.out.weight is small.embed.weight
    assert torch.equal(small.out.weight, torch.full((6, 4), 2.0))


def test_views_of_one_storage_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    def make(start: float) -> nn.Module:
        module = nn.Module()
        storage = torch.arange(start, start + 24.0).view(4, 6)
        for name, view in {"a": storage[:2], "b": storage[2:], "c": storage.t(), "d": storage[:, ::2]}.items():
            module.register_parameter(name, nn.Parameter(view))
        return module

    save(make(0.0), tmp_path / "file")
    assert set(describe(tmp_path / "file").tensors) == set("abcd")
    assert_same(load(tmp_path / "file", make(50.0)), make(0.0))


def test_the_file_is_plain_safetensors(pruned: Result, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save(pruned, tmp_path / "file")
    tensors = load_file(tmp_path / "file")
    assert torch.equal(tensors["0.weight"], pruned.model.state_dict()["0.weight"])


def test_a_header_length_that_looks_like_a_pickle_is_read(pruned: Result, tmp_path: Path) -> None:
    path = tmp_path / "file"
    save(pruned, path, metadata={"padding": ""})
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    save(pruned, path, metadata={"padding": "x" * (0x1_02_80 - length)})
    assert path.read_bytes()[:2] == b"\x80\x02"  # as a pickle of protocol 2 starts
    assert_same(load(path, dense(seed=1)), pruned.model)


# What is not let in


@pytest.fixture
def valid(pruned: Result, tmp_path: Path) -> Path:
    path = tmp_path / "valid.safetensors"
    save(pruned, path)
    return path


def refused(path: Path | str, message: str, model: nn.Module | None = None) -> None:
    with pytest.raises(ArtifactError, match=message):
        load(path, model or dense())


def test_what_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "there is no file")
    refused(tmp_path, "a folder or a device")
    refused("/dev/null", "a folder or a device")
    refused("with\0null", "cannot read")
    refused(tmp_path / ("x" * 5000), "cannot read")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "is empty")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_are_recognised_and_not_opened(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    refused("file", "this is a pickle" if protocol >= 2 else "no safetensors file")
    for new in (True, False):
        torch.save({"bomb": Bomb()}, "file", _use_new_zipfile_serialization=new)
        refused("file", "this is a pickle")
    assert not Path("exploded").exists()


def test_other_files(tmp_path: Path) -> None:
    for content in (b"{}", b"hello, world", b"\x89HDF\r\n\x1a\n" + bytes(50), bytes(8), b"\xff" * 100):
        (tmp_path / "file").write_bytes(content)
        refused(tmp_path / "file", "no safetensors file")


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.9, 0.999])
def test_truncated_files(share: float, valid: Path) -> None:
    content = valid.read_bytes()
    valid.write_bytes(content[: max(9, int(share * len(content)))])
    refused(valid, "truncated")
    valid.write_bytes(content + b"\0")
    refused(valid, "1 bytes after the last tensor")


def test_plain_weights_have_no_plan(tmp_path: Path) -> None:
    save_file(dense().state_dict(), tmp_path / "file")
    refused(tmp_path / "file", "no pruning plan: it was not written by secateur.save")


Header = dict[str, Any]


def change(path: Path, edit: Callable[[Header], Any]) -> None:
    """Rewrite the header of a file by `edit`, which changes it in place or returns a text to put instead."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edited = edit(header)
    text = edited if isinstance(edited, (str, bytes)) else json.dumps(header)
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def tampered(**changes: Any) -> Callable[[Header], None]:
    """An edit of the tensor 0.weight's entry."""
    return lambda header: header["0.weight"].update(changes)


NONSENSE: dict[str, tuple[Callable[[Header], Any], str]] = {
    "not json": (lambda h: "{nonsense", "not readable JSON"),
    "not utf-8": (lambda h: b'{"\xff": 1}', "not readable JSON"),
    "nested too deep": (lambda h: '{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "not readable JSON"),
    "long number": (lambda h: '{"a":' + "9" * 5000 + "}", "not readable JSON"),
    "name twice": (lambda h: '{"a": 1, "a": 1}', "occurs twice"),
    "metadata is a list": (lambda h: h.update(__metadata__=[]), "not a table of texts"),
    "metadata holds numbers": (lambda h: h["__metadata__"].update(a=1), "not a table of texts"),
    "entry is a number": (lambda h: h.update({"0.weight": 7}), "nonsense about tensor '0.weight'"),
    "entry lacks its shape": (lambda h: h["0.weight"].pop("shape"), "nonsense"),
    "unknown dtype": (tampered(dtype="F3"), "unknown dtype 'F3'"),
    "dtype is a list": (tampered(dtype=[]), "nonsense"),
    "shape is a text": (tampered(shape="22"), "nonsense"),
    "negative shape": (tampered(shape=[-2, -2, 3, 3]), "nonsense"),
    "fractional shape": (tampered(shape=[2.0, 2, 3, 3]), "nonsense"),
    "boolean shape": (tampered(shape=[True, 36]), "nonsense"),
    "too many dims": (tampered(shape=[1] * 65), "nonsense"),
    "shape bomb": (tampered(shape=[2**40, 2**40]), "nonsense"),
    "offset bomb": (tampered(data_offsets=[0, 2**70]), "nonsense"),
    "three offsets": (tampered(data_offsets=[0, 1, 2]), "nonsense"),
    "offsets not as long as the shape": (tampered(data_offsets=[0, 8]), "nonsense"),
    "a gap": (lambda h: h.pop("0.weight"), "starts at byte"),
    "consistent bomb": (
        lambda h: h.update({"z": {"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}}),
        "starts at byte|truncated",
    ),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_headers_that_make_no_sense(case: str, valid: Path) -> None:
    edit, message = NONSENSE[case]
    change(valid, edit)
    refused(valid, message)


def test_absurd_header_lengths(valid: Path) -> None:
    content = valid.read_bytes()
    for length, message in ((2**63, "claims a header"), (len(content), "truncated")):
        valid.write_bytes(struct.pack("<Q", length) + content[8:])
        refused(valid, message)


def plan_edit(edit: Callable[[Header], Any]) -> Callable[[Header], None]:
    """An edit of the plan within the header."""

    def whole(header: Header) -> None:
        plan = json.loads(header["__metadata__"]["secateur.plan"])
        edit(plan)
        header["__metadata__"]["secateur.plan"] = json.dumps(plan)

    return whole


PLANS: dict[str, tuple[Callable[[Header], Any], str]] = {
    "not json": (lambda h: h["__metadata__"].update({"secateur.plan": "{"}), "plan cannot be used"),
    "nested": (lambda h: h["__metadata__"].update({"secateur.plan": "[" * 100_000}), "plan cannot be used"),
    "a list": (lambda h: h["__metadata__"].update({"secateur.plan": "[]"}), "plan cannot be used"),
    "other plan format": (plan_edit(lambda p: p.update(format=99)), "plan cannot be used"),
    "positions outside": (plan_edit(lambda p: p["cuts"][0].update(kept=[0, 4])), "plan cannot be used"),
    "positions unordered": (plan_edit(lambda p: p["cuts"][0].update(kept=[2, 0])), "plan cannot be used"),
    "unknown tensor": (plan_edit(lambda p: p["cuts"][0].update(tensor="../../etc")), "plan cannot be used"),
    "infinite fill": (plan_edit(lambda p: p["cuts"][0].update(fill=10**400)), "plan cannot be used"),
    "other file format": (lambda h: h["__metadata__"].update({"secateur.format": "2"}), "format '2', this version"),
    "no file format": (lambda h: h["__metadata__"].update({"secateur.format": ""}), "format ''"),
    "other module": (plan_edit(lambda p: p["edits"][0].update(module="9")), "pruning plan"),
    "other attribute": (plan_edit(lambda p: p["edits"][0].update(attribute="__class__")), "pruning plan"),
    "a method": (plan_edit(lambda p: p["edits"][0].update(attribute="forward")), "pruning plan"),
    "other value": (plan_edit(lambda p: p["edits"][0].update(before=5)), "pruning plan"),
    "replacement": (plan_edit(lambda p: p.update(replacements={"0": "os.system"})), "pruning plan|checksum"),
    "a cut too few": (plan_edit(lambda p: p["cuts"].pop(0)), "'0.weight'|pruning plan"),
    "cut twice": (plan_edit(lambda p: p["cuts"].append(p["cuts"][0])), "pruning plan|contradicts"),
    "other positions": (plan_edit(lambda p: [c.update(kept=[1, 3]) for c in p["cuts"]]), "checksum"),
    "other figures": (plan_edit(lambda p: p.update(macs=[7, 7])), "checksum"),
    "other metadata": (lambda h: h["__metadata__"].update(note="trust me"), "checksum"),
    "no checksum": (lambda h: h["__metadata__"].update({"secateur.sha256": ""}), "checksum"),
}


@pytest.mark.parametrize("case", PLANS)
def test_tampered_plans(case: str, valid: Path) -> None:
    edit, message = PLANS[case]
    change(valid, edit)
    model = dense()
    before = copy.deepcopy(model)
    refused(valid, message, model)
    assert_same(model, before)


def test_changed_values_do_not_pass(valid: Path) -> None:
    content = bytearray(valid.read_bytes())
    content[-1] ^= 1
    valid.write_bytes(content)
    refused(valid, "does not match its checksum")


def rewritten(result: Result, path: Path, **tensors: Tensor | None) -> None:
    """Save `result` with tensors replaced, added or (None) left out; `__` in a name means a dot."""
    save(result, path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    state = {**result.model.state_dict(), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    path.write_bytes(to_bytes({name: t.contiguous() for name, t in state.items() if t is not None}, metadata))


def test_tensors_that_do_not_fit_their_plan(pruned: Result, tmp_path: Path) -> None:
    path = tmp_path / "file"
    rewritten(pruned, path, **{"0__bias": None})
    refused(path, r"has no tensor '0\.bias'; the model needs it as float32 \[2\]")
    rewritten(pruned, path, extra=torch.zeros(1))
    refused(path, "holds a tensor 'extra' that the model does not have")
    rewritten(pruned, path, **{"0__bias": torch.zeros(3)})
    refused(path, r"'0\.bias' as float32 \[3\]; its own plan makes it float32 \[2\]")
    rewritten(pruned, path, **{"0__bias": torch.zeros(2, dtype=torch.float64)})
    refused(path, r"convert the model first, with `\.to\(torch\.float64\)`")
    rewritten(pruned, path, **{"0__bias": torch.zeros(2)})
    refused(path, "checksum")


def test_another_architecture_names_the_first_tensor_that_differs(valid: Path) -> None:
    other = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 1))
    with pytest.raises(PlanMismatchError, match=r"another architecture.*'0\.weight' has shape \[5, 2, 3, 3\]"):
        load(valid, other)
    with pytest.raises(PlanMismatchError, match=r"no tensor '0\.weight'"):
        load(valid, nn.Linear(2, 2))
    with pytest.raises(ModelError, match="got PosixPath"):
        load(dense(), valid)  # type: ignore[arg-type]


# What saving refuses, and what it leaves behind


def test_a_plan_of_another_model_is_refused(pruned: Result, tmp_path: Path) -> None:
    with pytest.raises(PlanMismatchError, match=r"'0\.weight' has shape \[4, 2, 3, 3\] in the model, \[2, 2, 3, 3\]"):
        save(dense(), tmp_path / "file", plan=pruned.plan)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved_without_pickle(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> object:
            return {"anything": object()}

    with pytest.raises(ArtifactError, match=r"module '0' \(Stateful\) keeps extra state"):
        save(nn.Sequential(Stateful(2, 2)), tmp_path / "file")
    with pytest.raises(ModelError, match="run the model once"):
        save(nn.LazyLinear(2), tmp_path / "file")
    with pytest.raises(ArtifactError, match="expected a dense tensor"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "file")
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module"):
        save({"state": 1}, tmp_path / "file")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_metadata_is_text_under_free_names(pruned: Result, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="texts to texts"):
        save(pruned, tmp_path / "file", metadata={"epochs": 3})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="taken by the file format"):
        save(pruned, tmp_path / "file", metadata={"secateur.plan": ""})


def test_saving_onto_a_folder_or_through_a_link(pruned: Result, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is a folder: pass the name of a file in it"):
        save(pruned, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    save(pruned, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").is_file()
    (tmp_path / "file").chmod(0o600)
    with pytest.raises(ArtifactError, match="cannot write"):
        save(pruned, tmp_path / "file" / "below")


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_old_file_survives(pruned: Result, folder: Path) -> None:
    (folder / "file").write_bytes(b"old")
    yield_error = pytest.raises(ArtifactError, match=r"cannot write .*The file that was there is unchanged")
    with yield_error:
        save(pruned, folder / "file", metadata={"padding": "x" * 50_000})
    assert (folder / "file").read_bytes() == b"old"
    assert [entry.name for entry in folder.iterdir()] == ["file"]


def test_a_write_that_fails_half_way_leaves_the_old_file(pruned: Result, tmp_path: Path) -> None:
    with file_size_limit(20_000):
        assert_old_file_survives(pruned, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount a small file system")
def test_a_full_disk_leaves_the_old_file(pruned: Result, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        assert_old_file_survives(pruned, disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_interruption_leaves_the_old_file(pruned: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(pruned, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_errors_are_of_one_tree() -> None:
    assert issubclass(ArtifactError, SecateurError) and issubclass(PlanMismatchError, SecateurError)
    assert replace(plan_for(dense()), groups=2) != plan_for(dense())
