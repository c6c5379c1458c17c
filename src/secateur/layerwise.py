"""One shot through a deep model, block by block: each is pruned on what the pruned ones before it give.

At any moment there are the hidden states between two blocks, and one block's statistics: how language models are pruned
that have room for little else.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from secateur.batches import Forward, default_forward, first_tensor, move, tensors_of
from secateur.errors import ArtifactError, DataError, InputError
from secateur.files import write_bytes
from secateur.inputs import check_model, check_weights, private_copy
from secateur.masking import WEIGHT_METHODS, Pattern, asked_of, make_masks
from secateur.masks import Masks
from secateur.measuring.watching import watched
from secateur.plans import named_tensors, tensor_shapes
from secateur.tensorfiles import add_tensors, read_header, read_tensors, with_metadata
from secateur.tokens import check_batch
from secateur.weightlayers import holders

_RUN, _BLOCK = "secateur.layerwise", "secateur.layerwise.block"


@dataclass(frozen=True)
class Block:
    """What pruning one block took."""

    name: str
    weights: int  # those that could go
    zeros: int
    seconds: float
    peak_bytes: int | None  # the most memory in use meanwhile, the model included; None where it cannot be known

    @property
    def sparsity(self) -> float:
        """The fraction that is zero."""
        return self.zeros / max(self.weights, 1)

    def __str__(self) -> str:
        peak = "" if self.peak_bytes is None else f", peak {self.peak_bytes / 1e9:.2f} GB"
        return f"{self.name}: {self.sparsity:.1%} of {self.weights:,} weights, {self.seconds:.1f} s{peak}"


@dataclass(frozen=True, eq=False)
class Layerwise:
    """A pruned model, its masks (which hold while it is fine-tuned), and what each block took."""

    model: nn.Module
    masks: Masks
    blocks: tuple[Block, ...]

    def __repr__(self) -> str:
        return f"Layerwise({len(self.blocks)} blocks, {self.masks!r})"


def prune_layerwise(
    model: nn.Module, data: Iterable[Any] | None, method: str = "sparsegpt", **options: Any
) -> Layerwise:
    """Prune the weights of a copy of a language model in one shot; see `prune_layerwise_` for the arguments."""
    return prune_layerwise_(private_copy(model), data, method, **options)


def prune_layerwise_(
    model: nn.Module,
    data: Iterable[Any] | None,
    method: str = "sparsegpt",
    *,
    sparsity: float | None = None,
    pattern: Pattern = None,
    scope: str | None = None,
    blocks: str | Sequence[nn.Module] | None = None,
    within: Iterable[str] | str | None = None,
    ignore: Iterable[str] | str = (),
    propagate: bool = False,
    seed: int = 0,
    forward: Forward | None = None,
    checkpoint: Path | str | None = None,
    progress: Callable[[int, int, Block], object] | bool | None = None,
) -> Layerwise:
    """Prune the weights of the model itself, block by block, without training.

    Every block is pruned on what the pruned blocks before it give, in one pass over their outputs for all its layers
    (`propagate=True`: a pass per layer, each on the pruned ones before it in the block). Embeddings, the head and
    everything else outside the blocks are left alone.

    Args:
        model: changed in place; a decoder of `transformers`, or any model whose blocks feed one another.
        data: batches of token ids (N, L), or Mappings for the model's forward; all of them are used. None for methods
            that look at weights only.
        method: "magnitude", "wanda", "sparsegpt" (with true updates of what stays), or any other criterion for weights
            that ranks within a layer.
        sparsity: the fraction that goes from every layer, in [0, 1).
        pattern, scope: of `make_masks`; "2:4" and "4:8" need no sparsity.
        blocks: the name of the module list that holds them, or the modules; by default the longest chain of modules of
            one class with the most parameters.
        within, ignore: of `make_masks`, by names inside a block, such as "mlp.*".
        seed: of what is drawn.
        forward: (model, batch) -> output of the whole model.
        checkpoint: a folder with a file per finished block. The same call with the same data goes on after the last of
            them; a call that differs in either, or in the model's weights, is refused.
        progress: None shows a line per block where standard error is a terminal; or a function (number, blocks, Block).

    Raises InputError for a model without such blocks, DataError for data without batches, TargetError and InputError
    as `make_masks` does, before any work: for sequences longer than the model has positions, tokens that it does not
    embed and weights tied to something outside their block, too. ArtifactError for a checkpoint of another run.

    Sources: Frantar and Alistarh 2023, arXiv 2301.00774, section 3; Sun 2023, arXiv 2306.11695.
    """
    check_model(model)
    check_weights(model)
    chosen = _blocks_of(model, blocks)
    settings = _Settings(method, sparsity, pattern, _scope(method, scope), within, ignore, propagate, seed)
    everywhere = holders(model)
    for name, block in chosen.items():
        settings.check(name, block, everywhere, data is not None)
    for batch in data if isinstance(data, Sequence) else ():
        _check_batch(model, batch)
    files = None if checkpoint is None else _Checkpoints(Path(checkpoint), settings, model, chosen)
    if files and data is not None:
        data = files.watching(data)
    tell = _display(progress)
    with _evaluating(model), torch.no_grad():
        calls = _calls(model, chosen, data, forward or default_forward) if data is not None else None
        found: list[Block] = []
        keep: dict[str, Tensor] = {}
        for number, (name, block) in enumerate(chosen.items()):
            with watched(next(model.parameters()).device) as effort:
                masks = files.read(number, block) if files else None
                if masks is None:
                    dense = files.state(block) if files else ""
                    masks = settings.masks(block, calls[number] if calls else None)
                    masks.apply_(block)
                    if files:
                        files.write(number, block, dense, masks)
                if calls and number + 1 < len(chosen):
                    _pass_on(block, calls[number], calls[number + 1])
            keep |= {f"{name}.{part}": kept for part, kept in masks.keep.items()}
            zeros, weights = masks.counts
            found.append(Block(name, weights, zeros, effort.seconds, effort.peak_bytes))
            tell(number + 1, len(chosen), found[-1])
    total = sum(parameter.numel() for parameter in model.parameters())
    return Layerwise(model, Masks(keep, tensor_shapes(model), {}, total), tuple(found))


def find_blocks(model: nn.Module) -> str:
    """The name of the module list whose children of one class hold the most parameters: a decoder's blocks.

    Raises InputError where there is none.
    """
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(module) > 1
        and len({type(m) for m in module}) == 1
    }
    sizes = {name: size for name, size in sizes.items() if size}  # activations are no blocks
    if not sizes:
        raise InputError(
            f"{type(model).__name__} has no list of blocks of one class: pass blocks=, the name of a module list or "
            "the modules, in order of execution."
        )
    return str(max(sizes, key=lambda name: sizes[name]))


# -- what is asked for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """How every block is pruned."""

    method: str
    sparsity: float | None
    pattern: Pattern
    scope: str | None
    within: Any
    ignore: Any
    propagate: bool
    seed: int

    def masks(self, block: nn.Module, calls: list[_Call] | None) -> Masks:
        return make_masks(
            block,
            self.method,
            self.sparsity,
            scope=self.scope,
            pattern=self.pattern,
            data=None if calls is None else [call.batch() for call in calls],
            within=self.within,
            ignore=self.ignore,
            propagate=self.propagate,
            seed=self.seed,
            forward=_run,
        )

    def check(self, name: str, block: nn.Module, everywhere: Mapping[int, list[str]], has_data: bool) -> None:
        """Raise what `make_masks` raises about settings, and InputError for a weight tied to one outside the block."""
        _, layers, _ = asked_of(
            block,
            self.method,
            self.sparsity,
            self.scope,
            self.pattern,
            [] if has_data else None,
            self.within,
            self.ignore,
            propagate=self.propagate,
        )
        own, tensors = holders(block), named_tensors(block)
        for layer in layers:
            weight = id(tensors[layer.name])
            outside = sorted(set(everywhere[weight]) - {f"{name}.{part}" for part in own[weight]})
            if outside:
                raise InputError(
                    f"{layer.name!r} of block {name!r} is one tied weight with {outside[0]!r}, outside the block, and "
                    "would be pruned there, too: pass ignore= with it, or use make_masks."
                )


def _scope(method: str, scope: str | None) -> str | None:
    """What competes: as the method's source has it, but never more than a layer."""
    if scope == "global":
        raise InputError("block by block nothing competes globally: scope is 'layer' or 'row'.")
    known = WEIGHT_METHODS.get(method)
    if scope is None and known is not None and getattr(known, "scopes", ("layer",))[0] == "global":
        return "layer"
    return scope


