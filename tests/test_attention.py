"""Our multi-head attention computes what nn.MultiheadAttention computes, also when parts of it are removed."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn import quantizable
from torch.nn.utils import parametrizations, prune

from secateur.attention import MultiheadAttention, replaceable
from secateur.errors import InputError, ModelError

WIDTH, HEADS, SIZE = 12, 4, 3  # 12 channels, as 4 heads of 3
BATCH, TARGETS, SOURCES = 3, 5, 7
TOLERANCE = 1e-12

MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "odd heads": {"num_heads": 3},
    "extra key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "both keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 6, "vdim": 8},
    "other widths, no bias, both keys": {
        "kdim": 6,
        "vdim": 8,
        "bias": False,
        "add_bias_kv": True,
        "add_zero_attn": True,
    },
}
WEIGHTS: dict[str, dict[str, bool]] = {
    "no weights": {"need_weights": False},
    "mean weights": {},
    "weights per head": {"average_attn_weights": False},
}


def built(name: str = "plain", **options: Any) -> nn.MultiheadAttention:
    """An attention whose every parameter is random: biases start at zero, and zeros hide mistakes."""
    settings = {"embed_dim": WIDTH, "num_heads": HEADS, "dtype": torch.float64} | MODULES[name] | options
    module = nn.MultiheadAttention(**settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.eval()


def tokens(module: nn.MultiheadAttention, *, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of different lengths and widths."""
    lengths, widths = (TARGETS, SOURCES, SOURCES), (WIDTH, module.kdim, module.vdim)
    lead = (BATCH,) if batched else ()
    parts = [torch.randn(*lead, length, width).double() for length, width in zip(lengths, widths, strict=True)]
    if batched and not module.batch_first:
        parts = [part.transpose(0, 1).contiguous() for part in parts]
    return parts[0], parts[1], parts[2]


def masks(heads: int, targets: int, sources: int, *, batched: bool = True) -> dict[str, dict[str, Any]]:
    """Every way to mask, by name; the first source is never masked, since a row without sources is not a number."""
    count = BATCH if batched else 1
    padding = torch.rand(count, sources) < 0.4
    seen = torch.rand(targets, sources) < 0.4
    per_head = torch.rand(count * heads, targets, sources) < 0.4
    for mask in (padding, seen, per_head):
        mask[..., 0] = False
    causal = torch.ones(targets, sources).triu(1).bool()
    padding = padding if batched else padding[0]
    noise = {name: torch.randn(mask.shape).double() for name, mask in (("p", padding), ("s", seen), ("h", per_head))}
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "floating padding": {"key_padding_mask": noise["p"]},
        "mask": {"attn_mask": seen},
        "floating mask": {"attn_mask": noise["s"]},
        "mask per head": {"attn_mask": per_head},
        "floating mask per head": {"attn_mask": noise["h"]},
        "mask and padding": {"attn_mask": seen, "key_padding_mask": padding},
        "mask per head and floating padding": {"attn_mask": noise["h"], "key_padding_mask": noise["p"]},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
    }


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal tensors in equal places, of equal layout, and not dead."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if other is None:
            assert mine is None
            continue
        assert mine.shape == other.shape
        assert mine.dtype == other.dtype
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(mine, other, rtol=TOLERANCE, atol=TOLERANCE)


def seeded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return function(*args, **kwargs)


@pytest.mark.untraced
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", MODULES)
def test_equals_the_original(name: str, weights: str) -> None:
    for batch_first, batched, training in itertools.product([False, True], repeat=3):
        theirs = built(name, batch_first=batch_first, dropout=0.3).train(training)
        ours = MultiheadAttention(theirs)
        inputs = tokens(theirs, batched=batched)
        for call in masks(theirs.num_heads, TARGETS, SOURCES, batched=batched).values():
            options = {**call, **WEIGHTS[weights]}
            assert_same(seeded(ours, *inputs, **options), seeded(theirs, *inputs, **options))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", [name for name in MODULES if "widths" not in name])
