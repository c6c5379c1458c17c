"""Prune heads and MLPs of a Hugging Face model by what they do on data, fine-tune it, save it as a folder, load that.

    pip install 'secateur[hf]'
    python examples/hugging_face.py                                                 # a tiny BERT, trained here
    python examples/hugging_face.py --model distilbert-base-uncased-finetuned-sst-2-english --epochs 0

The data are film reviews of one clause, made up here; whoever reads them must see whether there is a "not".
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

import secateur as sc

SUBJECTS = ("plot", "cast", "music", "ending", "film")
NEGATIONS = ("", "not")
ADVERBS = ("", "very", "really")
GOOD, BAD = ("great", "moving", "clever", "funny"), ("dull", "weak", "loud", "slow")
Batch = dict[str, Tensor]


def reviews() -> list[tuple[str, int]]:
    """Every (sentence, 1 if it praises), in random order."""
    found = []
    for subject, negation, adverb, word in itertools.product(SUBJECTS, NEGATIONS, ADVERBS, GOOD + BAD):
        sentence = " ".join(part for part in ("the", subject, "was", negation, adverb, word) if part)
        found.append((sentence, int((word in GOOD) != bool(negation))))
    random.Random(0).shuffle(found)
    return found


def tiny_bert() -> tuple[nn.Module, Any]:
    """A BERT of two layers with eight heads each, and a tokenizer that knows the words of the reviews."""
    words = sorted({word for sentence, _ in reviews() for word in sentence.split()})
    numbers = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    splitter = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
    splitter.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="[PAD]", unk_token="[UNK]")
    config = BertConfig(
        vocab_size=len(numbers),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        intermediate_size=128,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config), tokenizer


def batches_of(pairs: Sequence[tuple[str, int]], tokenizer: Any, size: int = 20) -> list[Batch]:
    """Keyword arguments of the model, labels among them: the model computes its own loss."""
    found = []
    for start in range(0, len(pairs), size):
        sentences, labels = zip(*pairs[start : start + size], strict=True)
        batch = dict(tokenizer(list(sentences), padding=True, return_tensors="pt"))
        found.append({**batch, "labels": torch.tensor(labels)})
    return found


def train(model: nn.Module, batches: Sequence[Batch], epochs: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    right = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in batches]
    return torch.cat(right).float().mean().item()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="a sequence classifier: its name on the hub, or a folder; a tiny BERT if not given"
    )
    parser.add_argument("--max-macs", type=float, default=0.5, help="fraction of the MACs that may remain")
    parser.add_argument("--epochs", type=int, default=25, help="passes over the reviews, before pruning and after")
    parser.add_argument("--out", type=Path, default=Path("hugging_face_model"), help="folder for the pruned model")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    torch.manual_seed(0)
    if options.model is None:
        (model, tokenizer), lr = tiny_bert(), 1e-3
    else:
        tokenizer, lr = AutoTokenizer.from_pretrained(options.model), 2e-5
        model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    batches = batches_of(reviews(), tokenizer)
    training, test = batches[:8], batches[8:]
    train(model, training, options.epochs, lr)
    example = {name: tensor for name, tensor in test[0].items() if name != "labels"}
    print(f"dense      {sc.count(model, example)}, accuracy {accuracy(model, test):.1%}")

    target = sc.Target(max_macs=options.max_macs)
    pruned = sc.prune(model, example, criterion="taylor_fo", target=target, data=training)
    print(f"\n{pruned.plan}\n\n{pruned.summary}\n")
    cut = accuracy(pruned.model, test)
    train(pruned.model, training, options.epochs, lr)
    print(f"pruned     {sc.count(pruned.model, example)}, accuracy {cut:.1%} -> {accuracy(pruned.model, test):.1%}")

    sc.save(pruned, options.out, tokenizer=tokenizer)
    small = sc.load(options.out)  # the config in the folder says what to build; no code of the folder runs
    with torch.no_grad():
        assert torch.equal(small(**example).logits, pruned.model(**example).logits)
    names = ", ".join(sorted(file.name for file in options.out.iterdir()))
    print(f"{options.out} holds {names}; loaded again: the same outputs, bit for bit")


if __name__ == "__main__":
    sys.exit(main())
