"""Our hooks in other people's trainers: zeros hold, schedules end where they should, checkpoints carry the state."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from pretrained_for_tests import library
from secateur.errors import InputError, TrainingError
from secateur.plans import named_tensors


class Recorder:
    """Counts its moments, and sees what order they come in."""

    def __init__(self) -> None:
        self.moments: list[str] = []

    def after_backward(self, model: nn.Module, optimizer: Any) -> None:
        assert any(parameter.grad is not None for parameter in model.parameters())
        self.moments.append("backward")

    def after_step(self, model: nn.Module, optimizer: Any) -> None:
        self.moments.append("step")

    def after_epoch(self, model: nn.Module, optimizer: Any) -> None:
        self.moments.append("epoch")


STEPS = ["backward", "step"] * 4 + ["epoch"]


def zeros(model: nn.Module, masks: sc.Masks) -> bool:
    return all(not named_tensors(model)[name][~keep].any() for name, keep in masks.keep.items())


# --- transformers.Trainer


def classifier() -> Any:
    t = library()
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'secateur[trainer]'")
    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return t.BertForSequenceClassification(config)


def rows(number: int = 32) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 30, (number, 8), generator=generator)
    return [{"input_ids": row, "labels": int(row.sum() % 2)} for row in ids]


def trained(model: Any, folder: Path, hooks: Any, epochs: int = 1, **options: Any) -> Any:
    t = library()
    from secateur.integrations.transformers import PruningCallback

    arguments = t.TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=8, learning_rate=1e-2,
        weight_decay=0.1, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="epoch", seed=0,
    )  # fmt: skip
    trainer = t.Trainer(
        model=model, args=arguments, train_dataset=rows(), callbacks=[PruningCallback(hook) for hook in hooks]
    )
    trainer.train(**options)
    return trainer.model


def test_the_trainer_calls_every_moment_and_masks_hold(tmp_path: Path) -> None:
    model, recorder = classifier(), Recorder()
    masks = sc.make_masks(model, "magnitude", 0.5, within="bert.encoder*")
    tuned = trained(masks.apply(model), tmp_path, [[recorder, masks.hook()]])
    assert recorder.moments == STEPS
    assert zeros(tuned, masks)
    free = trained(masks.apply(model), tmp_path / "free", [Recorder()])
    assert not zeros(free, masks)  # otherwise this says nothing


def test_a_schedule_in_the_trainer_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    def gradual() -> sc.Gradual:
        return sc.Gradual("magnitude", 0.6, end=6, within="bert.encoder*")

    hook = gradual()
    whole = trained(classifier(), tmp_path / "a", [hook], epochs=2)
    assert hook.masks is not None and hook.masks.sparsity == pytest.approx(0.6, abs=0.01)
    second = gradual()
    again = trained(
        classifier(), tmp_path / "a", [second], epochs=2, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4")
    )
    assert second.masks is not None and zeros(again, second.masks)
    for name, keep in hook.masks.keep.items():
        assert torch.equal(keep, second.masks.keep[name])
    for name, tensor in named_tensors(whole).items():
        assert torch.allclose(tensor, named_tensors(again)[name], atol=1e-6)
    with pytest.raises(TrainingError, match="this run has"):
        trained(classifier(), tmp_path / "a", [Recorder()], epochs=2, resume_from_checkpoint=True)
    shutil.copytree(tmp_path / "a" / "checkpoint-4", tmp_path / "b" / "checkpoint-4")
    (tmp_path / "b" / "checkpoint-4" / "secateur_hooks.pt").unlink()
    with pytest.raises(TrainingError, match="no state of hooks"):
        trained(classifier(), tmp_path / "b", [gradual()], epochs=2, resume_from_checkpoint=True)


# --- Lightning


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))


def lightning_run(net: nn.Module, folder: Path, hooks: Any, epochs: int = 1, of: str = "net", **options: Any) -> Any:
    lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning: pip install 'secateur[lightning]'")
    from secateur.integrations.lightning import PruningCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=0.1)

    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)
    limits = options.pop("limits", {})
    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=folder, callbacks=[PruningCallback(hooks, of=of)], logger=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", **limits,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, data, **options)
    return module.net, trainer


def test_lightning_calls_every_moment_and_masks_hold(tmp_path: Path) -> None:
    net, recorder = network(), Recorder()
    masks = sc.make_masks(net, "magnitude", 0.5)
    tuned, _ = lightning_run(masks.apply(net), tmp_path, [recorder, masks.hook()])
    assert recorder.moments == STEPS
    assert zeros(tuned, masks) and not zeros(lightning_run(masks.apply(net), tmp_path, [Recorder()])[0], masks)


def test_lightning_calls_once_per_step_while_gradients_accumulate(tmp_path: Path) -> None:
    recorder = Recorder()
    lightning_run(network(), tmp_path, recorder, limits={"accumulate_grad_batches": 2})
    assert recorder.moments == ["backward", "step"] * 2 + ["epoch"]


def test_a_schedule_in_lightning_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    def gradual() -> sc.Gradual:
        return sc.Gradual("magnitude", 0.6, end=6)

    hook, second = gradual(), gradual()
    whole, _ = lightning_run(network(), tmp_path, hook, epochs=2)
    _, half = lightning_run(network(), tmp_path, gradual(), epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    again, _ = lightning_run(network(), tmp_path, second, epochs=2, ckpt_path=str(tmp_path / "half.ckpt"))
    assert hook.masks is not None and second.masks is not None
    assert all(torch.equal(keep, second.masks.keep[name]) for name, keep in hook.masks.keep.items())
    for name, tensor in named_tensors(whole).items():
        assert torch.allclose(tensor, named_tensors(again)[name], atol=1e-6)


def test_what_is_no_hook_and_what_is_no_network_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from secateur.integrations.hooking import Hooks

    with pytest.raises(InputError, match="no hook"):
        Hooks([])
    with pytest.raises(InputError, match="at least one of the methods"):
        Hooks(network())
    with pytest.raises(InputError, match="no network in its attribute 'body'"):
        lightning_run(network(), tmp_path, Recorder(), of="body")
