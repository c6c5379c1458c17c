"""Text: batches of similar length, windows, perplexity against its definition, classifiers and their tokenizers."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pretrained_for_tests import library
from secateur.artifacts import save
from secateur.data.text import BUCKET, Sentences, TextBatches, sst2, text_windows, tokenised, wordpiece
from secateur.errors import DataError, ExampleInputsError, InputError
from secateur.language import check_tokenizer, perplexity, text_classifier
from secateur.layerwise import prune_layerwise, prune_layerwise_
from secateur.masking import make_masks
from secateur.plans import named_tensors
from secateur.pruning import prune
from secateur.repairing import repair
from test_layerwise import language_model

CORPUS = ["a fine film", "a dull film", "truly fine acting", "dull dull dull", "not a fine plot", "fine"]


def sentences(number: int = 500) -> Sentences:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (number,), generator=generator)
    tokens = torch.randint(3, 90, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    labels = torch.randint(2, (number,), generator=generator)
    return Sentences(
        tokens, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), labels, ("a", "b"), 0, "t"
    )


def rows_of(batches: TextBatches) -> list[tuple[int, ...]]:
    found = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            found.append(tuple(ids[mask.bool()].tolist()))
    return found


def test_batches_hold_every_sentence_once_and_little_padding() -> None:
    data = sentences()
    whole = [tuple(data.tokens[a:b].tolist()) for a, b in zip(data.starts, data.starts[1:], strict=False)]
    batches = TextBatches(data, 16)
    assert sorted(rows_of(batches)) == sorted(whole) and rows_of(batches) != whole
    assert rows_of(TextBatches(data, 16, shuffle=False)) == whole
    padding = [int((batch["attention_mask"] == 0).sum()) for batch in batches]
    plain = [int((batch["attention_mask"] == 0).sum()) for batch in TextBatches(data, 16, shuffle=False)]
    assert sum(padding) < 0.2 * sum(plain) and len(data) < BUCKET * 16
    assert len(batches) == len(list(batches)) == math.ceil(500 / 16)


def test_the_order_follows_from_seed_and_epoch() -> None:
    data = sentences(100)
    batches = TextBatches(data, 8, seed=3)
    first = rows_of(batches)
    assert rows_of(batches) == first
    batches.set_epoch(1)
    assert rows_of(batches) != first and sorted(rows_of(batches)) == sorted(first)
    assert rows_of(TextBatches(data, 8, seed=4)) != first


def test_a_subset_holds_the_same_sentences() -> None:
    data = sentences(20)
    part = data.subset(torch.tensor([7, 2]))
    batch, whole = part.batch(torch.tensor([0])), data.batch(torch.tensor([7]))
    assert all(torch.equal(batch[name], whole[name]) for name in whole)
    with pytest.raises(DataError, match="no sentence"):
        data.subset(torch.tensor([], dtype=torch.int64))


def test_windows_cover_the_text_or_are_drawn_by_seed() -> None:
    tokens = torch.arange(103)
    windows = torch.cat(text_windows(tokens, 10, batch_size=4))
    assert torch.equal(windows.flatten(), tokens[:100])
    drawn = [torch.cat(text_windows(tokens, 10, count=5, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0].diff(dim=1), torch.ones(5, 9, dtype=torch.int64))
    with pytest.raises(DataError, match="fewer than one window"):
        text_windows(tokens[:9], 10)


class Bigrams(nn.Module):
    """A language model that looks at one token, and at how many came before it in the window."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens: Tensor) -> Any:
        places = torch.arange(tokens.shape[1])[None, :, None]
        return SimpleNamespace(logits=self.table[tokens] / (1 + places))


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 3), (8, 1), (50, 50), (50, 20)])
def test_perplexity_predicts_every_token_once_with_the_context_that_its_windows_leave(length: int, stride: int) -> None:
    model, tokens = Bigrams(), torch.randint(7, (50,), generator=torch.Generator().manual_seed(1))
    expected, predicted = 0.0, set()
    for start in range(0, 50, stride):
        window = tokens[start : start + length]
        log = model(window[None]).logits[0].log_softmax(-1).detach()
        for place in range(1, len(window)):
            if start + place not in predicted:
                predicted.add(start + place)
                expected -= float(log[place - 1, window[place]])
    found = perplexity(model, tokens, length=length, stride=stride)
    assert found.tokens == len(predicted) == (49 if stride < length else 50 - math.ceil(50 / length))
    assert found.loss == pytest.approx(expected / len(predicted), rel=1e-5)
    assert found.value == pytest.approx(math.exp(found.loss)) and (found.length, found.stride) == (length, stride)