def test_equals_the_original_where_a_sequence_attends_to_itself(name: str, weights: str) -> None:
    """Without gradients this is where the original calls its fused function."""
    for batch_first, batched, graded in itertools.product([False, True], repeat=3):
        theirs = built(name, batch_first=batch_first)
        ours = MultiheadAttention(theirs)
        x = tokens(theirs, batched=batched)[0]
        for call in masks(theirs.num_heads, TARGETS, TARGETS, batched=batched).values():
            options = {**call, **WEIGHTS[weights]}
            with torch.set_grad_enabled(graded):
                assert_same(ours(x, x, x, **options), theirs(x, x, x, **options))


def test_key_and_value_may_be_one_tensor_and_query_and_value_another() -> None:
    theirs = built(batch_first=True)
    ours = MultiheadAttention(theirs)
    a, b = torch.randn(2, BATCH, TARGETS, WIDTH).double()
    for inputs in ((a, b, b), (a, a, b), (a, b, a)):
        assert_same(ours(*inputs), theirs(*inputs))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", MODULES)
def test_gradients_equal_those_of_the_original(name: str, weights: str) -> None:
    theirs = built(name)
    ours = MultiheadAttention(theirs)
    inputs = [part.requires_grad_() for part in tokens(theirs)]
    options = masks(theirs.num_heads, TARGETS, SOURCES)["mask and padding"] | WEIGHTS[weights]
    wanted = [*theirs.parameters(), *inputs]

    def gradients(module: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            sum((part**2).sum() for part in module(*inputs, **options) if part is not None), wanted
        )

    found, expected = gradients(ours), gradients(theirs)
    # A key's bias moves all scores of a row alike: its gradient is the rounding of terms as large as the others.
    rounding = 1e-14 * max(other.abs().max().item() for other in expected)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=rounding)
    assert all(other.abs().max() > 1e-3 for other in expected[-3:])


@pytest.mark.parametrize("batch_first", [False, True])
def test_outputs_have_the_layout_that_views_rely_on(batch_first: bool) -> None:
    ours = MultiheadAttention(built(batch_first=batch_first))
    x = torch.randn(BATCH, TARGETS, WIDTH).double()
    for options in WEIGHTS.values():
        assert ours(x, x, x, **options)[0].is_contiguous()


