"""The command `secateur`, where transformers imports a torchvision whose operators do not load (see zoo.py).

make runs/minilm        the network of the text studies, into runs/minilm
make sst2               runs what is missing of them, and writes docs/studies/sst2_*
python benchmarks/text_studies.py study status studies/sst2_weights.toml --profile cpu
"""

from __future__ import annotations

from zoo import load_torchvision

load_torchvision()  # in worker processes, too, which import this file


def main() -> None:
    from secateur.cli import app

    app()


if __name__ == "__main__":
    main()
