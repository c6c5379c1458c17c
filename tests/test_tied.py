"""Tied heads: what names one side of a tied weight never changes the other unasked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from pretrained_for_tests import library
from secateur.errors import InputError, TargetError
from secateur.masking import Gradual, make_masks, threshold_masks
from secateur.plans import named_tensors
from secateur.weightlayers import weight_layers
from test_layerwise import language_model, text

TIED = {"gpt2": ("transformer.wte", "transformer.h"), "gemma": ("model.embed_tokens", "model.layers")}
BOTH = r"names one side of a tied weight: '{}' and 'lm_head' share '{}\.weight'.* Name both, \['{}', 'lm_head'\]"


@pytest.fixture(scope="module", params=TIED)
def tied(request: pytest.FixtureRequest) -> tuple[Any, str, str]:
    """A language model with a tied head, the name of its embedding, and that of its blocks."""
    library()
    return (language_model(request.param), *TIED[request.param])


def unread() -> Iterator[Tensor]:
    """Data that may not be looked at."""
    pytest.fail("a batch was read")
    yield torch.empty(0)


def names(model: nn.Module, **options: Any) -> set[str]:
    return {layer.name for layer in weight_layers(model, **options)}


@pytest.mark.parametrize("entry", ["lm_head", "lm_*", "lm_head.weight", "EMBEDDING", "EMBEDDING.weight", "EMBEDDING*"])
def test_layers_named_on_one_side_only_are_refused_before_any_work(tied: tuple[Any, str, str], entry: str) -> None:
    model, embedding, blocks = tied
    entry, said = entry.replace("EMBEDDING", embedding), BOTH.format(embedding, embedding, embedding)
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    for within in (entry, [entry], [entry, f"{blocks}.*"]):
        with pytest.raises(InputError, match=said):
            make_masks(model, "wanda", 0.5, within=within, data=unread())
    with pytest.raises(InputError, match=said):
        threshold_masks(model, 0.1, within=entry)
    with pytest.raises(InputError, match="sparsity=.*" + said):
        make_masks(model, "wanda", {entry: 0.5, f"{blocks}.*": 0.5}, data=unread())
    with pytest.raises(InputError, match=said):
        Gradual("magnitude", 0.5, end=2, within=[entry]).after_backward(model, None)  # type: ignore[arg-type]
    assert all(torch.equal(before[name], tensor) for name, tensor in named_tensors(model).items())


def test_both_sides_together_are_pruned_as_one_weight(tied: tuple[Any, str, str]) -> None:
    model, embedding, _ = tied
    for within in (
        ["lm_head", embedding],
        [model.lm_head, model.get_input_embeddings()],
        [f"{embedding}.weight", "lm*"],
    ):
        assert names(model, within=within) == {f"{embedding}.weight"}
    masks = make_masks(model, "magnitude", {"lm_head": 0.5, embedding: 0.5})
    sparse = masks.apply(model)
    assert sparse.lm_head.weight is sparse.get_input_embeddings().weight
    zeros = {name: int((parameter == 0).sum()) for name, parameter in sparse.named_parameters()}
    assert {name: count for name, count in zeros.items() if count} == {f"{embedding}.weight": 320}
    with pytest.raises(TargetError, match="asks for"):
        make_masks(model, "magnitude", {"lm_head": 0.5, embedding: 0.25})


def test_all_layers_mean_both_sides_and_what_holds_the_embedding_alone_means_none(tied: tuple[Any, str, str]) -> None:
    model, embedding, blocks = tied
    base, tied_name = embedding.partition(".")[0], f"{embedding}.weight"
    inside = {name for name in names(model) if name.startswith(f"{blocks}.")}
    assert names(model) == names(model, within="*") == names(model, within=model) == inside | {tied_name}
    # An embedding is no layer that masks are for: here it stays, as it does in a model whose head is not tied.
    assert names(model, within=base) == names(model, within=f"{base}.*") == names(model, within=blocks) == inside
    assert set(make_masks(model, "magnitude", {f"{base}.*": 0.5}).keep) >= inside
    assert not (~make_masks(model, "magnitude", {f"{base}.*": 0.5}).keep[tied_name]).any()


def test_what_is_ignored_on_one_side_is_spared_on_both(tied: tuple[Any, str, str]) -> None:
    model, embedding, blocks = tied
    inside = {name for name in names(model) if name.startswith(f"{blocks}.")}
    for ignore in ("lm_head", embedding, f"{embedding}.weight", model.lm_head, model.get_input_embeddings()):
        assert names(model, ignore=ignore) == inside
    assert names(model, within=["lm_*", f"{blocks}.*"], ignore="lm_head") == inside
    assert make_masks(model, "magnitude", {f"{blocks}.*": 0.5, "lm_head": 0.0}).counts[0]


def test_an_untied_head_is_named_alone() -> None:
    model = language_model("llama")
    assert names(model, within="lm_head") == {"lm_head.weight"}
    assert "model.embed_tokens.weight" not in names(model)


class Twins(nn.Module):
    """Two linear maps of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def test_two_layers_of_one_weight_go_together() -> None:
    for one in ("a", "b"):
        with pytest.raises(InputError, match=r"'a' and 'b' share 'a\.weight'"):
            make_masks(Twins(), "magnitude", 0.5, within=one)
        assert names(Twins(), ignore=one) == {"c.weight"}
    assert names(Twins(), within=["a", "b"]) == {"a.weight"}


def test_block_by_block_the_head_has_no_place_and_ties_to_the_outside_are_refused(tied: tuple[Any, str, str]) -> None:
    model, embedding, blocks = tied
    for within in ("lm_head", embedding):
        with pytest.raises(InputError, match="matches no prunable weight"):
            sc.prune_layerwise(model, text(1), "wanda", sparsity=0.5, within=within)
    inner = model.get_submodule(f"{blocks}.0.mlp")
    child = next(name for name, part in inner.named_children() if getattr(part, "weight", None) is not None)
    model = sc.inputs.private_copy(model)
    other = model.get_submodule(f"{blocks}.1.mlp.{child}")
    model.get_submodule(f"{blocks}.0.mlp.{child}").weight = other.weight
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    with pytest.raises(
        InputError, match=rf"mlp\.{child}\.weight' of block '{blocks}\.0' is one tied weight with .*h?\.1"
    ):
        sc.layerwise.prune_layerwise_(model, text(1), "wanda", sparsity=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in named_tensors(model).items())
    sc.prune_layerwise(model, text(1), "magnitude", sparsity=0.5, ignore=f"mlp.{child}", progress=False)


@pytest.mark.parametrize("ignored", [["lm_head"], ["EMBEDDING"], []])
def test_widths_go_on_both_sides_or_on_none(tied: tuple[Any, str, str], ignored: list[str]) -> None:
    model, embedding, _ = tied
    ignore = [name.replace("EMBEDDING", embedding) for name in ignored]
    small: Any = sc.prune(model, text(1)[0], sparsity=0.5, ignore=ignore, prune_residual=True).model
    assert small.lm_head.weight is small.get_input_embeddings().weight
    # An ignored module keeps the width of its output: of the embedding the residual stream, of the head the words.
    assert small.lm_head.weight.shape == (40, 16 if ignore == [embedding] else 8)


def test_no_channels_can_be_asked_of_the_head_alone(tied: tuple[Any, str, str]) -> None:
    model, _, _ = tied
    for residual in (False, True):
        with pytest.raises(TargetError, match=r"\['lm_head'\], which match no prunable layer"):
            sc.prune(model, text(1)[0], target=sc.Target(sparsity={"lm_head": 0.5}), prune_residual=residual)