def test_a_row_without_sources_gives_what_the_original_gives() -> None:
    theirs = built().train()  # in evaluation the original's fused function decides otherwise
    ours, x = MultiheadAttention(theirs), torch.randn(TARGETS, BATCH, WIDTH).double()
    mask = torch.zeros(TARGETS, TARGETS, dtype=torch.bool)
    mask[1] = True
    for options in WEIGHTS.values():
        both = ours(x, x, x, attn_mask=mask, **options), theirs(x, x, x, attn_mask=mask, **options)
        for mine, other in zip(*both, strict=True):
            if other is not None:
                torch.testing.assert_close(mine, other, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_stay_close(dtype: torch.dtype) -> None:
    theirs = built().to(dtype)
    ours, x = MultiheadAttention(theirs), torch.randn(TARGETS, BATCH, WIDTH).to(dtype)
    mask = torch.ones(TARGETS, TARGETS).triu(1).bool()
    for options in WEIGHTS.values():
        both = ours(x, x, x, attn_mask=mask, **options), theirs(x, x, x, attn_mask=mask, **options)
        for mine, other in zip(*both, strict=True):
            if other is not None:
                assert mine.dtype == other.dtype == dtype
                torch.testing.assert_close(
                    mine, other, rtol=0, atol=20 * torch.finfo(dtype).eps * float(other.detach().abs().max())
                )


def test_autocast() -> None:
    theirs = built().float().train()
    ours, x = MultiheadAttention(theirs), torch.randn(TARGETS, BATCH, WIDTH)
    options = {
        "attn_mask": torch.ones(TARGETS, TARGETS).triu(1).bool(),
        "key_padding_mask": torch.zeros(BATCH, TARGETS).bool(),
    }
    for weights in WEIGHTS.values():
        with torch.autocast("cpu", torch.bfloat16):
            mine, other = ours(x, x, x, **options, **weights)[0], theirs(x, x, x, **options, **weights)[0]
        assert mine.dtype == other.dtype == torch.bfloat16
        torch.testing.assert_close(mine, other, rtol=0, atol=0.1 * float(other.abs().max().detach()))


# ---- removal, by hand ----


def thirds(module: nn.Module) -> dict[str, int]:
    """The tensors whose rows are projected channels -> how many times they hold all of them."""
    names = {"in_proj_weight": 3, "in_proj_bias": 3, "q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}
    return {name: count for name, count in names.items() if getattr(module, name) is not None}


def cuts_of_projected(module: nn.Module, gone: list[int]) -> list[tuple[str, int, list[int]]]:
    """Where projected channels are: (tensor, dim, positions)."""
    total = module.out_proj.weight.shape[1]
    cuts = [
        (name, 0, [c + part * total for part in range(count) for c in gone]) for name, count in thirds(module).items()
    ]
    cuts += [(name, 2, gone) for name in ("bias_k", "bias_v") if getattr(module, name) is not None]
    return [*cuts, ("out_proj.weight", 1, gone)]


def zeroed(module: nn.Module, cuts: list[tuple[str, int, list[int]]]) -> Any:
    module = copy.deepcopy(module)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, dim, gone in cuts:
            parameters[name].index_fill_(dim, torch.tensor(gone), 0.0)
    return module


def sliced(module: nn.Module, cuts: list[tuple[str, int, list[int]]]) -> Any:
    module = copy.deepcopy(module)
    for name, dim, gone in cuts:
        owner_name, _, key = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        old = owner.get_parameter(key)
        kept = torch.tensor([position for position in range(old.shape[dim]) if position not in gone])
        setattr(owner, key, nn.Parameter(old.detach().index_select(dim, kept)))
    return module


def without_heads(module: Any, gone: list[int]) -> tuple[Any, Any]:
    """(the original with these heads zero, ours without them)."""
    cuts = cuts_of_projected(module, [head * SIZE + position for head in gone for position in range(SIZE)])
    small = sliced(MultiheadAttention(module), cuts)
    small.num_heads -= len(gone)
    return zeroed(module, cuts), small


@pytest.mark.parametrize("name", [name for name in MODULES if name != "odd heads"])
@pytest.mark.parametrize("gone", [[1], [0, 3], [0, 1, 2]], ids=str)
def test_without_heads_equals_those_heads_zero(name: str, gone: list[int]) -> None:
    module = built(name)
    zero, small = without_heads(module, gone)
    kept = [head for head in range(HEADS) if head not in gone]
    inputs = tokens(module)
    for label, call in masks(HEADS, TARGETS, SOURCES).items():
        if "per head" in label:
            continue  # such a mask has an entry for every head
        expected, _ = zero(*inputs, **call, need_weights=False)
        assert_same(small(*inputs, **call, need_weights=False), (expected, None))
        expected, weights = zero(*inputs, **call, average_attn_weights=False)
        assert_same(small(*inputs, **call, average_attn_weights=False), (expected, weights[:, kept]))
        assert (expected - module(*inputs, **call)[0]).abs().max() > 1e-3


def test_the_wrong_head_is_found_out() -> None:
    module = built()
    zero, _ = without_heads(module, [1])
    _, small = without_heads(module, [2])
    inputs = tokens(module)
    assert (zero(*inputs)[0] - small(*inputs)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in MODULES if name != "odd heads"])
def test_without_a_position_in_all_heads_equals_that_position_zero(name: str) -> None:
    module = built(name)
    cuts = cuts_of_projected(module, [head * SIZE + 1 for head in range(HEADS)])
    small = sliced(MultiheadAttention(module), cuts)
    small.head_dim -= 1
    inputs = tokens(module)
    for options in WEIGHTS.values():
        assert_same(small(*inputs, **options), zeroed(module, cuts)(*inputs, **options))


@pytest.mark.parametrize("name", ["plain", "no bias", "both keys"])
def test_narrower_inputs_and_outputs_equal_those_channels_zero(name: str) -> None:
    module, gone = built(name), [0, 5, 6]
    kept = [channel for channel in range(WIDTH) if channel not in gone]
    cuts = [("in_proj_weight", 1, gone), ("out_proj.weight", 0, gone)]
    cuts += [("out_proj.bias", 0, gone)] if module.out_proj.bias is not None else []
    small = sliced(MultiheadAttention(module), cuts)
    x = torch.randn(TARGETS, BATCH, WIDTH).double()
    assert_same(small(x[..., kept], x[..., kept], x[..., kept])[:1], (zeroed(module, cuts)(x, x, x)[0][..., kept],))
    assert (small.embed_dim, small.kdim, small.vdim) == (len(kept),) * 3


def test_narrower_keys_and_values_equal_those_channels_zero() -> None:
    module = built("other widths")
    cuts = [("k_proj_weight", 1, [2]), ("v_proj_weight", 1, [0, 7])]
    small = sliced(MultiheadAttention(module), cuts)
    query, key, value = tokens(module)
    narrow = (query, key[..., [0, 1, 3, 4, 5]], value[..., 1:7])
    assert_same(small(*narrow), zeroed(module, cuts)(query, key, value))
    assert (small.embed_dim, small.kdim, small.vdim) == (WIDTH, 5, 6)


def test_heads_and_widths_go_together() -> None:
    module, channels, total = built(), [3, 4], [6, 7, 8]
    cuts = [*cuts_of_projected(module, total), ("in_proj_weight", 1, channels)]
    small = sliced(MultiheadAttention(module), cuts)
    small.num_heads -= 1
    kept = [channel for channel in range(WIDTH) if channel not in channels]
    x = torch.randn(TARGETS, BATCH, WIDTH).double()
    y = x[..., kept]
    assert_same(small(y, y, y, need_weights=False), zeroed(module, cuts)(x, x, x, need_weights=False))


# ---- containers ----


def replaced(model: nn.Module) -> nn.Module:
    """A copy with our attention in place of every nn.MultiheadAttention."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if replaceable(child):
                setattr(parent, name, MultiheadAttention(child))
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    return model


def vision_block() -> Any:
    """torchvision's transformer block; where its compiled operators do not load, their schemas are enough."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    while "torchvision" not in sys.modules:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            assert missing, error
            LIBRARY.define(f"{missing[1]}(Tensor a) -> Tensor")
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
    from torchvision.models.vision_transformer import EncoderBlock

    return EncoderBlock(HEADS, WIDTH, 2 * WIDTH, dropout=0.1, attention_dropout=0.2)


LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
LAYER = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 16}


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(**LAYER, **({"batch_first": True} | options))


