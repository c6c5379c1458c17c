"""Write docs/studies/README.md: what the studies kept there compared, and where their reports are.

    python benchmarks/study_index.py [--studies FOLDER]

It reads `report.md` and `rows.csv` of every folder in there, as `make studies` and `make sst2` leave them.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from tables import table

HERE = Path(__file__).resolve().parent
INTRODUCTION = """\
# Studies that were run

The protocols of the source documents at the scale of a CPU ([the files](../../studies)), and what came out. Each folder
has the report as one HTML file that opens from disk, the same as Markdown, and a row per trial. This page
is written by `python benchmarks/study_index.py` from those files; `make studies` and `make sst2` run everything again.
Accuracies are on test data, means over seeds; the setting of each headline was chosen on validation data.
"""
CHAPTER = re.compile(
    r"^## (?P<title>.+)\n\n(?P<trials>[\d,]+ trials?, \d+ seeds?)\. \*\*(?P<headline>.+)\.\*\*\n\n"
    r"The setting shown is (?P<setting>.+?)\. It was chosen",
    re.MULTILINE,
)


def render(folder: Path) -> str:
    """The whole page."""
    places = sorted(file.parent for file in folder.glob("*/report.md"))
    return "\n".join([INTRODUCTION, *(line for place in places for line in _study(place))])


def _study(place: Path) -> Iterator[str]:
    text = (place / "report.md").read_text(encoding="utf-8")
    with (place / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["error"]]
    yield f"#{text.splitlines()[0]}"
    yield ""
    links = ", ".join(f"[{name}]({place.name}/{name})" for name in ("report.html", "report.md", "rows.csv"))
    yield f"{links}: {len(rows)} trials."
    yield ""
    found = [
        [one["title"], f"{_dense(rows, one['title']):.1%}", one["trials"], f"{one['headline']} ({one['setting']})"]
        for one in CHAPTER.finditer(text)
    ]
    yield from table(["network", "dense", "rows", "found"], found)
    yield ""


def _dense(rows: Sequence[Mapping[str, str]], title: str) -> float:
    return fmean(float(row["accuracy_dense"]) for row in rows if f"{row['model']} on {row['data']}" == title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, default=HERE.parent / "docs" / "studies", help="folder of reports")
    folder = parser.parse_args().studies
    (folder / "README.md").write_text(render(folder), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