def test_perplexity_refuses_what_it_cannot_measure() -> None:
    model = Bigrams()
    for options in ({"length": 1}, {"length": 4, "stride": 5}, {"length": 4, "stride": 0}):
        with pytest.raises(InputError, match="stride in"):
            perplexity(model, torch.arange(6), **options)
    with pytest.raises(DataError, match="fewer than one window"):
        perplexity(model, torch.arange(3), length=4)
    with pytest.raises(InputError, match="one sequence"):
        perplexity(model, torch.zeros(2, 8), length=4)


def classifier_folder(path: Path, size: int = 64, positions: int = 32) -> Path:
    t = library()
    tokenizer = wordpiece(CORPUS, 60)
    config = t.BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=positions,
    )  # fmt: skip
    t.BertForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_classifier_and_its_tokenizer_come_from_a_folder(tmp_path: Path) -> None:
    model, tokenizer = text_classifier(classifier_folder(tmp_path), ("bad", "good"), max_length=16)
    data = tokenised(CORPUS, torch.tensor([1, 0, 1, 0, 0, 1]), ("bad", "good"), tokenizer, max_length=16, name="c")
    output = model(**next(iter(TextBatches(data, 6))))
    assert output.logits.shape == (6, 2) and torch.isfinite(output.loss)
    assert model.config.id2label == {0: "bad", 1: "good"}


def test_other_classes_get_a_new_head_and_nothing_is_said_about_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = classifier_folder(tmp_path)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = text_classifier(folder, ("a", "b", "c"), max_length=16)
    assert model.get_parameter("classifier.weight").shape == (3, 16)
    assert capfd.readouterr() == ("", "")


def test_an_encoder_that_lacks_weights_is_named_and_one_of_other_shapes_is_refused(tmp_path: Path) -> None:
    folder = classifier_folder(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if "pooler" not in name}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"lack 2 tensors of the encoder, such as bert\.pooler"):
        text_classifier(folder, ("bad", "good"), max_length=16)
    save_file({**tensors, "bert.pooler.dense.bias": torch.zeros(5)}, file, {"format": "pt"})
    with pytest.raises(
        InputError, match=r"1 tensor of the encoder, such as bert\.pooler\.dense\.bias, of another shape"
    ):
        text_classifier(folder, ("bad", "good"), max_length=16)


def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    t = library()
    with pytest.raises(InputError, match="do not belong together"):
        text_classifier(classifier_folder(tmp_path / "small", size=12), ("bad", "good"), max_length=16)
    folder = classifier_folder(tmp_path / "short", positions=8)
    with pytest.raises(InputError, match="max_length=16 exceeds the model's 8 positions"):
        text_classifier(folder, ("bad", "good"), max_length=16)
    decoder = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    decoder.save_pretrained(tmp_path / "decoder")
    with pytest.raises(InputError, match="decoder-only"):
        text_classifier(tmp_path / "decoder", ("bad", "good"))
    with pytest.raises(InputError, match="no text classifier"):
        text_classifier(tmp_path, ("bad", "good"))
    with pytest.raises(InputError, match="no padding token"):
        tokenised(["a"], torch.tensor([0]), ("x",), SimpleNamespace(pad_token_id=None), max_length=4, name="t")
    check_tokenizer(decoder, wordpiece(CORPUS, 50), 16)


LONG, FOREIGN = torch.zeros(2, 33, dtype=torch.long), torch.full((2, 8), 40)
SHORT = torch.arange(16).reshape(2, 8)
LONG_SAID, FOREIGN_SAID = "33 tokens are longer than the model's 32 positions", "token id 40 is none of the 40 that"


