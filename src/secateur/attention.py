"""Multi-head attention whose heads can be removed.

`nn.MultiheadAttention` hands everything to one function that takes the size of a head from the width of the queries,
and refuses projections of any other width. The module here has the same parameters under the same names and computes
the same, step by step, with every size read from the tensors or from the attributes `num_heads` and `head_dim`.
Source: "Attention Is All You Need", section 3.2.2; https://arxiv.org/abs/1706.03762.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import InputError, ModelError

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
_EXTRA_POSITION = ("bias_k", "bias_v")
_WIDTHS = ("embed_dim", "kdim", "vdim", "_qkv_same_embed_dim")  # follow from the weights here


def replaceable(module: nn.Module) -> bool:
    """Whether `MultiheadAttention` can stand in for `module`: an unmodified nn.MultiheadAttention.

    Subclasses, quantisable and parametrized variants, weights under a pruning mask, a patched or compiled forward
    may compute something else: they cannot be replaced.
    """
    return (
        type(module) is nn.MultiheadAttention
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
        and {*_PROJECTIONS} <= set(module._parameters) <= {*_PROJECTIONS, *_EXTRA_POSITION}
        and not module._buffers
        and set(module._modules) == {"out_proj"}
    )


class MultiheadAttention(nn.Module):
    """Computes what the given nn.MultiheadAttention computes, with the very same parameters, on any widths.

    To remove a head, slice it out of the rows of the input projections (each third, where packed) and their bias, of
    `bias_k` and `bias_v`, out of the columns of `out_proj.weight`, and lower `num_heads`. A position within all heads
    goes the same way, with `head_dim`; a channel of the inputs with its column of the input projections; one of the
    output with its row of `out_proj`. `scale`, the factor on the scores, stays 1 / sqrt(the original head_dim).

    Parameters, hooks, training mode and all other attributes are those of the original, and a state dict of the one
    loads into the other. Raises ModelError for a module that is not `replaceable`.
    """

    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_weight: nn.Parameter | None  # (3 * heads * head_dim, width), or None and the three below
    q_proj_weight: nn.Parameter | None  # (heads * head_dim, width of the queries)
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None  # (3 * heads * head_dim,)
    bias_k: nn.Parameter | None  # (1, 1, heads * head_dim): one more key, the same for every sequence
    bias_v: nn.Parameter | None
    out_proj: nn.Linear  # (width of the output, heads * head_dim)

    # nn.TransformerEncoderLayer reads it, and where it is True calls a fused function that knows only original widths.
    _qkv_same_embed_dim = False

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        if not replaceable(original):
            raise ModelError(
                f"expected an unmodified nn.MultiheadAttention, got {type(original).__name__}; remove what was added "
                "to it (parametrizations, masks, a patched or compiled forward), or leave it as it is."
            )
        for name, value in vars(original).items():
            if name not in _WIDTHS:
                vars(self)[name] = value.copy() if isinstance(value, (dict, set)) else value
        self.scale = 1 / math.sqrt(original.head_dim)

    @property
    def embed_dim(self) -> int:
        """The width of the output."""
        return self.out_proj.weight.shape[0]

    @property
    def kdim(self) -> int:
        """The width of the keys."""
        return self._weights()[1].shape[1]

    @property
    def vdim(self) -> int:
        """The width of the values."""
        return self._weights()[2].shape[1]

    def extra_repr(self) -> str:
        """The attributes that pruning changes."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from L queries to S keys; arguments, results and their shapes are those of nn.MultiheadAttention.

        `query` is (L, B, width), under `batch_first` (B, L, width), or (L, width) for one sequence; `key` and `value`
        likewise. `key_padding_mask` is (B, S) or (S,); `attn_mask` is (L, S), or (B * heads, L, S): one per head, so
        that no head can be removed. Masks are added to the scores; True means: do not attend. `is_causal` promises
        that `attn_mask` is causal. Returns the output, and the weights, averaged (B, L, S) or per head
        (B, heads, L, S), None without `need_weights`; a model that uses them cannot lose heads either. Raises
        InputError for inputs that do not fit together.
        """
        if query.is_nested:
            _check_nested(self, query, key, value, key_padding_mask, attn_mask)
            return self._attend_nested(query, need_weights, average_attn_weights, is_causal)
        batched = _is_batched(query, key, value, key_padding_mask)
        if not batched:
            query, key, value = _each(lambda x: x.unsqueeze(0), query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = _each(lambda x: x.transpose(0, 1), query, key, value)
        if is_causal and attn_mask is None:
            raise InputError("is_causal says that attn_mask is causal, but there is none; pass both.")

        q, k, v = self._projected(query, key, value)  # (B, L or S, heads * head_dim)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(q, k, key_padding_mask, attn_mask)
        k, v, mask = self._with_extra_positions(k, v, mask)
        attended, weights = self._attended(q, k, v, mask, causal, need_weights)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)

        if not batched:
            attended = attended.squeeze(0)
            weights = None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            attended = attended.transpose(0, 1)
        return F.linear(attended, self.out_proj.weight, self.out_proj.bias), weights

    def _weights(self) -> tuple[Tensor, ...]:
        """The projections of queries, keys and values, each (heads * head_dim, width)."""
        if self.in_proj_weight is not None:
            return torch.unflatten(self.in_proj_weight, 0, (3, -1)).unbind(0)
        assert self.q_proj_weight is not None and self.k_proj_weight is not None and self.v_proj_weight is not None
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of all heads; self-attention takes one product instead of three."""
        if self.in_proj_weight is not None and query is key and key is value:
            packed = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            return torch.unflatten(packed, -1, (3, -1)).unbind(-2)
        bias = self.in_proj_bias
        biases = (None, None, None) if bias is None else torch.unflatten(bias, 0, (3, -1)).unbind(0)
        parts = zip((query, key, value), self._weights(), biases, strict=True)
        return tuple(F.linear(data, weight, its_bias) for data, weight, its_bias in parts)

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """What both masks add to the scores, to be broadcast to (B, heads, L, S); None for nothing."""
        batch, targets, sources = q.shape[0], q.shape[1], k.shape[1]
        added = None
        if mask is not None and mask.dim() == 3:
            _check_shape("attn_mask", mask, (batch * self.num_heads, targets, sources))
            added = torch.unflatten(_additive("attn_mask", mask, q.dtype), 0, (-1, self.num_heads))
        elif mask is not None:
            _check_shape("attn_mask", mask, (targets, sources))
            added = _additive("attn_mask", mask, q.dtype).unsqueeze(0).unsqueeze(0)
        if padding is not None:
            _check_shape("key_padding_mask", padding, (batch, sources))
            ignored = _additive("key_padding_mask", padding, q.dtype).unsqueeze(1).unsqueeze(1)
            added = ignored if added is None else added + ignored
        return added

    def _with_extra_positions(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values that every query may attend to besides its own: a learned one, and one of zeros."""
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
            mask = None if mask is None else F.pad(mask, (0, 1))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            mask = None if mask is None else F.pad(mask, (0, 1))
        return k, v, mask

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What each query attends to, (B, L, heads * head_dim), and the weights (B, heads, L, S) if needed."""
        heads = (self.num_heads, self.head_dim)
        q, k, v = (torch.unflatten(x, -1, heads).transpose(1, 2) for x in (q, k, v))  # (B, heads, L or S, head_dim)
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, self.dropout, self.training)
            attended = weights @ v
        else:
            dropout = self.dropout if self.training else 0.0
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=self.scale)
        return attended.transpose(1, 2).flatten(2), weights

    def _attend_nested(
        self, batch: Tensor, need_weights: bool, average_attn_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention over sequences of different lengths, into which nn.TransformerEncoder turns a padded batch.

        The output is nested too; the weights are padded with zeros.
        """
        lengths = [len(sequence) for sequence in batch.unbind()]
        padded = batch.to_padded_tensor(0.0)  # (B, longest, width)
        positions = torch.arange(padded.shape[1], device=padded.device)
        padding = positions >= torch.tensor(lengths, device=padded.device).unsqueeze(1)
        output, weights = self.forward(
            padded, padded, padded, padding, need_weights, None, average_attn_weights, is_causal
        )
        if weights is not None:
            empty = padding.unsqueeze(-1) if average_attn_weights else padding.unsqueeze(-1).unsqueeze(1)
            weights = weights.masked_fill(empty, 0.0)
        rows = [row.narrow(0, 0, length) for row, length in zip(output, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows), weights


def _each(change: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """`change` of all three; those that were one tensor stay one, which is how self-attention is known."""
    q = change(query)
    k = q if key is query else change(key)
    v = k if value is key else change(value)
    return q, k, v


def _is_batched(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> bool:
    ranks = (query.dim(), key.dim(), value.dim())
    if ranks not in ((3, 3, 3), (2, 2, 2)):
        raise InputError(
            f"query, key and value must all have 3 dimensions (a batch) or all 2 (one sequence); got {ranks}."
        )
    if padding is not None and padding.dim() != query.dim() - 1:
        raise InputError(
            f"key_padding_mask must have {query.dim() - 1} dimensions, one less than the query; got {padding.dim()}."
        )
    return query.dim() == 3


def _check_nested(module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor | None) -> None:
    unmasked = all(mask is None for mask in masks)
    if not (module.batch_first and query is key and key is value and unmasked):
        raise InputError(
            "a nested tensor can only attend to itself, under batch_first and without masks; for anything else pass a "
            "padded tensor and key_padding_mask."
        )


def _check_shape(name: str, mask: Tensor, expected: tuple[int, ...]) -> None:
    if mask.shape != expected:
        raise InputError(f"{name} has shape {list(mask.shape)}; expected {list(expected)}.")


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what it adds to the scores: a floating one as it is, a boolean one -inf where True."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise InputError(f"{name} must be boolean or floating, got {mask.dtype}; pass `{name}.bool()`.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
