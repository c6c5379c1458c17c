"""Text: sentences with labels in batches of similar length, and windows of a long text for language models."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.data.batching import mixed
from secateur.errors import DataError, InputError

BUCKET = 50  # batches whose sentences are sorted together


@dataclass(frozen=True, eq=False)
class Sentences:
    """Labelled sentences, tokenised: one after the other in a single tensor."""

    tokens: Tensor  # int32 (all tokens,)
    starts: Tensor  # int64 (sentences + 1,): sentence i is tokens[starts[i]:starts[i + 1]]
    labels: Tensor  # int64 (sentences,), positions in `classes`
    classes: tuple[str, ...]
    padding: int  # the token that fills up short sentences in a batch
    name: str

    def __post_init__(self) -> None:
        if not len(self.labels):
            raise DataError(f"{self.name}: there is no sentence in it.")
        if len(self.starts) != len(self.labels) + 1 or int(self.starts[-1]) != len(self.tokens):
            raise DataError(f"{self.name}: starts, tokens and labels do not belong together.")
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise DataError(f"{self.name}: labels must lie in [0, {len(self.classes)}): one per class name.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """Tokens per sentence, (sentences,)."""
        return self.starts.diff()

    def subset(self, indices: Tensor) -> Sentences:
        """The sentences at these positions, in this order."""
        if not len(indices):
            raise DataError(f"{self.name}: there is no sentence in it.")
        rows = [self.tokens[self.starts[i] : self.starts[i + 1]] for i in indices.tolist()]
        starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
        return replace(self, tokens=torch.cat(rows), starts=starts, labels=self.labels[indices])

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """As a model of `transformers` takes them: input_ids and attention_mask (n, longest), labels (n,); int64."""
        rows = [self.tokens[self.starts[i] : self.starts[i + 1]].long() for i in indices.tolist()]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.padding)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(padded.shape[1])[None] < lengths[:, None]).long()
        return {"input_ids": padded, "attention_mask": mask, "labels": self.labels[indices]}


@dataclass(frozen=True, eq=False)
class TextSplits:
    """A training, a validation and a test part. The test part is only ever reported."""

    train: Sentences
    validation: Sentences
    test: Sentences


class TextBatches:
    """An iterable of {"input_ids", "attention_mask", "labels"}, padded to the longest sentence of each batch.

    With `shuffle` the order follows from (seed, epoch): sentences are shuffled, sorted by length within every 50
    batches, and the batches shuffled, so that little is padding. Without, they come in their own order.
    """

    def __init__(self, sentences: Sentences, batch_size: int, *, seed: int = 0, shuffle: bool = True) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is at least 1, got {batch_size}.")
        self.sentences, self.batch_size, self.seed, self.shuffle, self.epoch = sentences, batch_size, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the coming iterations."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch."""
        return math.ceil(len(self.sentences) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for indices in self._order():
            yield self.sentences.batch(indices)

    def _order(self) -> list[Tensor]:
        if not self.shuffle:
            return list(torch.split(torch.arange(len(self.sentences)), self.batch_size))
        generator = torch.Generator().manual_seed(mixed(self.seed, self.epoch))
        lengths = self.sentences.lengths
        batches: list[Tensor] = []
        shuffled = torch.randperm(len(self.sentences), generator=generator)
        for part in torch.split(shuffled, BUCKET * self.batch_size):
            batches += torch.split(part[lengths[part].argsort(stable=True)], self.batch_size)
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]

    def __repr__(self) -> str:
        return f"TextBatches({len(self)} of {self.batch_size} from {self.sentences.name}, epoch {self.epoch})"


def tokenised(
    texts: Sequence[str], labels: Tensor, classes: tuple[str, ...], tokenizer: Any, *, max_length: int, name: str
) -> Sentences:
    """Labelled sentences by a tokenizer of `transformers` (anything that is called like one), cut at `max_length`."""
    if not texts:
        raise DataError(f"{name}: there is no sentence in it.")
    padding = getattr(tokenizer, "pad_token_id", None)
    if padding is None:
        raise InputError("the tokenizer has no padding token: set tokenizer.pad_token, for example to its eos_token.")
    rows: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return Sentences(tokens, starts, labels, classes, padding, name)