CONTAINERS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # how to build it; how many sequences it takes
    "encoder layer": (encoder_layer, 1),
    "encoder layer, sequence first": (lambda: encoder_layer(batch_first=False), 1),
    "encoder layer, norm first, no bias": (lambda: encoder_layer(norm_first=True, bias=False), 1),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(**LAYER, batch_first=True), 2),
    "encoder": (lambda: nn.TransformerEncoder(encoder_layer(), 2), 1),
    "transformer": (
        lambda: nn.Transformer(WIDTH, HEADS, 2, 2, 16, batch_first=True),
        2,
    ),
    "vision block": (vision_block, 1),
}


def calls(name: str) -> list[Mapping[str, Tensor]]:
    """Keyword arguments with which each kind of container is called."""
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    causal = nn.Transformer.generate_square_subsequent_mask(TARGETS, dtype=torch.float64)
    if name == "vision block" or "sequence first" in name:
        return [{}]
    if name == "encoder":
        return [{}, {"src_key_padding_mask": padding}, {"mask": causal}]
    if name == "transformer":
        return [{}, {"src_key_padding_mask": padding}, {"tgt_mask": causal, "memory_key_padding_mask": padding}]
    if name == "decoder layer":
        return [{}, {"tgt_mask": causal, "memory_key_padding_mask": padding}]
    return [{}, {"src_key_padding_mask": padding}, {"src_mask": causal}]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_compute_the_same(name: str, training: bool) -> None:
    build, sequences = CONTAINERS[name]
    theirs = build().double().train(training)
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its noise depends on the strides of its input; that of the attention weights stays
    ours = replaced(theirs)
    inputs = [torch.randn(BATCH, TARGETS, WIDTH).double() for _ in range(sequences)]
    for graded, options in itertools.product([True, False], calls(name)):
        with torch.set_grad_enabled(graded):
            assert_same([seeded(ours, *inputs, **options)], [seeded(theirs, *inputs, **options)])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_container_calls_a_fused_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("fused")

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", refuse)
    monkeypatch.setattr(torch, "_native_multi_head_attention", refuse)
    x = torch.randn(BATCH, TARGETS, WIDTH).double()
    for model in (encoder_layer().double().eval(), nn.TransformerEncoder(encoder_layer(), 2).double().eval()):
        for options in calls("encoder" if isinstance(model, nn.TransformerEncoder) else "encoder layer"):
            with torch.no_grad():
                with pytest.raises(RuntimeError, match="fused"):
                    model(x, **options)
                replaced(model)(x, **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_heads_can_go_inside_an_encoder() -> None:
    theirs = nn.TransformerEncoder(encoder_layer(), 2).double().eval()
    small = replaced(theirs)
    for zero_layer, small_layer, head in zip(theirs.layers, small.layers, (1, 3), strict=True):
        zero_layer.self_attn, small_layer.self_attn = without_heads(zero_layer.self_attn, [head])
    x = torch.randn(BATCH, TARGETS, WIDTH).double()
    for graded, options in itertools.product([True, False], calls("encoder")):
        with torch.set_grad_enabled(graded):
            assert_same([small(x, **options)], [theirs(x, **options)])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_nested_batches_equal_the_original(weights: str) -> None:
    theirs = built(batch_first=True)
    x = torch.nested.as_nested_tensor([torch.randn(length, WIDTH).double() for length in (2, 5, 3)])
    with torch.no_grad():
        mine, my_weights = MultiheadAttention(theirs)(x, x, x, **WEIGHTS[weights])
        other, other_weights = theirs(x, x, x, **WEIGHTS[weights])
    assert_same(mine.unbind(), other.unbind())
    assert_same([my_weights], [other_weights])


# ---- a module like any other ----


class SelfAttention(nn.Module):
    def __init__(self, attention: nn.Module, **options: Any) -> None:
        super().__init__()
        self.attention, self.options = attention, options

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.attention(x, x, x, key_padding_mask=padding, attn_mask=mask, **self.options)


@pytest.mark.untraced
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("name", ["plain", "both keys"])
def test_exports_with_free_batch_and_length(name: str, strict: bool) -> None:
    _, small = without_heads(built(name, batch_first=True), [2])
    padding = torch.zeros(BATCH, TARGETS, dtype=torch.bool)
    padding[0, 4:] = True
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    model = SelfAttention(small)
    x = torch.randn(BATCH, TARGETS, WIDTH).double()
    program = torch.export.export(model, (x, padding), dynamic_shapes=(free, free), strict=strict).module()
    for batch, length in ((BATCH, TARGETS), (2, 9), (7, 3)):
        y = torch.randn(batch, length, WIDTH).double()
        unpadded = torch.zeros(batch, length, dtype=torch.bool)
        assert_same(program(y, unpadded), model(y, unpadded))


@pytest.mark.untraced
@pytest.mark.parametrize("weights", WEIGHTS)
def test_compiles_in_one_graph(weights: str) -> None:
    _, small = without_heads(built("both keys", batch_first=True), [2])
    model = SelfAttention(small, **WEIGHTS[weights])
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for length in (TARGETS, SOURCES):
        x, padding = torch.randn(BATCH, length, WIDTH).double(), torch.zeros(BATCH, length, dtype=torch.bool)
        assert_same(compiled(x, padding), model(x, padding))


@pytest.mark.parametrize("name", MODULES)
def test_shares_parameters_and_state(name: str) -> None:
    original = built(name).train()
    original.out_proj.weight.requires_grad_(False)
    ours = MultiheadAttention(original)
    shared = list(zip(ours.named_parameters(), original.named_parameters(), strict=True))
    assert shared
    assert all(mine[0] == other[0] and mine[1] is other[1] for mine, other in shared)
    assert ours.training
    assert not MultiheadAttention(original.eval()).training
    theirs, fresh = built(name), MultiheadAttention(built(name))
    assert list(fresh.state_dict()) == list(theirs.state_dict())
    fresh.load_state_dict(original.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    inputs = tokens(original)
    expected = original(*inputs)
    assert_same(fresh(*inputs), expected)
    assert_same(theirs(*inputs), expected)
    assert_same(copy.deepcopy(ours).eval()(*inputs), expected)


def test_hooks_come_along_and_the_original_keeps_its_own() -> None:
    original, seen = built(), []
    original.register_forward_pre_hook(lambda module, args: seen.append(("before", type(module))))
    original.register_forward_hook(lambda module, args, output: seen.append(("after", type(module))))
    ours = MultiheadAttention(original)
    ours.register_forward_hook(lambda module, args, output: seen.append(("ours", type(module))))
    x = torch.randn(TARGETS, BATCH, WIDTH).double()
    ours(x, x, x)
    assert seen == [(what, MultiheadAttention) for what in ("before", "after", "ours")]
    seen.clear()
    original(x, x, x)
    assert seen == [(what, nn.MultiheadAttention) for what in ("before", "after")]


def test_the_original_is_not_touched() -> None:
    original = built()
    inputs = tokens(original)
    expected, before = original(*inputs), dict(vars(original))
    ours = MultiheadAttention(original)
    ours.in_proj_bias = nn.Parameter(torch.zeros(3 * WIDTH).double())
    ours.num_heads = 2
    assert vars(original) == before
    assert_same(original(*inputs), expected)


def test_prints_what_pruning_changes() -> None:
    assert repr(MultiheadAttention(built())).startswith("MultiheadAttention(\n  num_heads=4, head_dim=3\n")


class Subclass(nn.MultiheadAttention):
    pass


def patched() -> nn.Module:
    module = built()
    module.forward = lambda *args: args  # type: ignore[method-assign]  # as some libraries do
    return module


def compiled() -> nn.Module:
    module = built()
    module.compile(backend="eager")
    return module


@pytest.mark.parametrize(
    "build",
    [
        lambda: Subclass(WIDTH, HEADS),
        lambda: quantizable.MultiheadAttention(WIDTH, HEADS),
        lambda: parametrizations.weight_norm(built(), "in_proj_weight"),
        lambda: prune.l1_unstructured(built(), "in_proj_weight", amount=0.5),
        lambda: nn.Linear(WIDTH, WIDTH),
        lambda: MultiheadAttention(built()),
        patched,
        compiled,
    ],
    ids=["subclass", "quantizable", "parametrized", "masked", "linear", "ours", "patched", "compiled"],
)
def test_anything_but_the_original_is_refused(build: Callable[[], Any]) -> None:
    module = build()
    assert not replaceable(module)
    with pytest.raises(ModelError, match=r"expected an unmodified nn\.MultiheadAttention, got"):
        MultiheadAttention(module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(5)}, "must all have 3 dimensions"),
        ({"key": torch.randn(7, 12)}, r"got \(3, 2, 3\)"),
        ({"key_padding_mask": torch.zeros(7).bool()}, "must have 2 dimensions"),
        ({"key_padding_mask": torch.zeros(3, 6).bool()}, r"\[3, 6\]; expected \[3, 7\]"),
        ({"key_padding_mask": torch.zeros(3, 7).int()}, r"boolean or floating, got torch.int32"),
        ({"attn_mask": torch.zeros(7, 5).bool()}, r"\[7, 5\]; expected \[5, 7\]"),
        ({"attn_mask": torch.zeros(3, 5, 7).bool()}, r"\[3, 5, 7\]; expected \[12, 5, 7\]"),
        ({"attn_mask": torch.zeros(5, 7).long()}, "pass `attn_mask.bool\\(\\)`"),
        ({"is_causal": True}, "there is none; pass both"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    query, key, value = tokens(built())
    with pytest.raises(InputError, match=message):
        MultiheadAttention(built())(**({"query": query, "key": key, "value": value} | change))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_batch_attends_only_to_itself() -> None:
    x, y = (torch.nested.as_nested_tensor([torch.randn(2, WIDTH).double()]) for _ in range(2))
    ours = MultiheadAttention(built(batch_first=True))
    ours(x, x, x)
    for arguments in ((x, y, y), (x, x, x, torch.zeros(1, 2).bool())):
        with pytest.raises(InputError, match="can only attend to itself"):
            ours(*arguments)
    with pytest.raises(InputError, match="under batch_first"):
        MultiheadAttention(built())(x, x, x)
