"""Prune weights while `transformers.Trainer` fine-tunes: sparsity rises along a cubic schedule, and zeros stay zeros.

    python examples/in_the_trainer.py

A tiny BERT learns whether a sentence of made-up words begins with a low one. The callback takes any training
hook: masks that were made before (`masks.hook()`), a schedule (`Gradual`), a penalty (`GroupPenalty`).
"""

from __future__ import annotations

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import secateur as sc
from secateur.integrations.transformers import PruningCallback

WORDS, LENGTH, EPOCHS, BATCH = 40, 12, 6, 32


def sentences(number: int, seed: int) -> list[dict[str, object]]:
    """Token ids and labels."""
    ids = torch.randint(1, WORDS, (number, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": int(row[0] < WORDS // 2)} for row in ids]


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model, train, test = BertForSequenceClassification(config), sentences(640, 0), sentences(320, 1)
    steps = EPOCHS * len(train) // BATCH
    gradual = sc.Gradual("magnitude", 0.8, end=steps * 2 // 3, every=5, schedule="cubic", within="bert.encoder*")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-3,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=train, callbacks=[PruningCallback(gradual)])
        trainer.train()
        right = trainer.predict(test).predictions.argmax(1) == [row["labels"] for row in test]
    assert gradual.masks is not None
    zero = sum(int((dict(model.named_parameters())[name] == 0).sum()) for name in gradual.masks.keep)
    total = sum(keep.numel() for keep in gradual.masks.keep.values())
    print(f"{zero / total:.1%} of the encoder's weights are zero, accuracy {right.mean():.1%}")


if __name__ == "__main__":
    main()
