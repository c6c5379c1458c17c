"""The tables of the side-by-side benchmark in Markdown, from the rows that `coupling.py` wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from tables import number_table

Row = Mapping[str, Any]
OURS, OPEN, PEER = "secateur", "secateur_open", "torch_pruning"
TITLES = {OURS: "Secateur", OPEN: "Secateur, prune_residual", PEER: "Torch-Pruning"}
OUTCOMES = ("correct", "wrong", "nothing removed", "undecided", "error", "timeout", "out of memory", "crashed")
POINTS = 0.05  # how far our parameter ratio may lie above the peer's
SHARE = 0.95  # of what the graph form removes, to be removed by the live form too
SLOW_SECONDS = 3.0
LONG_REASON = 160


def headline_lines(results: Mapping[str, Any]) -> list[str]:
    """Counts of outcomes, times and sizes side by side, first for the architectures, then for the single patterns."""
    live = [row for row in results["rows"] if row["form"] == "live"]
    parts = {
        "architectures": [row for row in live if not row["model"].startswith("pattern:")],
        "one-pattern networks": [row for row in live if row["model"].startswith("pattern:")],
    }
    lines = []
    for title, rows in parts.items():
        if rows:
            lines += [*_outcome_table(f"{len(rows)} {title}", rows), "", *_comparisons(rows, results["rows"]), ""]
    return lines


def full_tables(results: Mapping[str, Any]) -> str:
    """Everything: the headline, one line per model, what went wrong, and what Secateur locked and why."""
    rows = results["rows"]
    live = [row for row in rows if row["form"] == "live"]
    return "\n".join(
        [
            "# Side by side: Secateur and Torch-Pruning on every architecture of the zoo",
            "",
            "Written by `python benchmarks/coupling.py`; do not edit.",
            "",
            protocol_line(results),
            "",
            *headline_lines(results),
            "## Per model",
            "",
            "Parameters and MACs: what is left. Seconds: analysis and shrinking / the whole call.",
            "",
            *number_table(
                ["model", *(cell for name in TITLES.values() for cell in (name, "params", "MACs", "seconds"))],
                [[row["model"], *(cell for library in TITLES for cell in _cells(row, library))] for row in live],
            ),
            "",
            *_section("Not correct", ["model", "library", "outcome", "reason"], _failures(rows)),
            *_section("What Secateur locked, and why", ["model", "groups locked", "reasons"], _locks(rows)),
            *_section("Graph form against live form", ["model", "live", "graph", "share"], _share_rows(rows)),
        ]
    )


def line_of(row: Row) -> str:
    """One architecture in one line, for the terminal."""
    parts = [f"{TITLES[library]}: {' '.join(_cells(row, library))}" for library in TITLES if library in row]
    reasons = [f"\n    {TITLES[name]}: {row[name]['reason']}" for name in TITLES if row.get(name, {}).get("reason")]
    return f"{row['model']} ({row['form']})  " + " | ".join(parts) + "".join(reasons)


def protocol_line(results: Mapping[str, Any]) -> str:
    """How and where it was measured."""
    protocol, machine = results["protocol"], results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in protocol["versions"].items())
    return (
        f"{protocol['sparsity']:.0%} of the channels by their {protocol['criterion']} norm, layer by layer; random "
        f"weights; one process per architecture, at most {protocol['limit_seconds']:.0f} s per library and "
        f"{protocol['limit_gb']:.0f} GB; medians of up to {protocol['repeats']} runs, one thread, on {machine['cpu']}; "
        f"{versions}. Correct: equal in float64 within 1e-6 to the original with everything zeroed that is not found, "
        "by value, in the pruned model, at two batch sizes, and not vacuous."
    )


# -- headline --------------------------------------------------------------------------------------------------------


def _outcome_table(title: str, rows: Sequence[Row]) -> list[str]:
    asked = [library for library in TITLES if any(library in row for row in rows)]
    counts: dict[str, Callable[[Row], bool]] = {"forward pass runs": lambda found: found["ran"]}
    counts |= {outcome: lambda found, outcome=outcome: found["status"] == outcome for outcome in OUTCOMES}
    lines = [
        [name, *(str(sum(test(row[library]) for row in rows if library in row)) for library in asked)]
        for name, test in counts.items()
    ]
    return number_table(
        [title, *(TITLES[library] for library in asked)], [line for line in lines if set(line[1:]) != {"0"}]
    )


def _comparisons(rows: Sequence[Row], all_rows: Sequence[Row]) -> list[str]:
    lines = [*_speed_lines(rows), *_size_lines(rows), *_share_lines(rows, all_rows)]
    return [f"- {line}" for line in lines]


def _speed_lines(rows: Sequence[Row]) -> list[str]:
    both = [row for row in rows if row.get(PEER, {}).get("ran") and "prune_seconds" in row.get(OURS, {})]
    timed = {row["model"]: row[OURS]["analysis_seconds"] for row in rows if "analysis_seconds" in row.get(OURS, {})}
    lines = []
    if both:
        for title, part in (
            ("analysis and shrinking", "analysis_seconds"),
            ("the whole verified call", "prune_seconds"),
        ):
            ratios = [row[OURS][part] / row[PEER][part] for row in both if part in row[OURS]]
            lines.append(
                f"Time of {title}, ours divided by the peer's, on the {len(ratios)} models that the peer completes: "
                f"median {median(ratios):.2f}, worst {max(ratios):.2f}."
            )
    if timed:
        worst = max(timed, key=lambda name: timed[name])
        slow = sum(seconds > SLOW_SECONDS for seconds in timed.values())
        lines.append(
            f"Our analysis and shrinking: median {median(timed.values()):.2f} s, worst {timed[worst]:.2f} s ({worst}); "
            f"{slow} of {len(timed)} over {SLOW_SECONDS:g} s."
        )
    return lines


def _size_lines(rows: Sequence[Row]) -> list[str]:
    """Parameters left where the peer is correct. The peer cuts widths under norms: then so do we."""
    right = [row for row in rows if row.get(PEER, {}).get("status") == "correct"]
    pairs = [(row, OPEN if row[PEER].get("norms") == "live" else OURS) for row in right]
    pairs = [(row, ours) for row, ours in pairs if row.get(ours, {}).get("status") == "correct"]
    if not pairs:
        return []
    ours = [_left(row, mine, "params") for row, mine in pairs]
    peers = [_left(row, PEER, "params") for row, _ in pairs]
    enough = {row["model"] for (row, _), a, b in zip(pairs, ours, peers, strict=True) if a <= b + POINTS}
    behind = sorted({row["model"] for row in right} - enough)
    opened = sum(mine == OPEN for _, mine in pairs)
    return [
        f"Where the peer is correct ({len(right)} models): parameters left, median {median(ours):.1%} (ours) and "
        f"{median(peers):.1%} (the peer's); ours within {POINTS * 100:.0f} points or smaller on {len(enough)}"
        + (f"; not on {', '.join(behind)}." if behind else ".")
        + f" On {opened} of them the peer cut widths under norms, and is compared with prune_residual=True."
    ]


def _share_lines(rows: Sequence[Row], all_rows: Sequence[Row]) -> list[str]:
    names = {row["model"] for row in rows}
    shares = [share for name, _, _, share in _shares(all_rows) if name in names]
    if not shares:
        return []
    enough = sum(share >= SHARE for share in shares)
    return [
        f"The live form removes at least {SHARE:.0%} of the parameters that the graph form removes on {enough} of "
        f"{len(shares)} models."
    ]


# -- per model -------------------------------------------------------------------------------------------------------


def _cells(row: Row, library: str) -> list[str]:
    found = row.get(library)
    if found is None:
        return ["", "", "", ""]
    sizes = [f"{_left(row, library, part):.1%}" if part in found else "" for part in ("params", "macs")]
    seconds = [f"{found[part]:.2f}" for part in ("analysis_seconds", "prune_seconds") if part in found]
    return [found["status"], *sizes, " / ".join(seconds)]


def _left(row: Row, library: str, part: str) -> float:
    return row[library][part] / max(1, row["dense"][part])


def _failures(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [f"{row['model']} ({row['form']})", TITLES[name], row[name]["status"], _plain(row[name].get("reason", ""))]
        for row in rows
        for name in TITLES
        if name in row and row[name]["status"] != "correct"
    ]


def _locks(rows: Sequence[Row]) -> list[list[str]]:
    found = []
    for row in rows:
        locked = row.get(OURS, {}).get("locked", {})
        if row["form"] == "live" and locked:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in locked.items())
            found.append([row["model"], str(sum(locked.values())), _plain(reasons)])
    return found


def _shares(rows: Sequence[Row]) -> list[tuple[str, float, float, float]]:
    """(model, parameters left live, left as a graph, removed live / removed as a graph)."""
    left: dict[tuple[str, str], float] = {
        (row["model"], row["form"]): _left(row, OURS, "params")
        for row in rows
        if row.get(OURS, {}).get("status") == "correct"
    }
    return [
        (name, left[name, "live"], graph, (1 - left[name, "live"]) / (1 - graph))
        for (name, form), graph in left.items()
        if form == "graph" and (name, "live") in left and graph < 1
    ]


def _share_rows(rows: Sequence[Row]) -> list[list[str]]:
    return [[name, f"{live:.1%}", f"{graph:.1%}", f"{share:.1%}"] for name, live, graph, share in _shares(rows)]


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"## {title}", "", *number_table(head, rows), ""] if rows else []


def _plain(text: str) -> str:
    """Text that fits in a cell."""
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= LONG_REASON else text[: LONG_REASON - 1] + "…"
