"""Keep masks in force while Lightning fine-tunes a pruned network.

    python examples/in_lightning.py

A small network on handwritten digits is trained, loses 80 % of its weights by SNIP, and is fine-tuned. The callback
takes any training hook: `masks.hook()`, a schedule (`Gradual`), a penalty (`GammaPenalty`).
"""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.data import Batches, digits
from secateur.integrations.lightning import PruningCallback
from secateur.nets import digits_net


class Classifier(LightningModule):
    """Any LightningModule: the callback is told in which attribute the network is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        """The loss of a batch."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Momentum and weight decay would bring masked weights back, but for the callback."""
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)


def fit(net: nn.Module, batches: Batches, folder: str, callbacks: list[Any]) -> nn.Module:
    """Three epochs."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=3,
        default_root_dir=folder,
        callbacks=callbacks,
        accelerator="cpu",
        enable_checkpointing=False,
        **quiet,
    )
    trainer.fit(Classifier(net), batches)
    return net.eval()


def main() -> None:
    warnings.filterwarnings("ignore", module="lightning")
    torch.manual_seed(0)
    data = digits()
    batches, test = Batches(data.train, 64), Batches(data.test, 512, shuffle=False)
    with tempfile.TemporaryDirectory() as folder:
        dense = fit(digits_net(), batches, folder, [])
        masks = sc.make_masks(dense, "snip", 0.8, data=list(batches))
        sparse = masks.apply(dense)
        cut = sc.evaluate(sparse, test).accuracy
        tuned = fit(sparse, batches, folder, [PruningCallback(masks.hook(), of="net")])
    zero = sum(int((dict(tuned.named_parameters())[name] == 0).sum()) for name in masks.keep) / masks.counts[1]
    accuracies = [
        f"{value:.1%}" for value in (sc.evaluate(dense, test).accuracy, cut, sc.evaluate(tuned, test).accuracy)
    ]
    print(
        f"dense {accuracies[0]}, masked {accuracies[1]}, fine-tuned {accuracies[2]} with {zero:.1%} of the weights zero"
    )


if __name__ == "__main__":
    main()
