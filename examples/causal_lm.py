"""Prune a causal language model in two ways: zeros among its weights, or fewer heads and smaller MLPs; open both again.

    pip install 'secateur[hf]'
    python examples/causal_lm.py                                   # a tiny Llama, trained here
    python examples/causal_lm.py --model gpt2 --text notes.txt     # a model of the hub, on a text of yours

Neither way takes a gradient: weights go block by block with SparseGPT, heads and units with least squares on windows
of the text. The text made up here is of film reviews: what someone did must follow from what the film was.
"""

from __future__ import annotations

import argparse
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
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import secateur as sc

SUBJECTS, ADVERBS = ("plot", "cast", "music", "ending", "film"), ("", "very ", "really ")
GOOD, BAD = ("great", "moving", "clever", "funny"), ("dull", "weak", "loud", "slow")
LENGTH = 32  # tokens of a window


def reviews(number: int, seed: int) -> str:
    """So many sentences: "the plot was not dull so we stayed . "."""
    drawn, sentences = random.Random(seed), []
    for _ in range(number):
        negation, word = drawn.choice(("", "not ")), drawn.choice(GOOD + BAD)
        end = "stayed" if (word in GOOD) != bool(negation) else "left"
        sentences.append(f"the {drawn.choice(SUBJECTS)} was {negation}{drawn.choice(ADVERBS)}{word} so we {end} . ")
    return "".join(sentences)


def tiny_llama() -> tuple[Any, Any]:
    """A Llama of two layers, eight heads over four of keys and values, and a tokenizer that knows the words."""
    numbers = {word: number for number, word in enumerate(["[UNK]", *sorted(set(reviews(500, 0).split()))])}
    core = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    config = LlamaConfig(
        vocab_size=len(numbers),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


def train(model: Any, windows: Sequence[Tensor], epochs: int) -> None:
    """Next words, with AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for batch in windows:
            optimizer.zero_grad()
            model(batch, labels=batch).loss.backward()
            optimizer.step()
    model.eval()


def goes_on(model: Any, tokenizer: Any, start: str) -> str:
    """What the model says next, word by word from its cache."""
    tokens = tokenizer(start, return_tensors="pt")["input_ids"]
    said = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    return str(tokenizer.decode(said[0]))


def zero_share(model: nn.Module, names: Sequence[str]) -> float:
    """The fraction of the entries of these parameters that is zero."""
    weights = [weight for name, weight in model.named_parameters() if name in names]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="a causal language model: its name on the hub, or a folder; a tiny Llama if not"
    )
    parser.add_argument("--text", type=Path, help="a text file, for calibration and perplexity; made up if not given")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of the blocks' weights, in the first way")
    parser.add_argument("--max-macs", type=float, default=0.7, help="fraction of the MACs left in the second way")
    parser.add_argument(
        "--epochs", type=int, default=12, help="passes over the text before pruning, for the tiny model"
    )
    parser.add_argument("--out", type=Path, default=Path("causal_lm_model"), help="folder for both models")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    torch.manual_seed(0)
    if options.model is None:
        model, tokenizer = tiny_llama()
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    text = reviews(2000, seed=1) if options.text is None else options.text.read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    tokens, unseen = tokens[: -len(tokens) // 5], tokens[-len(tokens) // 5 :]
    windows = list(tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH).split(16))
    if options.model is None:
        train(model, windows, options.epochs)
    start = "the music was not slow"
    print(f"dense   {sc.count(model, windows[0][:1])}, {sc.perplexity(model, unseen, length=LENGTH)}")
    print(f"        {goes_on(model, tokenizer, start)}")

    sparse = sc.prune_layerwise(model, windows[:16], "sparsegpt", sparsity=options.sparsity)
    for part in (sparse.model, tokenizer):  # a model of zeros has the shapes of its config: any tool can open it
        part.save_pretrained(options.out / "sparse")  # type: ignore[operator]
    opened = AutoModelForCausalLM.from_pretrained(options.out / "sparse").eval()
    with torch.no_grad():
        assert torch.equal(opened(windows[0]).logits, sparse.model(windows[0]).logits)
    share = zero_share(opened, list(sparse.masks.keep))
    print(f"sparse  {share:.1%} of the blocks' weights are zero, {sc.perplexity(opened, unseen, length=LENGTH)}")
    print(f"        {goes_on(opened, tokenizer, start)}")

    target = sc.Target(max_macs=options.max_macs)
    pruned = sc.prune(
        model, windows[0][:1], target=target, data=windows[:16], repair=("least_squares",), ignore=["lm_head"]
    )
    sc.save(pruned, options.out / "small", tokenizer=tokenizer)
    small: Any = sc.load(options.out / "small")  # heads that differ by layer fit no config: the plan beside it knows
    with torch.no_grad():
        assert torch.equal(small(windows[0]).logits, pruned.model(windows[0]).logits)  # type: ignore[operator]
    print(f"\n{pruned.summary}\n")
    print(f"small   {sc.count(small, windows[0][:1])}, {sc.perplexity(small, unseen, length=LENGTH)}")
    print(f"        {goes_on(small, tokenizer, start)}")
    print(f"{options.out} holds both; opened again: the same outputs, bit for bit")


if __name__ == "__main__":
    sys.exit(main())
