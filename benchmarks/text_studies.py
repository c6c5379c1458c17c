"""The studies of text classifiers, at the scale of a CPU: weights by two recipes, and heads and hidden units.

    make runs/minilm                            the network, into runs/minilm
    python benchmarks/text_studies.py           runs what is missing, and writes docs/studies/sst2_*
    python benchmarks/text_studies.py study status studies/sst2_weights.toml --profile cpu

It is the command `secateur`, where transformers imports a torchvision whose operators do not load (see zoo.py).
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

import study_index
from zoo import load_torchvision

load_torchvision()  # in worker processes, too, which import this file

STUDIES = ("sst2_weights", "sst2_weights_sgd", "sst2_structured")
HERE = Path(__file__).parent.parent


def main() -> None:
    from secateur.cli import app

    if sys.argv[1:]:
        app()
        return
    for name in STUDIES:
        here, there = [str(HERE / "studies" / f"{name}.toml"), "--profile", "cpu"], HERE / "docs" / "studies" / name
        app(["study", "run", *here], standalone_mode=False)
        app(["study", "report", *here, "--out", str(there)], standalone_mode=False)
        with (there / "rows.csv").open("w", encoding="utf-8") as file, redirect_stdout(file):
            app(["study", "rows", *here], standalone_mode=False)
    study_index.main()


if __name__ == "__main__":
    main()