# -- blocks and what they are called with ----------------------------------------------------------------------------


@dataclass(eq=False)
class _Call:
    """How a block is called on one batch. Its first tensor argument is the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor | None = field(default=None)

    def batch(self) -> dict[str, Any]:
        """As `_run` takes it."""
        assert self.hidden is not None
        return {"hidden": self.hidden, "args": self.args, "kwargs": self.kwargs}


def _run(block: nn.Module, batch: Mapping[str, Any]) -> Any:
    """The block's output on one of its calls."""
    kwargs = dict(batch["kwargs"])
    if "hidden_states" in kwargs:
        kwargs["hidden_states"] = batch["hidden"]
        return block(*batch["args"], **kwargs)
    return block(batch["hidden"], *batch["args"][1:], **kwargs)


def _blocks_of(model: nn.Module, blocks: str | Sequence[nn.Module] | None) -> dict[str, nn.Module]:
    if blocks is None or isinstance(blocks, str):
        name = find_blocks(model) if blocks is None else blocks
        try:
            found = model.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"blocks={name!r}: the model has no such module.") from error
        if not isinstance(found, (nn.ModuleList, nn.Sequential)) or not len(found):
            raise InputError(f"blocks={name!r} is a {type(found).__name__}, not a list of blocks.")
        return {f"{name}.{part}" if name else part: block for part, block in found.named_children()}
    names = {id(module): name for name, module in model.named_modules()}
    if not blocks or not all(id(block) in names for block in blocks):
        raise InputError("blocks= are modules of the model, in order of execution, at least one.")
    return {names[id(block)]: block for block in blocks}


