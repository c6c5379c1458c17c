"""The report of a study: controls, masks, comparisons, published numbers, thousands of trials."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import permutations

import pytest

from secateur.errors import InputError
from secateur.report import (
    Failure,
    Pair,
    Reference,
    difference_markdown,
    difference_terminal,
    differences,
    duels,
    paired,
    read_records,
    summarise,
    write_figures,
    write_markdown,
    write_records,
    write_report,
)
from secateur.report import format as fmt
from secateur.report.beside import beside, beside_sentence
from secateur.report.charts import AXES, accuracy_over_cost, accuracy_over_sparsity, drop_over_sparsity
from secateur.report.findings import choose, find
from secateur.report.layers import layer_sparsities, layer_widths, sparsity_choices, width_choices, width_table
from secateur.report.looks import curves_of
from secateur.report.overview import families, family_of, panels
from secateur.report.palette import DARK, GREYS, HUES
from secateur.report.records import LayerWeights, LayerWidth, Timing, studies
from secateur.report.statistics import pareto_front
from secateur.report.tables import TRIAL_COLUMNS, setting_table, shown_columns, trial_table
from secateur.report.thinning import thinned
from secateur.report.timings import timing_table
from secateur.report.words import words_for
from test_report import BROWSER, _Page, opened, record

GAIN = {"l1": 0.0, "taylor": 0.004, "random": -0.02}


def cell(method, sparsity, seed, **changes):
    """One trial of a study, by a method of any kind."""
    kind = "nothing" if method in ("unpruned", "smaller") else "weights" if "weights" in method else "channels"
    tuned = 0.95 - sparsity / 20 + GAIN.get(method, 0.0) + 0.001 * seed
    values = {
        "key": f"{changes.get('model', 'net')}-{changes.get('data', 'digits')}-{method}-{sparsity}-{seed}",
        "method": method,
        "prunes": kind,
        "target": "weights" if kind == "weights" else "channels",
        "control": method in ("unpruned", "smaller", "random"),
        "accuracy_finetuned": tuned,
        "epochs": 3,
        "weights_left": 1 - sparsity,
        "train_finetuned": 0.99,
        "layers": (LayerWeights("conv1.weight", 90, round(90 * (1 - sparsity))),),
    }
    if kind == "weights" or method == "unpruned":
        same = {"params": Pair(1000, 1000), "macs": Pair(100_000, 100_000), "latency_ms": Pair(1.0, 1.0)}
        values |= {**same, "speedup": 1.0, "verified_difference": None, "widths": ()}
    return record(method.split(",")[0], sparsity, seed, **{**values, **changes})


def grid(methods=("l1", "taylor", "random", "smaller"), sparsities=(0.2, 0.5), seeds=3, **changes):
    """A study of one model, with the control that has no sparsity."""
    found = [cell(m, s, k, **changes) for k in range(seeds) for m in methods for s in sparsities]
    return [*found, *(cell("unpruned", 0.0, k, **changes) for k in range(seeds))]


def whole_study():
    """Two families, two data sets, channels and weights."""
    methods = ("l1", "taylor", "random", "magnitude, weights", "smaller")
    models = {"resnet20": 0.0, "resnet56": 0.01, "vgg16": 0.02}
    return [
        replace(r, accuracy_dense=r.accuracy_dense + up)
        for model, up in models.items()
        for data in ("cifar10", "cifar100")
        for r in grid(methods, model=model, data=data)
    ]


# --- controls and masks


def test_a_control_is_never_the_headline():
    records = grid()
    assert choose(summarise(records)).method in ("l1", "taylor")
    better = [replace(r, validation_finetuned=0.99, macs=Pair(100_000, 10)) if r.control else r for r in records]
    assert choose(summarise(better)).method in ("l1", "taylor")
    assert choose(summarise([r for r in records if r.method == "smaller"])).method == "smaller"  # nothing else there


def test_the_control_without_a_sparsity_is_a_level_and_no_curve():
    records = grid()
    summaries = summarise(records)
    assert "unpruned" not in {curve.name for curve in curves_of(summaries)}
    for chart, height in ((accuracy_over_sparsity, 0.951), (drop_over_sparsity, -1.9)):
        level = next(trace for trace in chart(records, summaries).data if trace.name == "unpruned")
        assert list(level.y) == pytest.approx([height, height])
        assert level.line.dash == "longdash"
    point = next(t for t in accuracy_over_cost(records, summaries, AXES["MACs"]).data if t.name == "unpruned")
    assert list(point.x) == [100_000]


def test_controls_are_grey_and_what_was_never_trained_is_not_drawn():
    records = grid()
    looks = {curve.name: curve for curve in curves_of(summarise(records))}
    assert looks["smaller"].colour in GREYS and looks["smaller"].symbol.endswith("-open")
    assert looks["l1"].colour in HUES
    assert all(curve.colour in DARK for curve in looks.values())
    names = {trace.name for trace in accuracy_over_sparsity(records, summarise(records)).data}
    assert "l1, pruned" in names and "smaller, pruned" not in names
    column = next(c for c in shown_columns(summarise(records)) if c.head == "pruned")
    assert [column.cell(s) == "-" for s in summarise(records)] == [s.prunes == "nothing" for s in summarise(records)]


def test_masked_models_save_parameters_that_are_not_zero_and_nothing_else():
    records = grid(("magnitude, weights", "l1"))
    summaries = summarise(records)
    masked = [s for s in summaries if s.prunes == "weights"]
    assert [s.params_left for s in masked] == pytest.approx([800, 500])
    assert [AXES["MACs"].cost(s) for s in masked] == [100_000, 100_000]
    assert [AXES["latency"].cost(s) for s in masked] == [1.0, 1.0]
    assert AXES["params"].cost(masked[1]) == pytest.approx(500)
    assert any("masked: no speed-up" in warning for warning in find(records, summaries).warnings)
    assert not any("masked" in w for w in find(grid(), summarise(grid())).warnings)


def test_the_headline_of_a_masked_model_counts_weights():
    records = grid(("magnitude, weights",), accuracy_dense=0.95)
    found = find(records, summarise(records))
    assert "fewer weights" in found.headline and "multiply" not in found.headline
    assert any("latency are those of the dense model" in fact for fact in found.facts)
    assert "masked: no speed-up" in {tile.detail for tile in found.tiles}


@pytest.mark.parametrize("axis", AXES)
def test_every_cost_has_its_front(axis):
    summaries = summarise(grid(("l1", "magnitude, weights", "random")))
    cost = AXES[axis].cost
    for member in pareto_front(summaries, cost):
        better = [s for s in summaries if cost(s) < cost(member)]
        assert all(s.accuracy_finetuned.mean < member.accuracy_finetuned.mean for s in better)


# --- warnings


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (grid(("l1",)), "never removed at random"),
        ([*grid(("l1", "random")), *(cell("taylor", 0.2, k, epochs=9) for k in range(3))], "9 epochs for taylor"),
        (grid(("magnitude, weights",), weights_left=0.7), "off what was asked in 6 of 6 trials, at worst 20 points"),
        (
            grid(("magnitude, weights",), layers=(LayerWeights("head", 2000, 2), LayerWeights("body", 2000, 999))),
            "In 6 trials a layer lost all of its weights or nearly, and nothing gets through it any more: head keeps",
        ),
    ],
)
def test_unfair_studies_are_called_that(records, words):
    assert any(words in warning for warning in find(records, summarise(records)).warnings)


def test_a_fair_study_has_no_warnings():
    records = [replace(r, fingerprint={"torch": "2", "data": {"test": 9000, "sha": r.seed}}) for r in grid()]
    assert find(records, summarise(records)).warnings == ()  # data split by the seed differ between seeds, and may
    changed = [*records[:-1], replace(records[-1], fingerprint={"torch": "2", "data": {"test": 9000, "sha": 77}})]
    assert any("differ in data" in warning for warning in find(changed, summarise(changed)).warnings)


# --- method against method


def test_a_paired_difference_does_not_see_what_both_share():
    records = grid(("l1", "taylor"), seeds=3)
    noisy = [replace(r, accuracy_finetuned=r.accuracy_finetuned - 0.1 * r.seed) for r in records]
    for found in (records, noisy):
        gain = paired(found, "taylor", "l1")
        assert gain is not None and gain.seeds == 3
        assert (gain.mean, gain.least, gain.most) == pytest.approx((0.004, 0.004, 0.004))
    assert paired(records, "l1", "nobody") is None
    assert paired(records, "taylor", "l1").mean == pytest.approx(-paired(records, "l1", "taylor").mean)


def test_an_interval_is_over_seeds_and_not_over_settings():
    # One seed, many settings: nothing is known about the spread over seeds.
    records = grid(("l1", "taylor"), tuple(k / 20 for k in range(1, 20)), seeds=1)
    (duel, _) = duels(records)
    assert duel.pairs == 19 and duel.gain.seeds == 1 and not duel.clear


def test_clear_of_chance_needs_an_interval_without_zero():
    steady, torn = grid(("l1", "taylor")), grid(("l1", "taylor"))
    torn = [replace(r, accuracy_finetuned=0.9 + (0.01 * (-1) ** r.seed if r.method == "l1" else 0)) for r in torn]
    assert all(duel.clear for duel in duels(steady))
    assert not any(duel.clear for duel in duels(torn))


def test_only_what_aims_at_the_same_is_paired():
    records = grid(("l1", "magnitude, weights", "smaller"))
    assert paired(records, "l1", "magnitude, weights") is None  # channels against weights: not the same sparsity
    assert paired(records, "l1", "smaller") is not None
    assert paired(records, "magnitude, weights", "smaller") is not None


def test_half_of_one_layer_is_not_compared_with_half_of_all() -> None:
    everywhere, elsewhere = ([cell(f"{m}, weights", 0.5, k) for k in range(3)] for m in ("wanda", "magnitude"))
    one_layer = [cell("wanda, last layer, weights", 0.5, k, weights_left=0.97) for k in range(3)]
    records = [*everywhere, *elsewhere, *one_layer]
    assert {(d.first, d.second) for d in duels(records)} == set(permutations(("wanda, weights", "magnitude, weights")))
    assert any(
        "only compared where as many weights are left" in text for text in find(records, summarise(records)).warnings
    )


def test_methods_with_several_scopes_are_paired_scope_by_scope():
    shift = {"layer": 0.0, "global": 0.01}
    records = [
        record(c, 0.4, s, scope=scope, accuracy_finetuned=0.9 + up + (0.002 if c == "l1" else 0))
        for c in ("l1", "random")
        for scope, up in shift.items()
        for s in range(3)
    ]
    assert paired(records, "l1", "random").most == pytest.approx(0.002)


def test_two_studies_are_compared_setting_by_setting():
    left = grid(("l1", "taylor"), seeds=4)
    right = [replace(r, accuracy_finetuned=r.accuracy_finetuned + 0.01, key=r.key + "b") for r in left if r.seed]
    rows = differences(left, right)
    assert [(row.method, row.sparsity) for row in rows] == [
        *(("l1", s) for s in (0.2, 0.5)),
        *(("taylor", s) for s in (0.2, 0.5)),
        ("unpruned", 0.0),
    ]
    assert all(row.difference.mean == pytest.approx(0.01) and row.difference.seeds == 3 for row in rows)
    assert all(row.clear for row in rows)
    text = difference_markdown(rows)
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + len(rows)
    assert "+1.0 ± 0.0 *" in text and "5 of 5 settings" in text


def test_two_methods_are_compared_whatever_they_are_called():
    rows = differences([cell("l1", 0.2, k) for k in range(3)], [cell("taylor", 0.2, k) for k in range(3)])
    assert [row.method for row in rows] == ["taylor against l1"]
    assert rows[0].difference.mean == pytest.approx(0.004)
    with pytest.raises(InputError, match="no trial of one side"):
        differences(grid(("l1",), sparsities=(0.2,))[:3], grid(("l1",), model="other"))


def test_the_table_of_differences_survives_markup_and_a_narrow_terminal(capsys):
    from rich.console import Console

    rows = differences(grid(("[red]", "l1")), grid(("[red]", "l1")))
    Console(width=100).print(difference_terminal(rows, "now [not markup]"))
    out = capsys.readouterr().out
    assert "now [not markup]" in out and "[red]" in out and "…" not in out


# --- several models


def test_an_overview_has_a_table_per_sparsity_and_marks_the_best_method():
    results = {place: summarise(rows) for place, rows in studies(whole_study()).items()}
    found = panels(results)
    assert [panel.title for panel in found] == ["20 %", "50 %"]
    panel = found[1]
    assert len(panel.rows) == 6
    _, _, cells = panel.rows[0]
    by_method = dict(zip(panel.methods, cells, strict=True))
    expected = 0.95 - 0.5 / 20 + 0.004 + 0.001 - 0.97
    assert by_method["taylor"].text == fmt.signed_points(expected)
    assert [m for m, c in by_method.items() if c.best] == ["taylor"]  # unpruned is better, and a control
    assert panel.controls == {"random", "smaller", "unpruned"}


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("resnet20", "resnet"),
        ("ResNet-56", "ResNet"),
        ("vgg16_bn", "vgg"),
        ("mobilenet_v2", "mobilenet"),
        ("digits_net", "digits_net"),
        ("resnet20 (width 0.5)", "resnet"),
        ("8net", "8net"),
    ],
)
def test_families_are_what_stands_before_the_digits(model, family):
    assert family_of(model) == family


def test_family_averages_need_every_member():
    records = whole_study()
    lost = [r for r in records if (r.model, r.method, r.sparsity) != ("resnet56", "l1", 0.5)]
    found = families({place: summarise(rows) for place, rows in studies(lost).items()})
    assert [(f.name, f.data, list(f.models)) for f in found] == [
        ("resnet", "cifar10", ["resnet20", "resnet56"]),
        ("resnet", "cifar100", ["resnet20", "resnet56"]),
    ]  # one vgg is no family
    assert [p.sparsity for p in found[0].curves["l1"]] == [0.2]  # at 50 % one of the two is missing
    assert [p.sparsity for p in found[1].curves["taylor"]] == [0.2, 0.5]
    assert found[0].dense == pytest.approx(0.975)
    assert found[0].curves["smaller"][0].pruned is None


# --- layers


def test_layer_names_are_written_once_and_numbers_are_whole():
    summaries = summarise(grid(("l1", "magnitude, weights")))
    widths, sparsities = width_choices(summaries), sparsity_choices(summaries)
    assert json.dumps(widths).count("conv1") == 1
    assert [net["before"] for net in widths["nets"]] == [[10, 20], []]  # masks change no width
    assert widths["rows"][1] == [0, 5, 10]
    assert sparsities["rows"][1] == [0, 500]
    assert sparsities["nets"][0]["layers"] == ["conv1"]


@pytest.mark.parametrize(("name", "shown"), [("conv1", True), ("bert.encoder.layer.0.attention.self.query", False)])
def test_names_that_leave_bars_no_room_are_left_to_the_pointer(name, shown):
    found = summarise([record(widths=(LayerWidth(name, 10, 5),), layers=(LayerWeights(name, 90, 45),))])[0]
    for chart in (layer_widths(found), layer_sparsities(found)):
        assert (chart.layout.xaxis.showticklabels is not False) == shown
        assert ("point at one" in (chart.layout.xaxis.title.text or "")) != shown
        assert list(chart.data[0].x) == [name]


# --- tables


def test_columns_with_nothing_to_say_are_left_out():
    heads = {column.head for column in shown_columns(summarise([record(), record("random")]))}
    assert not heads & {"scope", "of", "epochs", "weights left", "training", "repaired"}
    heads = {column.head for column in shown_columns(summarise(grid(("l1", "magnitude, weights"))))}
    assert {"of", "weights left", "training"} <= heads and "epochs" not in heads
    mixed = summarise([*grid(), cell("fpgm", 0.2, 0, epochs=9)])
    assert "epochs" in {column.head for column in shown_columns(mixed)}


def test_packed_tables_hold_every_value():
    records = whole_study()
    table = trial_table(records)
    by_head = {column["head"]: column for column in table["columns"]}
    for column in TRIAL_COLUMNS:
        if column.head in by_head:
            packed = by_head[column.head]
            places = packed.get("values", range(len(records)))
            found = [packed["texts"][p] for p in places] if "texts" in packed else list(places)
            assert found == [column.value(r) for r in records]
    assert len(by_head["method"]["texts"]) == 6  # each text once
    summaries = summarise(grid())
    assert next(len(c["sorts"]) for c in setting_table(summaries, [])["columns"] if "sorts" in c) == len(summaries)


def test_thinning_leaves_no_hole():
    points = [(k % 1000 / 1000, k / 5000) for k in range(5000)]
    kept = thinned(points, keep=[17, 4999])
    assert {17, 4999} <= set(kept)
    assert len(kept) < 5000
    drawn = [points[k] for k in kept]
    for x, y in points[::50]:
        assert any(abs(a - x) <= 1 / 64 and abs(b - y) <= 1 / 40 for a, b in drawn)
    assert thinned(points[:100]) == list(range(100))
    assert thinned([(1.0, 1.0)] * 700) == [0]


# --- published numbers


REFERENCES = (
    Reference("net", "digits", "", 0.0, "dense", 0.98, "A. Author, 2020"),
    Reference("net", "digits", "l1", 0.2, "finetuned", 0.95, "A. Author, 2020", "their table 2"),
    Reference("net", "digits", "l1", 0.2, "pruned", 0.50, "A. Author, 2020"),
    Reference("net", "digits", "l1", 0.9, "finetuned", 0.50, "A. Author, 2020"),
)


def test_published_numbers_stand_beside_ours():
    rows = beside(grid(), REFERENCES)
    assert [row.ours and round(row.ours.mean, 4) for row in rows] == [0.97, 0.941, 0.77, None]
    assert rows[0].difference == pytest.approx(-0.01)
    assert rows[3].cells(["A. Author, 2020"])[-2:] == ("-", "-")
    assert rows[1].cells(["A. Author, 2020"])[4] == "fine-tuned (their table 2)"
    assert "1 number without a counterpart" in beside_sentence(rows)


@pytest.mark.parametrize(("field", "value"), [("stage", "tuned"), ("accuracy", 93.0)])
def test_references_are_checked(field, value):
    with pytest.raises(InputError, match=field):
        beside(grid(), [REFERENCES[0]._replace(**{field: value})])


# --- the page, Markdown and figures


CURVES = {r.key: [("dense", 1, 1.0, 0.5, 0.1), ("tune 1", 1, 0.5, 0.7, 0.01)] for r in grid()}
NASTY = '</script><img src="http://example.invalid/x">'


def everything(records, path):
    return write_report(
        records,
        path,
        "A study",
        references=REFERENCES,
        notes=["Their FLOPs are MACs."],
        failures=[Failure("net-digits-l1-0.9-0", "RuntimeError: diverged")],
        curves=CURVES,
    )


def test_the_page_of_a_study_says_everything(tmp_path):
    records = [
        *grid(("l1", "taylor", "random", "magnitude, weights", "smaller")),
        *grid(("l1", "random"), model="net56"),
    ]
    text = everything(records, tmp_path / "r.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert [link for link in page.links if not link.startswith("#")] == ["data:,"]
    assert {"s1-training", "s1-sparsity-choices", "s1-widths-choices", "o-family0", "s2-classic"} <= set(page.scripts)
    assert {f"s1-pareto-{axis}" for axis in AXES} <= set(page.scripts)
    for words in (
        *("masked: no speed-up", "Beside published numbers", "their table 2", "Their FLOPs are MACs."),
        *("1 trial failed and is not in any figure.", "RuntimeError: diverged", "Method against method"),
    ):
        assert words in text, words
    trials = {column["head"]: column for column in page.scripts["s1-trials"]["columns"]}
    assert {"training %", "weights left %", "validation %"} <= set(trials)


def test_nothing_from_outside_can_break_out_of_the_page(tmp_path):
    records = [r for m in (NASTY, "other") for r in grid((NASTY, "l1"), model=m, data=NASTY)]
    records = [replace(r, layers=(LayerWeights(NASTY, 9, 3),)) for r in records]
    references = [Reference(NASTY, NASTY, NASTY, 0.2, "pruned", 0.5, NASTY, NASTY)]
    curves = {r.key: [(NASTY, 1, 1.0, 0.5, 0.1)] for r in records}
    path = write_report(
        records,
        tmp_path / "r.html",
        NASTY,
        references=references,
        notes=[NASTY],
        failures=[Failure(NASTY, NASTY)],
        curves=curves,
    )
    links = _Page(path.read_text(encoding="utf-8")).links
    assert [link for link in links if not link.startswith("#")] == ["data:,"]


def test_every_word_is_explained_only_where_it_is_used():
    plain = {word for word, _ in words_for([record()])}
    assert "Masked" not in plain and "Controls" not in plain
    assert {"MACs", "Params", "Latency and speed-up", "Pareto front", "Removed: channels (sparsity)"} <= plain
    full = dict(words_for(grid(("l1", "magnitude, weights", "random", "smaller"))))
    assert {"Masked", "Controls", "Epochs", "Removed: weights (sparsity)"} <= set(full)
    assert all(word in full["Controls"] for word in ("random", "unpruned", "smaller"))


def test_markdown_holds_the_tables_and_the_words(tmp_path):
    records = whole_study()
    path = write_markdown(
        records,
        tmp_path / "deep" / "report.md",
        "A\n# study",
        references=REFERENCES,
        notes=["Their FLOPs are MACs."],
        failures=[Failure("key", "a | b\nc")],
    )
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# A # study\n")
    assert text.count("\n## ") == 1 + 1 + 1 + 6 + 1 + 1  # overview, duels, published, sections, words, failures
    assert "| key | a \\| b c |" in text
    assert "masked: no speed-up" in text and "torch 2.13.0" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1
    with pytest.raises(InputError, match="no records"):
        write_markdown([], tmp_path / "x.md")


def test_figures_are_written_for_papers(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    records = [r for r in whole_study() if r.data == "cifar10" and r.model != "vgg16"]
    paths = write_figures(records, tmp_path / "figures")
    assert len(paths) == len(set(paths)) == 2 * 5 + 1 + 1
    assert {path.name for path in paths} >= {"resnet20-cifar10-classic.png", "resnet20-cifar10-pareto-latency.png"}
    for path in paths:
        with Image.open(path) as image:
            assert image.info["dpi"] == pytest.approx((300, 300), abs=1)
            assert image.width >= 1000
            assert len(image.convert("RGB").getcolors(2**24)) > 20  # something is drawn


def test_names_that_look_alike_do_not_overwrite_figures(tmp_path):
    pytest.importorskip("matplotlib")
    records = [*grid(("l1",), seeds=1, model="a/b"), *grid(("l1",), seeds=1, model="a b")]
    paths = write_figures(records, tmp_path)
    assert len(set(paths)) == len(paths) == len(list(tmp_path.iterdir()))


def test_importing_the_report_imports_no_drawing_library():
    code = "import sys, secateur.report; sys.exit(any(m in sys.modules for m in ('matplotlib', 'plotly', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_new_fields_survive_their_file(tmp_path):
    records = whole_study()
    write_records(tmp_path / "r.jsonl", records)
    assert read_records(tmp_path / "r.jsonl") == records


# --- in a browser


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_a_study_draws_all_its_charts_without_errors_or_requests(tmp_path):
    records = [
        *grid(("l1", "taylor", "random", "magnitude, weights", "smaller")),
        *grid(("l1", "random"), model="net56"),
    ]
    page = everything(records, tmp_path / "report.html")
    dom, log = opened(page, tmp_path / "profile")
    charts = dom.count('class="chart')
    assert f'data-drawn="{charts}"' in dom and charts >= 1 + 7 + 6
    assert "CONSOLE" not in log, log
    assert dom.count("main-svg") >= charts
    assert len(re.findall(r'class="trace scatter', dom)) > 60
    assert len(re.findall(r'class="trace bars', dom)) == 2 * 3


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_thousands_of_rows_are_paged_and_sorted(tmp_path):
    records = [record("l1", round(k / 1000, 3), 0, accuracy_finetuned=0.9 - (k * 7 % 900) / 1e4) for k in range(1, 900)]
    page = write_report(records, tmp_path / "report.html")
    act = """<script>
      const told = document.body.dataset;
      const part = document.querySelector("[data-table]");
      told.first = part.querySelectorAll("tbody tr").length;
      const heads = [...part.querySelectorAll("th")];
      const place = heads.findIndex((head) => head.textContent.startsWith("fine-tuned"));
      heads[place].querySelector("button").click();
      const values = () => [...part.querySelectorAll("tbody tr")].map((row) => Number(row.cells[place].textContent));
      told.sorted = values().every((v, i) => i === 0 || values()[i - 1] <= v);
      told.least = values()[0];
      heads[place].querySelector("button").click();
      told.most = values()[0];
      [...part.querySelectorAll(".more button")].at(-1).click();
      told.all = part.querySelectorAll("tbody tr").length;
      const single = document.querySelector("details [data-table]");
      told.before = single.querySelectorAll("tr").length;
      const details = single.closest("details");
      details.addEventListener("toggle", () => { told.after = single.querySelectorAll("tr").length; });
      details.open = true;
    </script></body>"""
    text = page.read_text(encoding="utf-8")
    page.write_text(text[: text.rindex("</body>")] + act + "</html>", encoding="utf-8")
    dom, log = opened(page, tmp_path / "profile")
    assert "CONSOLE" not in log, log
    told = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", dom)[0]))
    assert (told["first"], told["all"], told["sorted"]) == ("100", "899", "true")
    assert (float(told["least"]), float(told["most"])) == (81.0, 90.0)
    assert (told["before"], told["after"]) == ("0", "101")


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_menus_change_the_overview_and_the_layers(tmp_path):
    page = everything([*grid(("l1", "random")), *grid(("l1", "random"), model="other")], tmp_path / "report.html")
    act = """<script>
    const act = async () => {
      const told = document.body.dataset;
      const tables = [...document.querySelectorAll("#overview-panels table")];
      const visible = () => tables.map((table) => !table.hidden).join();
      told.panels = visible();
      const panels = document.querySelector("select[data-panels]");
      panels.value = "0";
      panels.dispatchEvent(new Event("change"));
      told.then = visible();
      const menu = document.querySelector('[data-choices="s1-sparsity"]');
      menu.dispatchEvent(new Event("focus"));
      menu.value = "1";
      menu.dispatchEvent(new Event("change"));
      await new Promise((done) => setTimeout(done, 50));
      told.bars = document.querySelector('[data-figure="s1-sparsity"]').data[0].y.join();
    };
    const wait = () => (document.documentElement.dataset.drawn ? act() : setTimeout(wait, 20));
    wait();
    </script></body>"""
    text = page.read_text(encoding="utf-8")
    page.write_text(text[: text.rindex("</body>")] + act + "</html>", encoding="utf-8")
    dom, log = opened(page, tmp_path / "profile")
    assert "CONSOLE" not in log, log
    told = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", dom)[0]))
    assert (told["panels"], told["then"]) == ("false,true", "true,false")
    assert told["bars"] == "50"


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_where_the_setting_shown_is_masked_the_widths_are_those_of_another(tmp_path):
    masked = grid(("magnitude, weights",), validation_finetuned=0.96)
    page = write_report([*masked, *grid(("l1",), validation_finetuned=0.5)], tmp_path / "report.html")
    act = """<script>
      const menu = document.querySelector('[data-choices="s1-widths"]');
      document.body.dataset.shown = menu.selectedOptions[0].textContent;
      addEventListener("load", () => setTimeout(() => {
        document.body.dataset.bars = document.querySelector('[data-figure="s1-widths"]').data[1].y.join();
      }, 3000));
    </script></body>"""
    text = page.read_text(encoding="utf-8")
    page.write_text(text[: text.rindex("</body>")] + act + "</html>", encoding="utf-8")
    dom, log = opened(page, tmp_path / "profile")
    assert "CONSOLE" not in log, log
    assert "fewer weights" in dom
    assert 'data-shown="l1, 20 %"' in dom
    assert 'data-bars="8,16"' in dom


# -- measured time ---------------------------------------------------------------------------------------------------


def timed(seed: int, *, speedup: float = 2.0, prunes: str = "channels", lengths: tuple[int | None, ...] = (16, 128)):
    timings = tuple(
        Timing(batch, 10.0 + seed, (10.0 + seed) / speedup, speedup, 0.01, runtime, length)
        for length in lengths
        for batch in (1, 16)
        for runtime in ("eager", "onnxruntime")
    )
    return record(seed=seed, timings=timings, prunes=prunes, criterion="l2" if prunes == "channels" else "magnitude")


def test_measured_times_are_means_in_a_table_of_what_got_smaller(tmp_path):
    records = [timed(0, speedup=2.0), timed(1, speedup=4.0), timed(0, prunes="weights")]
    table = timing_table(summarise(records))
    assert table.heads[:4] == ["setting", "fewer MACs", "batch 1, 16 tokens, eager", "batch 1, 16 tokens, onnxruntime"]
    assert [row[0] for row in table.rows] == ["dense", "l2, 40 %"]
    assert table.rows[0][2] == f"10.5{fmt.THIN}ms" and table.rows[1][2] == f"3.88{fmt.THIN}ms, 3.00{fmt.CROSS}"
    assert len(table.heads) == len(table.rows[1]) == 2 + 8
    assert "### Measured time" in write_markdown(records, tmp_path / "r.md").read_text()
    assert "<h2>Measured time</h2>" in write_report(records, tmp_path / "r.html").read_text()


def test_widths_of_the_highlighted_method_are_a_table_with_heads(tmp_path):
    def widths(heads, units):
        return (LayerWidth("query", 64, 16 * heads, 16), LayerWidth("inner", 96, units), LayerWidth("head", 2, 2))

    records = [record(sparsity=0.2, widths=widths(3, 80)), record(sparsity=0.4, widths=widths(2, 60))]
    records += [record("random", 0.4, widths=widths(1, 50), accuracy_finetuned=0.5)]
    table = width_table(summarise(records), summarise(records)[0])
    assert table.heads == ("layer", "dense", "20 % removed", "40 % removed")
    heads = [f"{number} {fmt.CROSS} 16" for number in (4, 3, 2)]
    assert table.rows == [("query", *heads), ("inner", "96", "80", "60")]  # the head stays
    assert "### Width of each layer: l2" in write_markdown(records, tmp_path / "r.md").read_text()
    assert "Layer by layer: l2" in write_report(records, tmp_path / "r.html").read_text()
    masked = [record("magnitude", prunes="weights", widths=())]
    assert width_table(summarise(masked), summarise(masked)[0]) is None


def test_one_timing_needs_no_table_and_of_many_settings_the_rest_is_counted():
    one = record(timings=(Timing(64, 2.0, 1.0, 2.0, 0.01),))
    assert timing_table(summarise([one])) is None
    images = timing_table(summarise([timed(0, lengths=(None,))]))
    assert images.heads[2] == "batch 1, eager"
    many = [record(sparsity=s / 100, timings=timed(0).timings) for s in range(1, 60)]
    table = timing_table(summarise(many))
    assert len(table.rows) == 41 and "19 more settings not shown" in table.note
