"""Plan -> smaller nn.Module: tensors sliced, attributes updated, everything else as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from secateur.errors import PlanMismatchError
from secateur.inputs import check_model, private_copy
from secateur.norms import with_live_norms
from secateur.plans import Cut, Edit, Plan, named_tensors, replaced, tensor_shapes


@torch.inference_mode(False)
def shrink(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` without the channels that `plan` removes; the original is not touched.

    The copy has the same class and runs its own forward. Training mode, `requires_grad`, dtype, device, hooks and tied
    tensors are kept; gradients are not. Raises PlanMismatchError for a plan of another architecture.
    """
    check_model(model)
    plan.check(tensor_shapes(model))
    tensors, cuts = named_tensors(model), by_tensor(plan.cuts)
    smaller = {id(tensors[name]): _sliced(tensors[name], its_cuts) for name, its_cuts in cuts.items()}
    small = replaced(private_copy(model, smaller), plan.replacements)
    marked = dict(small.named_parameters())
    for name, parameter in model.named_parameters():
        vars(marked[name]).update(vars(parameter))  # marks such as `no_weight_decay`, which copying loses
    for edit in plan.edits:
        _edit(small, edit)
    _update_attributes(small, {name.rpartition(".")[0] for name in cuts})
    return small


@torch.inference_mode(False)
def zero_channels(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` in which every slot of the plan is zero (running variances 1): what `shrink` must equal.

    Where the plan narrows norms (`prune_residual=True`), the copy takes them over the live channels (`norms`).
    """
    check_model(model)
    plan.check(tensor_shapes(model))
    zeroed = private_copy(model)
    zero_(named_tensors(zeroed), plan)
    return with_live_norms(zeroed, plan.norms)


def zero_(tensors: Mapping[str, Tensor], plan: Plan) -> None:
    """Write zeros (ones into running variances) wherever the plan removes entries of the named tensors, in place."""
    with torch.no_grad():
        for cut in plan.cuts:
            tensor = tensors[cut.tensor]
            tensor.index_fill_(cut.dim, torch.tensor(cut.removed, device=tensor.device), cut.fill)


def by_tensor(cuts: Iterable[Cut]) -> dict[str, list[Cut]]:
    """The cuts of each tensor."""
    found: dict[str, list[Cut]] = {}
    for cut in cuts:
        found.setdefault(cut.tensor, []).append(cut)
    return found


def sliced(tensor: Tensor, cuts: list[Cut]) -> Tensor:
    """The entries of `tensor` that all `cuts` keep, in its memory format."""
    spread = tensor.dim() == 4 and not tensor.is_contiguous()
    layout = torch.channels_last if spread and tensor.is_contiguous(memory_format=torch.channels_last) else None
    for cut in cuts:
        tensor = tensor.index_select(cut.dim, torch.tensor(cut.kept, device=tensor.device))
    return tensor.contiguous(memory_format=layout or torch.contiguous_format)


def _sliced(old: Tensor, cuts: list[Cut]) -> Tensor:
    new = sliced(old.detach(), cuts)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new.requires_grad_(old.requires_grad)


def _edit(model: nn.Module, edit: Edit) -> None:
    try:
        module = model.get_submodule(edit.module)
        value = getattr(module, edit.attribute)
        current = value if edit.index is None else value[edit.index]
    except (AttributeError, IndexError, TypeError) as error:
        raise PlanMismatchError(f"the model has no {edit.module}.{edit.attribute}, which the plan edits.") from error
    if type(current) is not int or current != edit.before:
        raise PlanMismatchError(
            f"{edit.module}.{edit.attribute} is {current!r}; the plan expects {edit.before} and makes it {edit.after}."
        )
    if edit.index is None:
        setattr(module, edit.attribute, edit.after)
    else:
        setattr(module, edit.attribute, type(value)([*value[: edit.index], edit.after, *value[edit.index + 1 :]]))


def _linear(module: nn.Linear) -> None:
    module.out_features, module.in_features = module.weight.shape


def _conv(module: nn.modules.conv._ConvNd) -> None:
    first, second = module.weight.shape[:2]
    if module.transposed:
        module.in_channels, module.out_channels = first, second * module.groups
    else:
        module.out_channels, module.in_channels = first, second * module.groups


def _batch_norm(module: nn.modules.batchnorm._NormBase) -> None:
    tensor = module.weight if module.weight is not None else module.running_mean
    if tensor is not None:
        module.num_features = tensor.shape[0]


def _group_norm(module: nn.GroupNorm) -> None:
    if module.weight is not None:
        module.num_channels = module.weight.shape[0]


def _embedding(module: nn.Embedding) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _prelu(module: nn.PReLU) -> None:
    module.num_parameters = module.weight.numel()


def _recurrent(module: nn.RNNBase) -> None:
    module._init_flat_weights()
    recurrent = _matrix(module, "weight_hh_l0")
    module.input_size = _matrix(module, "weight_ih_l0").shape[1]
    if module.proj_size:
        module.proj_size, module.hidden_size = _matrix(module, "weight_hr_l0").shape
    else:
        module.hidden_size = recurrent.shape[1]


def _recurrent_cell(module: nn.RNNCellBase) -> None:
    module.input_size = _matrix(module, "weight_ih").shape[1]
    module.hidden_size = _matrix(module, "weight_hh").shape[1]


def _matrix(module: nn.Module, name: str) -> Tensor:
    matrix = getattr(module, name)
    assert isinstance(matrix, Tensor)
    return matrix


def _hooked(module: nn.Module) -> None:
    """Weights that a hook computes before each forward are plain attributes: bring them to their new shape."""
    with torch.no_grad():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                hook(module, ())
            elif isinstance(hook, SpectralNorm):
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))


def _bilinear(module: nn.Bilinear) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


# The one table of leaf modules: their descriptive attributes follow from their tensors. Attributes that decide what
# forward does (groups, num_groups, sizes of views) come with the plan.
LEAF_ATTRIBUTES: tuple[tuple[type[nn.Module], Callable[..., None]], ...] = (
    (nn.Module, _hooked),
    (nn.Linear, _linear),
    (nn.modules.conv._ConvNd, _conv),
    (nn.modules.batchnorm._NormBase, _batch_norm),
    (nn.GroupNorm, _group_norm),
    (nn.Embedding, _embedding),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent_cell),
    (nn.Bilinear, _bilinear),
)


def _update_attributes(model: nn.Module, owners: set[str]) -> None:
    for name, module in model.named_modules():
        if name in owners or any(tensor is not None for tensor in module._parameters.values()):
            for kind, update in LEAF_ATTRIBUTES:
                if isinstance(module, kind):
                    update(module)
