"""Language models: text classifiers of `transformers` by name, checked against their tokenizer; perplexity."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.batches import logits_of
from secateur.errors import DataError, InputError
from secateur.inputs import evaluating
from secateur.quiet import quiet
from secateur.tokens import check_length, check_tokens, check_vocabulary


def text_classifier(name: Path | str, classes: Sequence[str], *, max_length: int = 128) -> tuple[nn.Module, Any]:
    """A sequence classifier of `transformers` and its tokenizer, by hub name or folder; safetensors only.

    A new head is drawn from torch's global generator where the weights bring none for so many classes, and what else
    they lack, such as a pooler, with a warning. Raises InputError for a folder that holds no such model, a decoder-only
    model, weights that are not of the shape that the config says, and what `check_tokenizer` raises.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    options: dict[str, Any] = {"num_labels": len(classes), "id2label": dict(enumerate(classes))}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        _refuse_decoder(config)
        with quiet():  # a new head is expected: its shapes and its absence are no news
            model, found = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except ImportError as error:
        raise InputError(
            f"transformers cannot import the model of {str(name)!r}: {_first_line(error)} It imports torchvision where "
            "that is installed, which must then be built for this torch."
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(name)!r} is no text classifier that can be loaded: {_first_line(error)}") from error
    _check_encoder(model, name, found)
    tokenizer = text_tokenizer(name)
    check_tokenizer(model, tokenizer, max_length)
    return model.eval(), tokenizer


def text_tokenizer(name: Path | str) -> Any:
    """The tokenizer of a model of `transformers`, by hub name or folder. Raises InputError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(name)!r} has no tokenizer that can be loaded: {_first_line(error)}") from error


def check_tokenizer(model: nn.Module, tokenizer: Any, max_length: int) -> None:
    """Raise InputError where the model has no embedding for a token or a position that the tokenizer may give."""
    check_vocabulary(model, tokenizer)
    check_length(model, max_length, "max_length")


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by a text, and how that was measured."""

    value: float  # exp(loss)
    loss: float  # mean negative log-likelihood per predicted token, nats
    tokens: int  # predicted
    length: int  # of a window
    stride: int  # by which windows move on; tokens are predicted once, from at least length - stride before them

    def __str__(self) -> str:
        return f"perplexity {self.value:.3f} ({self.tokens:,} tokens, windows of {self.length}, stride {self.stride})"


def perplexity(model: nn.Module, tokens: Tensor, *, length: int, stride: int | None = None) -> Perplexity:
    """Strided perplexity of a causal language model on one long text.

    Windows of `length` tokens move on by `stride` (default: `length`, no overlap); in each, only tokens that no earlier
    window has predicted count, so that all but the first window's have at least length - stride tokens of context. A
    window's own first token is not predicted in it: without overlap one token per window is left out. The model is run
    in eval mode without gradients, one window at a time, on the device it is on.

    Args:
        model: (1, n) token ids -> logits (1, n, vocabulary), or an output that carries them.
        tokens: (n,) token ids.
        length, stride: in tokens; stride at most length.

    Raises DataError for a text shorter than one window; InputError for other settings out of range, windows longer than
    the model has positions, tokens that it does not embed, and a model that gives no logits for every token.
    """
    step = length if stride is None else stride
    if not (isinstance(length, int) and isinstance(step, int) and 0 < step <= length and length > 1):
        raise InputError(f"length is at least 2 and stride in [1, length]; got length={length!r}, stride={stride!r}.")
    if tokens.dim() != 1 or tokens.is_floating_point():
        raise InputError(f"tokens is one sequence of token ids, (n,); got {list(tokens.shape)} {tokens.dtype}.")
    if len(tokens) < length:
        raise DataError(f"the text has {len(tokens):,} tokens, fewer than one window of {length:,}: use a longer text.")
    check_length(model, length)
    check_tokens(model, tokens)
    device = next(model.parameters()).device
    total, count, seen = 0.0, 0, 0
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(tokens), step):
            window = tokens[start : start + length].long().to(device)
            end = start + len(window)
            fresh = min(end - seen, len(window) - 1)  # a window's first token has no context in it
            if fresh > 0:
                logits = logits_of(model(window[None]))
                if logits is None or logits.dim() != 3 or logits.shape[1] != len(window):
                    shape = "no logits" if logits is None else f"logits {list(logits.shape)}"
                    raise InputError(
                        f"the model gives {shape} for {len(window)} tokens, not one row per token: pass a causal "
                        "language model."
                    )
                predicted = logits[0, -fresh - 1 : -1].float()
                total += float(F.cross_entropy(predicted, window[-fresh:], reduction="sum"))
                count += fresh
            seen = end
            if end == len(tokens):
                break
    loss = total / count
    return Perplexity(math.exp(min(loss, 700.0)), loss, count, length, step)


def _refuse_decoder(config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = type(config)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING:
        raise InputError(
            f"{config.model_type} is a decoder-only language model, which sees each word without those after it: for "
            "classification choose an encoder such as BERT; to prune the language model use prune_layerwise."
        )


def _check_encoder(model: Any, name: Path | str, found: Any) -> None:
    """Raise InputError for tensors of the encoder with other shapes than in the files; warn of those they lack."""
    encoder = f"{model.base_model_prefix}."
    wrong = sorted(tensor for tensor, *_ in found["mismatched_keys"] if tensor.startswith(encoder))
    if wrong:
        raise InputError(f"the weights of {str(name)!r} do not fit its config: {_counted(wrong)} of another shape.")
    drawn = sorted(tensor for tensor in found["missing_keys"] if tensor.startswith(encoder))
    if drawn:
        warnings.warn(f"the weights of {str(name)!r} lack {_counted(drawn)}: drawn at random.", stacklevel=3)


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} of the encoder, such as {names[0]},"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
