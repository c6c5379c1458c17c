"""Prune a model of timm to half its MACs, save it, load it into a fresh build, and export it to ONNX.

    pip install 'secateur[vision,onnx]'
    python examples/timm_model.py                                             # a small ViT with random weights
    python examples/timm_model.py --model convnext_atto --pretrained          # with the weights of the hub

Nothing here knows what kind of model it is: any other name of timm goes the same way.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import secateur as sc


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a name of timm.list_models()")
    parser.add_argument("--pretrained", action="store_true", help="fetch trained weights; random ones otherwise")
    parser.add_argument("--max-macs", type=float, default=0.5, help="fraction of the MACs that may remain")
    parser.add_argument("--out", type=Path, default=Path("timm_model"), help="folder for the files")
    return parser.parse_args(argv)


def pruned_both_ways(model: nn.Module, example: Tensor, target: sc.Target) -> sc.Pruned:
    """With the widths under LayerNorm as they are, and with these open too: fewer channels of more layers go."""
    for prune_residual in (False, True):
        pruned = sc.prune(model, example, criterion="l2", target=target, prune_residual=prune_residual, round_to=2)
        locked = pruned.summary.locked
        print(f"\nprune_residual={prune_residual}: {pruned.plan!r}")
        print(f"verified: {pruned.summary.verified_difference:.1e} from the original without these channels")
        print(f"locked: {len(locked)} groups, such as {', '.join(list(locked)[:3])}")
    return pruned


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    torch.manual_seed(0)
    model = timm.create_model(options.model, pretrained=options.pretrained).eval()
    example = torch.randn(1, *model.pretrained_cfg["input_size"])
    print(f"{options.model}: {sc.count(model, example)}")
    pruned = pruned_both_ways(model, example, sc.Target(max_macs=options.max_macs))
    print(f"\n{pruned.plan.table()}\n")
    # Here you would fine-tune `pruned.model`, a module of the same class as `model`.

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "small.safetensors"
    sc.save(pruned, path)
    small = sc.load(path, timm.create_model(options.model, pretrained=False)).eval()
    assert torch.equal(small(example), pruned.model(example))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, loaded into a fresh build: the same outputs, bit for bit")
    print(sc.export(small, example, options.out / "small.onnx"))


if __name__ == "__main__":
    sys.exit(main())
