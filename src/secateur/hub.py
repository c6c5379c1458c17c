"""HubMixin: a network of your own with `save_pretrained`, `from_pretrained` and `push_to_hub`, also once it is pruned.

Importing this module needs huggingface_hub; nothing else in Secateur imports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn

from secateur.artifacts import TENSORS, describe, load, save
from secateur.errors import InputError
from secateur.plans import Plan, tensor_shapes

try:
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
except ModuleNotFoundError as error:
    raise InputError("secateur.HubMixin needs huggingface_hub: pip install 'secateur[hf]'.") from error


class HubMixin(PyTorchModelHubMixin, library_name="secateur"):
    """A `PyTorchModelHubMixin` whose files hold the plan of a pruned model, and are never a pickle.

        class Net(nn.Module, secateur.HubMixin): ...

        pruned = secateur.prune(Net(width=64), example_inputs)
        pruned.model.save_pretrained("folder", plan=pruned.plan)
        net = Net.from_pretrained("folder")

    The arguments of `__init__` are kept in `config.json`, as huggingface_hub does it; they build the dense model, which
    is shrunk by the plan. A loaded model knows its plan as `pruning_plan`: saving it again needs no plan, and after
    more pruning only the plan of that pruning.
    """

    pruning_plan: Plan | None = None  # from the model that the config builds to this one

    def save_pretrained(self, save_directory: str | Path, *, plan: Plan | None = None, **options: Any) -> str | None:
        """Save tensors and plan, config and model card in a folder; `options` are those of huggingface_hub.

        Raises PlanMismatchError when `plan` does not lead to this model, InputError when the model was pruned and the
        plan is not known.
        """
        with self._planned(plan):
            return super().save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, *, plan: Plan | None = None, **options: Any) -> str:
        """Save as `save_pretrained` does and upload; `options` are those of huggingface_hub. The commit's address."""
        with self._planned(plan):
            return super().push_to_hub(repo_id, **options)

    @contextmanager
    def _planned(self, plan: Plan | None) -> Iterator[None]:
        """Have `pruning_plan` lead to this model while it is saved: huggingface_hub passes no arguments on."""
        known = self.pruning_plan
        if plan is not None:
            since_loaded = known is not None and plan.shapes == known.shapes_after() != known.shapes
            self.pruning_plan = known.then(plan) if known is not None and since_loaded else plan
        try:
            yield
        finally:
            self.pruning_plan = known

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.pruning_plan is None:
            self._check_not_pruned()
        save(cast("nn.Module", self), save_directory / TENSORS, plan=self.pruning_plan)

    def _check_not_pruned(self) -> None:
        """Raise InputError where the config builds a model of other shapes: without the plan it would be lost."""
        config = self._hub_mixin_config
        arguments = config if isinstance(config, dict) else {"config": config} if config is not None else {}
        kinds = {name: parameter.annotation for name, parameter in self._hub_mixin_init_parameters.items()}
        try:
            with torch.device("meta"):
                built = type(self)(**{name: self._decode_arg(kinds[name], value) for name, value in arguments.items()})
        except (KeyError, TypeError):
            return  # an argument that no config holds: it will be given to `from_pretrained`
        if tensor_shapes(cast("nn.Module", built)) != tensor_shapes(cast("nn.Module", self)):
            raise InputError(
                f"this {type(self).__name__} has other shapes than its config builds: if it was pruned, "
                "pass the plan: save_pretrained(folder, plan=pruned.plan)."
            )

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str = "cpu",
        **options: Any,
    ) -> Self:
        """Build the dense model from the config, load the pruned one."""
        places = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        where = {name: options.pop(name) for name in places}
        file = Path(model_id) / TENSORS
        if not Path(model_id).is_dir():
            file = Path(hf_hub_download(repo_id=model_id, filename=TENSORS, **where))
        small = cast("Self", load(file, cast("nn.Module", cls(**options)).to(map_location)))
        small.pruning_plan = describe(file).plan
        return cast("Self", cast("nn.Module", small).eval())