def sst2(
    tokenizer: Any,
    data_dir: Path | str | None = None,
    *,
    seed: int = 0,
    validation: float = 0.05,
    max_length: int = 128,
    sentences: int | None = None,
) -> TextSplits:
    """SST-2 (Socher 2013, as GLUE splits it): 67,349 phrases and 872 dev sentences, negative or positive.

    From `sst2/train-*.parquet` and `sst2/validation-*.parquet` in `data_dir` or SECATEUR_DATA, else from the Hub
    (`stanfordnlp/sst2`). The dev sentences are the test part; the validation part is a fraction of the training
    phrases, by seed. `sentences`: use only so many training phrases. Raises DataError where the data is missing.
    """
    from secateur.data.sources import parquet_files

    files = parquet_files("sst2", {"train": "train-0*.parquet", "test": "validation-*.parquet"}, data_dir)
    train, test = _rows("sst2", files, "train"), _rows("sst2", files, "test")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train[0]), generator=generator)
    if sentences is not None:
        order = order[:sentences]
    held = max(1, round(validation * len(order)))
    if not 0 < held < len(order):
        raise InputError(f"validation is a fraction in (0, 1) that leaves sentences to train on; got {validation}.")

    def part(rows: tuple[list[str], Tensor], picked: Tensor | None, name: str) -> Sentences:
        texts, labels = rows
        chosen = torch.arange(len(texts)) if picked is None else picked
        return tokenised(
            [texts[i] for i in chosen.tolist()],
            labels[chosen],
            ("negative", "positive"),
            tokenizer,
            max_length=max_length,
            name=f"sst2/{name}",
        )

    return TextSplits(
        part(train, order[held:].sort().values, "train"),
        part(train, order[:held].sort().values, "validation"),
        part(test, None, "test"),
    )


def text_windows(
    tokens: Tensor, length: int, *, count: int | None = None, batch_size: int = 8, seed: int = 0
) -> list[Tensor]:
    """Windows of a long text as batches of token ids, int64 (batch_size, length).

    `count` windows drawn at random by `seed`, for calibration; None: all of it, one window after the other, the rest
    at the end left out. Raises DataError for a text that is shorter than one window.
    """
    if tokens.dim() != 1 or tokens.is_floating_point():
        raise InputError(f"tokens is one sequence of token ids, (tokens,); got {list(tokens.shape)} {tokens.dtype}.")
    if len(tokens) < length:
        raise DataError(f"the text has {len(tokens):,} tokens, fewer than one window of {length:,}: use a longer text.")
    if count is None:
        starts = torch.arange(0, len(tokens) - length + 1, length)
    else:
        starts = torch.randint(len(tokens) - length + 1, (count,), generator=torch.Generator().manual_seed(seed))
    windows = torch.stack([tokens[start : start + length] for start in starts.tolist()]).long()
    return list(torch.split(windows, batch_size))


def wordpiece(texts: Iterable[str], size: int = 8000) -> Any:
    """A tokenizer of `transformers` with a lower-case WordPiece vocabulary trained on these texts, as BERT's is.

    Source: Wu 2016, arXiv 1609.08144; Devlin 2019, arXiv 1810.04805.
    """
    from tokenizers import BertWordPieceTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(texts, vocab_size=size, show_progress=False)
    ends = {token: trained.token_to_id(token) for token in ("[CLS]", "[SEP]")}
    trained.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=list(ends.items())
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=trained._tokenizer, **{f"{part}_token": token for part, token in names.items()}
    )


def _rows(name: str, files: dict[str, list[Path]] | None, part: str) -> tuple[list[str], Tensor]:
    """The sentences and labels of one part."""
    from secateur.data.decoding import hub_parts, load_parts

    with tempfile.TemporaryDirectory() as scratch:
        if files is None:
            found = hub_parts(name, "stanfordnlp/sst2")["validation" if part == "test" else part]
        else:
            paths = [str(path) for path in files[part]]
            found = load_parts(name, "parquet", data_files=paths, cache_dir=scratch)["train"]
        missing = [column for column in ("sentence", "label") if column not in found.features]
        if missing:
            raise DataError(f"{name}: the {part} part has no column {missing[0]!r}.")
        return [str(text) for text in found["sentence"]], torch.tensor(list(found["label"]), dtype=torch.int64)
