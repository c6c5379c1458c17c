"""What the words of the report mean: one definition each, and only those in use."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.report.records import Record

TARGETS = {
    "channels": "The fraction of removable channels taken out of every layer, or of all layers together where the "
    "scope is global; per layer rounded down. Layers tied together, such as the two sides of a residual addition, "
    "lose the same channels.",
    "weights": "The fraction of the weights set to zero; as recounted in the evaluated model under weights left.",
    "macs": "The fraction of the dense model's MACs that had to go; met within one channel, never exceeded.",
    "params": "The fraction of the dense model's parameters that had to go; met within one channel, never exceeded.",
}


def words_for(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(word, meaning) of what these records use."""
    targets = {r.target for r in records if r.prunes != "nothing"}
    pruned = {r.prunes for r in records}
    found = [(f"Removed: {target} (sparsity)", text) for target, text in TARGETS.items() if target in targets]
    found.append(
        (
            "Dense, pruned, fine-tuned",
            "The trained model; the same model straight after pruning; and that one after some more training.",
        )
    )
    if any(r.accuracy_repaired is not None for r in records):
        found.append(
            (
                "Repaired",
                "After repair without gradients, before any fine-tuning: least squares on the outputs of layers, and "
                "new statistics for BatchNorm.",
            )
        )
    found += [
        (
            "Accuracy",
            "The share of the test set that is classified rightly. The test set is only reported on: settings are "
            "chosen on validation data where there are some. Accuracy on training data stands beside it to show "
            "overfitting.",
        ),
        (
            "MACs",
            "Multiply-accumulate operations of convolutions, matrix products and linear layers for one input, in the "
            "model as it is stored. Zeros count like any other number. A count, not a time.",
        ),
        ("Params", "All parameters of the model, biases and normalisation included."),
        (
            "Latency and speed-up",
            "Median wall-clock time of one batch on the machine named above. Dense and pruned model take turns, and "
            "the speed-up is the median of the ratios of neighbouring runs, so that a busy moment hits both.",
        ),
        (
            "Pareto front",
            "The settings for which no other costs less and has a higher mean accuracy. Costs are MACs, parameters "
            "that are not zero, or measured latency.",
        ),
        (
            "Difference of two methods",
            "The mean difference in fine-tuned test accuracy over pairs of trials with the same model, data, sparsity, "
            "target and seed, averaged within each seed. Its 95 % interval is over seeds (Student's t).",
        ),
    ]
    if "weights" in pruned:
        found.append(
            (
                "Masked",
                "Weights are set to zero and held there. Nothing gets smaller or faster: no speed-up. Weights left, "
                "and parameters that are not zero, are recounted in the model that was evaluated.",
            )
        )
    if any(r.epochs is not None for r in records):
        found.append(
            ("Epochs", "Passes over the training data after the dense model was trained, between and after prunings.")
        )
    found += _controls(records)
    if any(r.verified_difference is not None for r in records):
        found.append(
            (
                "Verified difference",
                "The largest difference between the output of the smaller model and that of the original with the same "
                "channels set to zero, relative to the largest output. It is checked for every trial; rounding alone "
                "explains values around 1e-15 in double precision.",
            )
        )
    return found


def _controls(records: Sequence[Record]) -> list[tuple[str, str]]:
    said = []
    if any(r.criterion == "random" for r in records):
        said.append("random removes or masks at random, with everything else the same")
    if any(r.control and r.prunes != "nothing" and r.criterion != "random" for r in records):
        said.append("magnitude removes what has the smallest weights")
    if any(r.unpruned for r in records):
        said.append("unpruned is the dense model, fine-tuned as long as the others")
    if any(r.prunes == "nothing" and not r.unpruned for r in records):
        said.append("smaller is a narrower dense network of the same cost, trained from scratch as long")
    return [("Controls", "What a method has to beat: " + "; ".join(said) + ".")] if said else []
