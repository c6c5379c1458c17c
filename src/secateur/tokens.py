"""Token ids and the models that read them: what a model cannot look up is refused by name, not by an index error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from secateur.errors import InputError


def vocabulary_of(model: nn.Module) -> int | None:
    """How many tokens a model of `transformers` embeds; None for any other model."""
    weight = getattr(_embedding(model), "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None


def positions_of(model: nn.Module) -> int | None:
    """How many tokens in a row a model of `transformers` is made for, by its config; None where that says nothing.

    A table with a row for padding counts from behind that row, as RoBERTa's does.
    """
    declared = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(declared, int) or declared < 1:
        return None
    embedding = _embedding(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not embedding and module.num_embeddings == declared:
            return declared if module.padding_idx is None else declared - module.padding_idx - 1
    return declared


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Raise InputError where the tokenizer has tokens that the model does not embed."""
    size = vocabulary_of(model)
    known = len(tokenizer) if hasattr(tokenizer, "__len__") else 0  # a processor of images has no tokens
    if size is not None and known > size:
        raise InputError(
            f"the tokenizer has {known:,} tokens, the model embeds {size:,}: they do not belong together. Load both "
            "from the same place, or call model.resize_token_embeddings(len(tokenizer)) before training."
        )


def check_length(model: nn.Module, length: int, word: str = "length") -> None:
    """Raise InputError for sequences longer than the model has positions."""
    positions = positions_of(model)
    if positions is not None and length > positions:
        raise InputError(
            f"{word}={length} exceeds the model's {positions} positions: pass {word}={positions} or less. A model that "
            "computes its positions may be asked for more by its config's max_position_embeddings."
        )


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Raise InputError for token ids of any shape that the model does not embed."""
    size = vocabulary_of(model)
    if size is None or tokens.numel() == 0:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        raise InputError(
            f"token id {low if low < 0 else high:,} is none of the {size:,} that the model embeds: the text was made "
            "into tokens by another model's tokenizer."
        )


def check_batch(model: nn.Module, batch: Any) -> None:
    """Raise InputError for a batch of token ids, (N, L), with ids or a length that the model has nothing for."""
    tokens = _tokens_of(batch)
    if tokens is None or vocabulary_of(model) is None:
        return
    positions, length = positions_of(model), tokens.shape[1]
    if positions is not None and length > positions:
        raise InputError(
            f"sequences of {length} tokens are longer than the model's {positions} positions: cut them to {positions} "
            "or less."
        )
    check_tokens(model, tokens)


def _embedding(model: nn.Module) -> Any:
    found = getattr(model, "get_input_embeddings", None)
    try:
        return found() if callable(found) else None
    except (NotImplementedError, AttributeError):  # it has none, or none of its own
        return None


def _tokens_of(batch: Any) -> Tensor | None:
    if isinstance(batch, (tuple, list)):
        batch = batch[0] if batch else None
    found = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    whole = isinstance(found, Tensor) and found.dim() == 2 and not (found.is_floating_point() or found.is_complex())
    return found if whole else None
