"""The report: records survive their file, statistics obey their laws, and the page opens in a browser by itself."""

import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from secateur.errors import ArtifactError, InputError
from secateur.report import (
    Pair,
    Record,
    estimate,
    markdown_table,
    paired,
    read_records,
    summarise,
    terminal_table,
    write_records,
    write_report,
)
from secateur.report import format as fmt
from secateur.report.charts import AXES, accuracy_over_cost, accuracy_over_sparsity
from secateur.report.findings import choose, find
from secateur.report.palette import DARK, styles
from secateur.report.records import LayerWidth
from secateur.report.statistics import pareto_front, t_quantile


def record(criterion="l2", sparsity=0.4, seed=0, **changes):
    kept = (1 - sparsity) ** 2
    values = {
        "key": f"{criterion}-{sparsity}-{seed}",
        "model": "net",
        "data": "digits",
        "criterion": criterion,
        "scope": "layer",
        "sparsity": sparsity,
        "seed": seed,
        "accuracy_dense": 0.97,
        "accuracy_pruned": 0.97 - sparsity,
        "accuracy_finetuned": 0.97 - sparsity / 20,
        "params": Pair(1000, int(1000 * kept)),
        "macs": Pair(100_000, int(100_000 * kept)),
        "latency_ms": Pair(1.0, 0.5 + kept / 2),
        "speedup": 1 / (0.5 + kept / 2),
        "verified_difference": 1e-16,
        "widths": (LayerWidth("conv1", 10, 10 - int(10 * sparsity)), LayerWidth("conv2", 20, 20 - int(20 * sparsity))),
        "seconds": 1.0,
        "validation_dense": 0.96,
        "validation_finetuned": 0.96 - sparsity / 20,
        "fingerprint": {"torch": "2.13.0", "machine": {"cores": 2}},
    }
    return Record(**{**values, **changes})


def study(seeds=2, criteria=("l1", "random"), sparsities=(0.1, 0.4)):
    noise = random.Random(0)
    found = []
    for criterion in criteria:
        for sparsity in sparsities:
            for seed in range(seeds):
                worse = 0.02 if criterion == "random" else 0.0
                tuned = 0.95 - sparsity / 20 - worse + noise.uniform(-0.002, 0.002)
                found.append(record(criterion, sparsity, seed, accuracy_finetuned=tuned))
    return found


# --- records


def test_records_come_back_equal_from_their_file(tmp_path):
    records = study()
    write_records(tmp_path / "new" / "records.jsonl", records)
    assert read_records(tmp_path / "new" / "records.jsonl") == records