def _calls(
    model: nn.Module, blocks: Mapping[str, nn.Module], data: Iterable[Any], forward: Forward
) -> list[list[_Call]]:
    """Per block, how it is called on every batch; the hidden states of the first block only.

    Masks and positions are taken from one pass of the whole dense model; equal ones are kept once. Raises InputError
    where a block is not fed by the one before it.
    """
    calls: list[list[_Call]] = [[] for _ in blocks]
    last: list[Tensor] = []  # the output of the block before
    order = list(blocks)

    def before(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0] if args else None
            if not isinstance(hidden, Tensor):
                raise InputError(f"block {order[number]!r} gets no tensor as its first argument.")
            if number and not (last and torch.equal(last[0], hidden)):
                raise InputError(
                    f"block {order[number]!r} is not fed by {order[number - 1]!r} alone: this model cannot be pruned "
                    "block by block. Pass blocks= with modules that feed one another, or use make_masks."
                )
            kept = {name: _kept(value) for name, value in kwargs.items() if name != "hidden_states"}
            if "hidden_states" in kwargs:
                kept["hidden_states"] = None
            rest = tuple(None if value is hidden else _kept(value) for value in args)  # hidden states come later
            calls[number].append(_Call(rest, kept, hidden.detach().clone() if number == 0 else None))

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        found = first_tensor(output)
        last[:] = [] if found is None else [found]

    handles = []
    for number, block in enumerate(blocks.values()):
        handles.append(block.register_forward_pre_hook(before(number), with_kwargs=True))
        handles.append(block.register_forward_hook(after))
    device = next(model.parameters()).device
    try:
        for batch in data:
            _check_batch(model, batch)
            last.clear()
            forward(model, move(batch, device))
    finally:
        for handle in handles:
            handle.remove()
    if not calls[0]:
        raise DataError("the data holds no batch, or the model does not call its blocks: pass blocks=.")
    if any(len(each) != len(calls[0]) for each in calls):
        raise InputError("the blocks are not called once each per batch: pass blocks= with those that are.")
    return calls


