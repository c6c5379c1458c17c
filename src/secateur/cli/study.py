"""`secateur study ...`: run a study, see how far it is, and read what it found."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli.options import Debug
from secateur.cli.printing import box, progress, show
from secateur.errors import ArtifactError, InputError, UnknownNameError

if TYPE_CHECKING:
    from secateur.study.dense import Workplace
    from secateur.study.executors import Executor
    from secateur.study.reading import Results
    from secateur.study.spec import Study
    from secateur.study.trials import Trial

study = typer.Typer(
    no_args_is_help=True,
    help="Compare pruning methods: models x data x methods x sparsities x seeds, from a TOML file.",
)

EXECUTORS = ("local", "ray")
File = Annotated[Path, typer.Argument(metavar="FILE", help="The study (TOML); `secateur study schema` explains it.")]
StoreUrl = Annotated[
    str, typer.Option("--store", metavar="URL", help="Where rows are: sqlite:///FILE, postgresql://..., or a file.")
]
Profile = Annotated[str | None, typer.Option(help="Which scale of the file, such as cpu or gpu.", show_default=False)]
Work = Annotated[Path, typer.Option(help="Folder for checkpoints and dense models, shared by all workers.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder of the data sets; default SECATEUR_DATA, else the Hub.", show_default=False)
]
STORE = "sqlite:///runs/studies.db"
WORK = Path("runs")


@study.command()
def run(
    file: File,
    *,
    store: StoreUrl = STORE,
    profile: Profile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the trials and what they will cost.")] = False,
    executor: Annotated[str, typer.Option(help="local: processes on this machine; ray: a Ray cluster.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of local: processes. Default: one per GPU, else per core.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    work: Work = WORK,
    data_dir: DataDir = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run the trials again that failed.")] = False,
    address: Annotated[str | None, typer.Option(help="Of ray: the cluster; 'auto' for this machine's.")] = None,
    num_gpus: Annotated[float, typer.Option(min=0, help="Of ray: GPUs per trial.")] = 0.0,
    max_retries: Annotated[int, typer.Option(min=0, help="Of ray: how often a lost trial is started again.")] = 3,
    debug: Debug = False,
) -> None:
    """Run the trials that the store has not got yet.

    Stop it at any moment, in any way: the same command goes on where it was, and loses at most the epoch in progress.
    """
    from secateur.study.dense import Workplace
    from secateur.study.driver import run_study
    from secateur.study.spec import read_study
    from secateur.study.store import Store
    from secateur.study.trials import trials_of

    if executor not in EXECUTORS:
        raise UnknownNameError("executor", executor, EXECUTORS)
    found = read_study(file, profile)
    trials = trials_of(found)
    place = Workplace(work, data_dir, None, device)
    if dry_run:
        _show_plan(found, trials, place, _known_seconds(store, found.name), workers)
        return
    kept = Store(store)
    if retry_failed:
        kept.forget_failures(found.name)
    command = f"secateur study report {file} --store {store}"
    try:
        with progress(len(trials)) as told:
            outcome = run_study(
                found.name,
                trials,
                kept,
                _executor(executor, workers, device, address, num_gpus, max_retries),
                place,
                told=told,
            )
    except KeyboardInterrupt:
        typer.echo("Interrupted. Finished trials are in the store; run the same command again to go on.", err=True)
        raise typer.Exit(130) from None
    said = f"{len(trials)} trials: {outcome.new} new, {outcome.known} were there"
    typer.echo(f"{said}, {len(outcome.failures)} of the new ones failed." if outcome.failures else f"{said}.")
    typer.echo(f"Report: {command}")
    if outcome.failures:
        raise typer.Exit(1)


@study.command()
def status(
    file: File,
    *,
    store: StoreUrl = STORE,
    profile: Profile = None,
    work: Work = WORK,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds, until it is done.")] = False,
    debug: Debug = False,
) -> None:
    """Show how far a study is, how fast it goes, what is running, and when it will be done."""
    from secateur.study.dense import Workplace
    from secateur.study.reading import results_of
    from secateur.study.store import Store

    kept = Store(store, create=False)
    while True:
        results = results_of(file, kept, profile)
        if watch and sys.stdout.isatty():
            typer.echo("\033[H\033[2J", nl=False)  # from the top of an empty screen
        _show_status(results, Workplace(work))
        if not watch or len(results.rows) == len(results.trials):
            return
        time.sleep(2)


@study.command()
def rows(
    file: File,
    *,
    store: StoreUrl = STORE,
    profile: Profile = None,
    form: Annotated[str, typer.Option("--format", help="csv, parquet or json.")] = "csv",
    debug: Debug = False,
) -> None:
    """Write the finished trials to standard output, in the order of the grid."""
    from secateur.study.reading import FORMATS, as_bytes, results_of
    from secateur.study.store import Store

    if form not in FORMATS:
        raise UnknownNameError("format", form, FORMATS)
    sys.stdout.buffer.write(as_bytes(results_of(file, Store(store, create=False), profile).rows, form))
    sys.stdout.buffer.flush()


@study.command()
def report(
    file: File,
    *,
    store: StoreUrl = STORE,
    profile: Profile = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; default: the study's name.", show_default=False)
    ] = None,
    figures: Annotated[bool, typer.Option(help="Also PNG figures for papers (needs matplotlib).")] = False,
    debug: Debug = False,
) -> None:
    """Write report.html, which needs nothing else, and report.md; with --figures also PNG files."""
    from secateur.study.reading import results_of, write_reports
    from secateur.study.store import Store

    kept = Store(store, create=False)
    results = results_of(file, kept, profile)
    for path in write_reports(results, kept, file.parent, out or Path(results.study.name), figures=figures):
        typer.echo(path.resolve())


@study.command()
def compare(
    left: Annotated[str, typer.Argument(metavar="A", help="A study (TOML file), or a method of --study.")],
    right: Annotated[str, typer.Argument(metavar="B", help="What to compare it with.")],
    *,
    store: StoreUrl = STORE,
    other_store: Annotated[
        str | None, typer.Option(metavar="URL", help="Where B's rows are.", show_default="as A's")
    ] = None,
    within: Annotated[
        Path | None, typer.Option("--study", help="The study whose methods A and B are.", show_default=False)
    ] = None,
    profile: Profile = None,
    debug: Debug = False,
) -> None:
    """Print the differences of fine-tuned test accuracy between two studies, or two methods, trial by trial.

    Trials are matched by model, data, sparsity and seed (and method, between studies).
    """
    from secateur.report.comparing import difference_terminal, differences
    from secateur.study.reading import results_of
    from secateur.study.store import Store

    here, there = Store(store, create=False), Store(other_store or store, create=False)
    if within is not None:
        ours, theirs = results_of(within, here, profile).records, results_of(within, there, profile).records
        names = {record.name for record in [*ours, *theirs]}
        for name in (left, right):
            if name not in names:
                raise UnknownNameError(f"method with finished trials in {within}", name, names)
        ours, theirs = [r for r in ours if r.name == left], [r for r in theirs if r.name == right]
        found = differences(ours, theirs)
    else:
        for name in (left, right):
            if not Path(name).is_file():
                raise InputError(f"no study file {name}; to compare two methods of a study, add --study FILE.")
        found = differences(results_of(left, here, profile).records, results_of(right, there, profile).records)
    show(difference_terminal(found, f"{right} against {left}"))


@study.command()
def schema(
    form: Annotated[str, typer.Option("--format", help="text, or json: a JSON schema for editors.")] = "text",
    debug: Debug = False,
) -> None:
    """Explain every field of a study file."""
    from secateur.study.spec import Study as Spec
    from secateur.study.spec import field_lines

    if form == "json":
        import json

        typer.echo(json.dumps(Spec.model_json_schema(), indent=1))
        return
    if form != "text":
        raise UnknownNameError("format", form, ("text", "json"))
    from rich.markup import escape
    from rich.table import Table

    table = Table("field", "type", "default", "meaning", box=box())
    for cells in field_lines():
        table.add_row(*map(escape, cells))
    show(table)
    show("[profiles.NAME] replaces what it names, at another scale: secateur study run FILE --profile NAME.")


def _executor(
    name: str, workers: int | None, device: str, address: str | None, num_gpus: float, max_retries: int
) -> Executor:
    if name == "ray":
        from secateur.study.cluster import RayExecutor

        return RayExecutor(address, gpus=num_gpus or float(device.startswith("cuda")), max_retries=max_retries)
    from secateur.study.executors import LocalExecutor

    if not device.startswith("cuda"):
        return LocalExecutor(workers or os.cpu_count() or 1)
    import torch

    there = torch.cuda.device_count()
    if not there:
        raise InputError("device cuda: this machine has none that torch can use.")
    number = workers or there
    return LocalExecutor(number, [str(place % there) for place in range(number)])


def _known_seconds(store: str, name: str) -> dict[str, float]:
    """The seconds of finished trials; a dry run leaves no store behind."""
    from secateur.study.store import Store

    try:
        return {row.key: row.seconds for row in Store(store, create=False).rows(name)}
    except ArtifactError:
        return {}


def _show_plan(
    found: Study, trials: tuple[Trial, ...], place: Workplace, known: dict[str, float], workers: int | None
) -> None:
    from rich.markup import escape
    from rich.table import Table

    from secateur.study.costs import costs_of

    costs = costs_of(trials, place, known)
    table = Table("trial", box=box(), title=escape(found.title or found.name), title_justify="left")
    table.add_column("tera-MACs", justify="right")
    table.add_column("minutes", justify="right")
    for cost in costs:
        minutes = "done" if cost.seconds is None else f"{cost.seconds / 60:,.1f}"
        table.add_row(escape(cost.text), f"{cost.macs / 1e12:,.2f}", minutes)
    show(table)
    left = sum(cost.seconds or 0.0 for cost in costs) / 60
    number = workers or os.cpu_count() or 1
    show(
        f"Estimated: {sum(cost.macs for cost in costs) / 1e12:,.2f} tera-MACs in all, pruned models counted as dense; "
        f"{left:,.0f} minutes to go on one worker, {left / number:,.0f} on {number}."
    )
    show(f"{sum(cost.seconds is None for cost in costs)} of the trials are done.")
    show(f"{len(trials)} trials")


def _show_status(results: Results, place: Workplace) -> None:
    from secateur.study.driver import running
    from secateur.study.reading import progress_of

    found = progress_of(results)
    show(f"{results.study.title or results.study.name}: {found.done} of {found.total} trials are done.")
    if found.failed:
        show(f"{found.failed} failed:")
        for failure in results.failures:
            show(f"  {failure.key}: {failure.error.splitlines()[0]}")
    if found.per_hour is not None:
        show(f"rate: {found.per_hour:,.0f} trials per hour, by the last ones")
    if found.last is not None:
        show(f"last one finished: {found.last:%Y-%m-%d %H:%M:%S}")
    under_way = running(place, results.study.name)
    for name in under_way:
        show(f"running: {name}")
    if found.expected_end is not None:
        when = f"{found.expected_end:%Y-%m-%d %H:%M}"
        show(
            f"expected end: {when}" if under_way else f"not running in {place.folder}; at that rate it would end {when}"
        )