@pytest.mark.parametrize(("batch", "said"), [(LONG, LONG_SAID), (FOREIGN, FOREIGN_SAID), (FOREIGN - 41, "token id -1")])
@pytest.mark.parametrize("form", ["tensor", "mapping"])
def test_tokens_that_the_model_cannot_look_up_are_named(batch: Tensor, said: str, form: str) -> None:
    model: Any = language_model("gpt2")
    wrong, right = ({"input_ids": t} if form == "mapping" else t for t in (batch, SHORT))
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    with pytest.raises(InputError, match=said):
        prune_layerwise_(model, [right, wrong], "wanda", sparsity=0.5, progress=False)
    with pytest.raises(InputError, match=said):
        prune_layerwise_(model, iter([wrong]), "wanda", sparsity=0.5, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in named_tensors(model).items())
    with pytest.raises(InputError, match=said):
        make_masks(model, "wanda", 0.5, data=[wrong])
    with pytest.raises(ExampleInputsError, match=f"the example inputs do not fit the model: .*{said}"):
        prune(model, wrong, sparsity=0.5)
    with pytest.raises(InputError, match=said):
        prune(model, right, sparsity=0.5, criterion="activation_mean", data=[wrong])
    small = prune(model, right, sparsity=0.5)
    with pytest.raises(InputError, match=said):
        repair(small.model, [wrong], dense=model, plan=small.plan)


def test_no_block_runs_before_the_last_batch_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = language_model("llama")  # its positions are computed: nothing would fail
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("the model was run"))
    for batch, said in ((LONG, LONG_SAID), (FOREIGN, FOREIGN_SAID)):
        with pytest.raises(InputError, match=said):
            prune_layerwise(model, [SHORT, batch], "wanda", sparsity=0.5)
    with pytest.raises(InputError, match="length=33 exceeds the model's 32 positions: pass length=32 or less"):
        perplexity(model, torch.zeros(40, dtype=torch.long), length=33)
    with pytest.raises(InputError, match=FOREIGN_SAID):
        perplexity(model, torch.arange(41), length=32)
    with pytest.raises(DataError, match="20 tokens, fewer than one window of 32"):
        perplexity(model, torch.arange(20), length=32)


def test_a_position_table_with_rows_for_padding_holds_fewer_tokens() -> None:
    t = library()
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = t.RobertaConfig(**shape, vocab_size=60, max_position_embeddings=18, pad_token_id=1)
    model = t.RobertaForSequenceClassification(config).eval()
    with pytest.raises(InputError, match="max_length=17 exceeds the model's 16 positions"):
        check_tokenizer(model, wordpiece(CORPUS, 50), 17)
    check_tokenizer(model, wordpiece(CORPUS, 50), 16)
    model(torch.full((1, 16), 5))
    with pytest.raises(ExampleInputsError, match="17 tokens are longer than the model's 16 positions"):
        prune(model, torch.full((1, 17), 5), sparsity=0.5)


def test_perplexity_needs_logits_for_every_token(tmp_path: Path) -> None:
    model, _ = text_classifier(classifier_folder(tmp_path), ("bad", "good"), max_length=16)
    with pytest.raises(InputError, match=r"gives logits \[1, 2\] for 8 tokens, .*pass a causal language model"):
        perplexity(model, torch.arange(16), length=8)


def test_a_tokenizer_of_another_model_is_not_saved_with_it(tmp_path: Path) -> None:
    model: Any = language_model("gpt2")
    with pytest.raises(InputError, match=r"tokenizer has \d+ tokens, the model embeds 40: they do not belong together"):
        save(model, tmp_path / "folder", tokenizer=wordpiece([*CORPUS, "quick brown vixens jump over hedges"], 60))
    assert not (tmp_path / "folder").exists()


@pytest.mark.skipif(
    not (Path(os.environ.get("SECATEUR_DATA", "/nowhere")) / "sst2").is_dir(), reason="needs sst2/ in SECATEUR_DATA"
)
def test_sst2_is_split_by_seed_and_its_dev_sentences_are_the_test_part() -> None:
    tokenizer = wordpiece(CORPUS, 60)
    first, second = (sst2(tokenizer, seed=seed, sentences=2000) for seed in (0, 1))
    assert (len(first.train), len(first.validation), len(first.test)) == (1900, 100, 872)
    assert torch.equal(first.test.tokens, second.test.tokens)
    assert not torch.equal(first.validation.tokens[:50], second.validation.tokens[:50])
    assert first.train.classes == ("negative", "positive") and int(first.test.labels.sum()) == 444