def _kept(value: Any) -> Any:
    """What a block may be called with again: a cache that it would append to is left out."""
    if isinstance(value, (Tensor, bool, int, float, str, type(None))):
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(_kept(part) for part in value)
    if isinstance(value, Mapping):
        return {name: _kept(part) for name, part in value.items()}
    return None


def _pass_on(block: nn.Module, calls: Sequence[_Call], following: Sequence[_Call]) -> None:
    """Run the pruned block, and let go of what it was called with, batch by batch."""
    for call, later in zip(calls, following, strict=True):
        later.hidden = first_tensor(_run(block, call.batch()))
        call.hidden = None


def _check_batch(model: nn.Module, batch: Any) -> None:
    check_batch(model, batch)
    tensor = first_tensor(batch)
    if tensor is not None and tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise DataError("a batch of the data holds NaN or infinity.")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without a cache of keys and values; as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    model.eval()
    if cached:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if cached:
            config.use_cache = cached  # type: ignore[union-attr]
        for module, mode in modes:
            module.training = mode


# -- finished blocks on disk -----------------------------------------------------------------------------------------


class _Checkpoints:
    """A folder with the weights and masks of finished blocks, which only the run that wrote it reads.

    A run is its settings, its data, and the weights outside the blocks. A block's own may be what they were before it
    was pruned, or after: a run in place that was interrupted leaves some of each.
    """

    def __init__(self, folder: Path, settings: _Settings, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        self._folder = folder
        self._run = hashlib.sha256(repr(settings).encode())
        inside = {id(tensor) for block in blocks.values() for tensor in named_tensors(block).values()}
        outside = {name: tensor for name, tensor in named_tensors(model).items() if id(tensor) not in inside}
        add_tensors(self._run, outside)

    def watching(self, data: Iterable[Any]) -> Iterator[Any]:
        """The same batches, which belong to the run from now on."""
        for batch in data:
            add_tensors(self._run, {str(number): tensor for number, tensor in enumerate(tensors_of(batch))})
            yield batch

    def state(self, block: nn.Module) -> str:
        """What tells a block's tensors from others."""
        digest = hashlib.sha256()
        add_tensors(digest, named_tensors(block))
        return digest.hexdigest()

    def read(self, number: int, block: nn.Module) -> Masks | None:
        """Give the block the weights it had when it was finished; None where it was not."""
        path = self._path(number)
        if not path.exists():
            return None
        metadata, _ = read_header(path)
        states = metadata.get(_BLOCK, "").split()
        if metadata.get(_RUN) != self._run.hexdigest() or self.state(block) not in states:
            raise ArtifactError(
                f"{path} is of another run, with other settings, data or weights: delete the folder, or give another."
            )
        tensors, own = read_tensors(path), named_tensors(block)
        keep = {n.removeprefix("keep."): t.bool() for n, t in tensors.items() if n.startswith("keep.")}
        for part, value in ((n.removeprefix("value."), t) for n, t in tensors.items() if n.startswith("value.")):
            own[part].copy_(value)
        return Masks(keep, tensor_shapes(block))

    def write(self, number: int, block: nn.Module, dense: str, masks: Masks) -> None:
        """Keep a block that had the state `dense`. Raises OSError; the blocks before survive."""
        own = named_tensors(block)
        tensors = {f"keep.{part}": kept.to(torch.uint8).contiguous() for part, kept in masks.keep.items()}
        tensors |= {f"value.{part}": own[part].detach().cpu().contiguous() for part in masks.keep}
        content = to_bytes(tensors)
        start, offset = with_metadata(content, {_RUN: self._run.hexdigest(), _BLOCK: f"{dense} {self.state(block)}"})
        write_bytes(self._path(number), start + content[offset:])

    def _path(self, number: int) -> Path:
        return self._folder / f"block-{number:04d}.safetensors"


# -- progress --------------------------------------------------------------------------------------------------------


def _display(progress: Callable[[int, int, Block], object] | bool | None) -> Callable[[int, int, Block], object]:
    if callable(progress):
        return progress
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return lambda number, total, block: None
    return lambda number, total, block: print(f"[{number}/{total}] {block}", file=sys.stderr, flush=True)  # noqa: T201