def test_no_file_holds_no_records(tmp_path):
    assert read_records(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_last_line_cut_short_is_left_out(tmp_path, cut):
    file = tmp_path / "records.jsonl"
    write_records(file, study())
    file.write_bytes(file.read_bytes()[:-cut])
    kept = study()[: -1 if cut > 1 else None]  # without its line feed alone, the last line is still whole
    assert read_records(file) == kept


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    file = tmp_path / "records.jsonl"
    write_records(file, study())
    lines = file.read_text().splitlines(keepends=True)
    lines[1] = "{}\n"
    file.write_text("".join(lines))
    with pytest.raises(ArtifactError, match="line 2"):
        read_records(file)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_bytes(b"\x80\x02}q\x00.\n")
    with pytest.raises(ArtifactError, match="JSON lines"):
        read_records(file)


def test_fields_of_a_later_version_are_left_out():
    text = json.dumps({**json.loads(record().to_json()), "invented_later": 1})
    assert Record.from_json(text) == record()


@pytest.mark.parametrize("field", ["accuracy_finetuned", "sparsity"])
def test_percentages_are_refused_as_fractions(field):
    with pytest.raises(ArtifactError, match=field):
        replace(record(), **{field: 97.0})


def test_a_full_disk_leaves_the_old_records(tmp_path, monkeypatch):
    file = tmp_path / "records.jsonl"
    write_records(file, study()[:1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_records(file, study())
    assert read_records(file) == study()[:1]
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


# --- statistics


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 29, 100])
def test_t_quantiles_are_those_of_scipy(freedom):
    scipy_stats = pytest.importorskip("scipy.stats")
    for probability in (0.6, 0.9, 0.975, 0.999):
        assert t_quantile(probability, freedom) == pytest.approx(scipy_stats.t.ppf(probability, freedom), rel=1e-9)


def test_an_interval_by_hand():
    # Mean 2, standard deviation 1, three values: 2 +- 4.3027 / sqrt(3).
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.bar == (found.low, found.high)


def test_intervals_move_with_the_values_and_grow_with_their_scale():
    values = [0.3, 0.5, 0.1, 0.9]
    base, moved = estimate(values), estimate([3 * v + 1 for v in values])
    assert moved.mean == pytest.approx(3 * base.mean + 1)
    assert moved.high - moved.low == pytest.approx(3 * (base.high - base.low))


def test_with_two_seeds_error_bars_are_the_range_and_with_one_nothing_is_claimed():
    assert estimate([1.0, 3.0]).bar == (1.0, 3.0)
    assert estimate([1.0]).high == math.inf
    with pytest.raises(InputError):
        estimate([])


def test_summaries_do_not_depend_on_the_order_of_the_seeds():
    records = study(seeds=3)
    shuffled = sorted(records, key=lambda r: (records.index(r) // 3, -r.seed))
    for one, other in zip(summarise(records), summarise(shuffled), strict=True):
        assert one.seeds == other.seeds
        assert one.accuracy_finetuned.mean == pytest.approx(other.accuracy_finetuned.mean)


def test_the_drop_is_paired_by_seed():
    # Both seeds lose exactly one point, though the dense models are five apart: the drop has no spread.
    pair = [record(seed=s, accuracy_dense=d, accuracy_finetuned=d - 0.01) for s, d in ((0, 0.90), (1, 0.95))]
    (summary,) = summarise(pair)
    assert summary.drop.least == pytest.approx(0.01)
    assert summary.drop.most == pytest.approx(0.01)


def test_records_of_two_models_are_not_averaged():
    with pytest.raises(InputError, match="do not compare"):
        summarise([record(), record(model="other")])


def test_no_setting_beats_one_on_the_front():
    summaries = summarise(study(criteria=("l1", "l2", "random"), sparsities=(0.1, 0.2, 0.4, 0.6)))
    front = pareto_front(summaries)
    assert front
    for member in front:
        assert not any(
            s.macs < member.macs and s.accuracy_finetuned.mean >= member.accuracy_finetuned.mean for s in summaries
        )
    for other in summaries:
        if other not in front:
            assert any(
                m.macs <= other.macs and m.accuracy_finetuned.mean >= other.accuracy_finetuned.mean for m in front
            )


# --- findings


def test_the_setting_shown_is_chosen_on_validation_data():
    # On test data both look good; on validation data the one with fewer MACs loses too much.
    good = record("l1", 0.2, validation_finetuned=0.955, accuracy_finetuned=0.97)
    lucky = record("l1", 0.6, validation_finetuned=0.80, accuracy_finetuned=0.97)
    assert choose(summarise([good, lucky])).sparsity == 0.2
    unknown = [replace(r, validation_dense=None) for r in (good, lucky)]
    assert choose(summarise(unknown)).sparsity == 0.6
    assert any("chosen on test data" in w for w in find(unknown, summarise(unknown)).warnings)


def test_the_headline_states_the_loss():
    cheap = [record(sparsity=0.5, accuracy_finetuned=0.966)]
    assert (
        find(cheap, summarise(cheap)).headline == f"75{fmt.THIN}% fewer multiply-accumulates for 0.4 points of accuracy"
    )
    costly = [record(sparsity=0.5, accuracy_finetuned=0.90, validation_finetuned=0.90)]
    found = find(costly, summarise(costly))
    assert "cost 7.0 points" in found.headline
    assert "no setting stays within one point" in found.facts[0]


def test_a_slower_model_is_called_slower():
    slow = [record(speedup=0.9, latency_ms=Pair(1.0, 1.1))]
    assert any("not faster" in fact for fact in find(slow, summarise(slow)).facts)


def test_gain_over_random_is_paired():
    records = [record("l1", s, seed, accuracy_finetuned=0.9 + seed / 100) for s in (0.1, 0.4) for seed in (0, 1)]
    records += [record("random", s, seed, accuracy_finetuned=0.8 + seed / 100) for s in (0.1, 0.4) for seed in (0, 1)]
    gain = paired(records, "l1", "random")
    assert gain is not None
    assert gain.least == pytest.approx(0.1)
    assert gain.most == pytest.approx(0.1)
    assert paired(records[:4], "l1", "random") is None


def test_a_method_that_trained_before_its_last_pruning_is_not_compared_before_fine_tuning():
    records = study(seeds=3)
    steps = [replace(r, key=f"{r.key} steps", method="l1 in steps", epochs_before=2) for r in records[:6]]
    found = find(records + steps, summarise(records + steps))
    fact = next(fact for fact in found.facts if "at random" in fact)
    before, after = fact.split("after it")
    assert "l1 in steps" not in before
    assert "l1 in steps" in after
    assert any("l1 in steps trained before" in warning for warning in found.warnings)
    only = [replace(r, epochs_before=2) for r in records]
    (fact,) = [fact for fact in find(only, summarise(only)).facts if "at random" in fact]
    assert "before fine-tuning" not in fact


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (study(seeds=2), "2 seeds per setting"),
        (study(seeds=3)[:-1], "1 trial missing"),
        ([record(widths=(LayerWidth("a", 64, 32), LayerWidth("b", 64, 1)))], "b keeps 1 of 64 (l2, 40"),
        ([record(fingerprint={"data": {"test": 250}})], "one is worth 0.40 points"),
        ([record(latency_noise=0.5), record(seed=1, latency_noise=0.01)], "noisy in 1 of 2 trials"),
        ([record(), record(seed=1, fingerprint={"torch": "2.14.0", "machine": {"cores": 2}})], "differ in torch"),
    ],
)
def test_warnings_say_what_is_wrong(records, words):
    assert any(words in warning for warning in find(records, summarise(records)).warnings)


def test_a_complete_quiet_study_has_no_warnings():
    records = study(seeds=3)
    assert find(records, summarise(records)).warnings == ()


# --- tables and charts


def test_the_markdown_table_has_a_row_per_setting():
    summaries = summarise(study())
    lines = markdown_table(summaries).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(summaries)
    assert len({line.count("|") for line in table}) == 1
    mean = statistics.fmean(r.accuracy_finetuned for r in study()[:2]) * 100
    assert f"{mean:.1f} ±" in table[2]


def test_the_terminal_table_shows_every_column_in_120_characters():
    from rich.console import Console

    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(terminal_table(summarise(study()), "title [not markup]"))
    text = console.export_text()
    assert "title [not markup]" in text
    assert "…" not in text
    assert text.count("97.0 ± 0.0") == len(summarise(study()))


def test_charts_show_the_numbers_of_the_summaries():
    records = study(seeds=3)
    summaries = summarise(records)
    classic = {trace.name: trace for trace in accuracy_over_sparsity(records, summaries).data}
    assert list(classic["l1"].y) == [s.accuracy_finetuned.mean for s in summaries if s.method == "l1"]
    assert list(classic["l1, pruned"].y) == [s.accuracy_pruned.mean for s in summaries if s.method == "l1"]
    assert set(classic["dense"].y) <= {0.97, None}
    assert classic["l1"].line.color == classic["l1, pruned"].line.color != classic["random"].line.color
    assert classic["l1"].error_y.array[0] == pytest.approx(
        summaries[0].accuracy_finetuned.high - classic["l1"].y[0], abs=1e-6
    )
    front = next(trace for trace in accuracy_over_cost(records, summaries, AXES["MACs"]).data if trace.name == "front")
    assert list(front.x) == [s.macs for s in pareto_front(summaries)]


def test_every_criterion_has_its_own_look_and_a_dark_partner():
    looks = styles([f"criterion{i}" for i in range(16)])
    assert len(set(looks.values())) == len(looks)
    assert all(colour in DARK for colour, _ in looks.values())


@pytest.mark.parametrize(
    ("value", "text"),
    [(512, "512"), (999.6, "1.00 k"), (78_000, "78.0 k"), (1_814_000, "1.81 M"), (2.5e9, "2.50 G")],
)
def test_counts_are_written_with_three_digits(value, text):
    assert fmt.count(value).replace(fmt.THIN, " ") == text


def test_a_difference_that_rounds_to_nothing_has_no_sign():
    assert fmt.signed_points(-0.0001) == "0.0"
    assert fmt.signed_points(-0.012) == f"{fmt.MINUS}1.2"


# --- the page


class _Page(HTMLParser):
    """Collects what a reader could load or see."""

    def __init__(self, text):
        super().__init__()
        self.links, self.rows, self.scripts, self._kind = [], 0, {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href", "srcset", "action") if name in attrs]
        self.rows += tag == "tr"
        self._kind = attrs.get("id") if attrs.get("type") == "application/json" else None

    def handle_data(self, data):
        if self._kind:
            self.scripts[self._kind] = json.loads(data)
            self._kind = None


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path):
    records = study()
    path = write_report(records, tmp_path / "deep" / "report.html")
    page = _Page(path.read_text(encoding="utf-8"))
    assert page.links == ["data:,"]
    assert page.rows == 1 + len(summarise(records)) + 1 + 2 + 1 + 2  # settings, method against method, two layers
    assert {"s1-classic", "s1-drop", "s1-pareto-MACs", "s1-speedup", "s1-widths"} <= set(page.scripts)
    trials = {column["head"]: column for column in page.scripts["s1-trials"]["columns"]}
    assert trials["fine-tuned %"]["values"] == [round(100 * r.accuracy_finetuned, 2) for r in records]
    assert "default-src 'none'" in path.read_text(encoding="utf-8")


def test_plain_dicts_give_the_same_page(tmp_path):
    records = study()
    one = write_report(records, tmp_path / "a.html").read_bytes()
    other = write_report([json.loads(r.to_json()) for r in records], tmp_path / "b.html").read_bytes()
    assert one == other


def test_names_cannot_break_out_of_the_page(tmp_path):
    nasty = '</script><img src="http://example.invalid/x">'
    records = [record(nasty, 0.1, model=nasty, widths=(LayerWidth(nasty, 4, 3),), fingerprint={"x": nasty})]
    page = _Page(write_report(records, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.links == ["data:,"]


def test_every_model_has_its_own_section(tmp_path):
    records = [*study(), *[replace(r, model="other") for r in study()]]
    page = _Page(write_report(records, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert {"s1-classic", "s2-classic"} <= set(page.scripts)


def test_an_empty_report_is_refused(tmp_path):
    with pytest.raises(InputError, match="no records"):
        write_report([], tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_the_report_needs_no_torch():
    code = "import sys, secateur.report.page, secateur.report.provenance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- in a browser


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def opened(page: Path, folder: Path) -> tuple[str, str]:
    """The document after its scripts ran, and what the browser logged."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=8000 --enable-logging=stderr --dump-dom"
    )
    command = [str(BROWSER), *flags.split(), f"--user-data-dir={folder}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_the_page_draws_itself_in_a_browser_without_errors_or_requests(tmp_path):
    records = study(seeds=3)
    page = write_report(records, tmp_path / "report.html")
    dom, log = opened(page, tmp_path / "profile")
    assert 'data-drawn="5"' in dom
    # The content policy forbids every request, so that one would be a console error.
    assert "CONSOLE" not in log, log
    # Fine-tuned and pruned for two criteria, the dense line, three line styles, and the other four charts.
    assert len(re.findall(r'class="trace scatter', dom)) >= 5 + 2 + 3
    assert len(re.findall(r'class="point[ "]', dom)) >= len(summarise(records)) * 4


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_the_browser_test_can_fail(tmp_path):
    page = write_report(study(), tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">', 1), encoding="utf-8")
    assert "CONSOLE" in opened(page, tmp_path / "profile")[1]


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_a_click_on_a_heading_sorts_the_table_and_the_menu_changes_the_widths(tmp_path):
    page = write_report(study(), tmp_path / "report.html")
    act = """<script>
    const soon = () => new Promise((done) => setTimeout(done, 50));
    const act = async () => {
      document.querySelector("[data-table]").closest("details").open = true;
      const table = document.querySelector("table.sortable");
      table.tHead.rows[0].cells[7].querySelector("button").click();
      const values = [...table.tBodies[0].rows].map((row) => Number(row.cells[7].dataset.value));
      document.body.dataset.sorted = values.every((v, i) => i === 0 || values[i - 1] <= v);
      const axis = document.querySelector("select[data-variants]");
      axis.value = "latency";
      axis.dispatchEvent(new Event("change"));
      await soon();
      const pareto = document.querySelector('[data-figure="s1-pareto"]');
      document.body.dataset.axis = pareto.layout.xaxis.title.text;
      const shown = pareto.data.find((trace) => trace.meta === "trials");
      document.body.dataset.hover = shown.customdata[0];
      const menu = document.querySelector("select[data-choices]");
      menu.dispatchEvent(new Event("focus"));
      menu.value = "1";
      menu.dispatchEvent(new Event("change"));
      await soon();
      document.body.dataset.widths = document.querySelector('[data-figure="s1-widths"]').data[1].y.join();
    };
    const wait = () => (document.documentElement.dataset.drawn ? act() : setTimeout(wait, 20));
    wait();
    </script></body>"""
    text = page.read_text(encoding="utf-8")
    page.write_text(text[: text.rindex("</body>")] + act + "</html>", encoding="utf-8")
    dom, _ = opened(page, tmp_path / "profile")
    assert 'data-sorted="true"' in dom
    assert 'data-widths="6,12"' in dom
    assert 'data-axis="measured latency, ms per batch"' in dom
    assert "l1-0.1-0" in re.search(r'data-hover="([^"]*)"', dom)[1]  # the pointer names the trial


def test_repaired_accuracy_is_shown_where_every_trial_has_it() -> None:
    plain, mended = study(), [replace(r, accuracy_repaired=r.accuracy_finetuned - 0.01) for r in study()]
    for records, shown in ((plain, False), (mended, True)):
        summaries = summarise(records)
        text = " ".join([*find(records, summaries).facts, *(tile.detail for tile in find(records, summaries).tiles)])
        assert ("Repair, without a gradient step" in text) == shown and ("repaired" in text) == shown
        figure = accuracy_over_sparsity(records, summaries)
        assert any(str(trace.name).endswith(", repaired") for trace in figure.data) == shown
        rows = markdown_table(summaries).splitlines()
        assert ("repaired (%)" in rows[0]) == shown
    assert Record.from_json(mended[0].to_json()) == mended[0]
    with pytest.raises(ArtifactError, match="accuracy_repaired"):
        replace(mended[0], accuracy_repaired=1.5)
