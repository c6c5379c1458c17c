"""The command line. What is heavy, torch first of all, is imported inside the commands, so that help is instant."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from secateur.cli.options import Debug
from secateur.cli.printing import box, one_line, progress, show
from secateur.cli.study import study as study_commands
from secateur.errors import InputError, SecateurError

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.coupling.groups import Graph
    from secateur.plans import Plan
    from secateur.pruning import Pruned


class Guarded(TyperGroup):
    """Turns the errors that a user can do something about into one line on standard error and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; with `--debug` the traceback comes first."""
        try:
            return super().invoke(ctx)
        except (SecateurError, OSError) as error:
            if ctx.find_root().obj == "debug":
                traceback.print_exc()
            typer.echo(one_line(error), err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Guarded,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an error in the user's own code keeps its plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prunes PyTorch models, proves the smaller model right, and measures what that cost and gained.",
)


app.add_typer(study_commands, name="study")


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"secateur {version('secateur')}")
        raise typer.Exit


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="package.module:callable, timm:NAME, torchvision:NAME, or one of our own networks, such as resnet20.",
    ),
]
Shapes = Annotated[
    list[str],
    typer.Option(
        "--input", metavar="SHAPE", help="Shape of an example input of random floats; repeat for more inputs."
    ),
]
PruneResidual = Annotated[
    bool, typer.Option("--prune-residual", help="Also remove channels under LayerNorm and RMSNorm (residual streams).")
]
Seed = Annotated[int, typer.Option(help="Seed of fresh weights, example inputs and the random criterion.")]
ONE_IMAGE = ["1,3,32,32"]


@app.callback()
def root(
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that stand before the command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results, dense models and the report.")] = Path("demo"),
    seeds: Annotated[
        int, typer.Option(min=1, help="How often everything is repeated, each time from fresh weights.")
    ] = 2,
    debug: Debug = False,
) -> None:
    """Run a small study on handwritten digits: prune by four criteria, fine-tune, measure, and write a report.

    Takes a minute or two. An interrupted run goes on where it stopped when started again.
    """
    from secateur.demo import demo_study, run_demo
    from secateur.report import summarise, terminal_table
    from secateur.study.trials import trials_of

    study = demo_study(seeds)
    number = len(trials_of(study))
    try:
        with progress(number) as told:
            outcome = run_demo(out, study, told)
    except KeyboardInterrupt:
        typer.echo(
            f"Interrupted. Finished trials are kept in {out / 'results.db'}; run the same command again to go on.",
            err=True,
        )
        raise typer.Exit(130) from None
    if not outcome.new:
        typer.echo(f"All {number} trials were done before: only the report was written again.", err=True)
    show(terminal_table(summarise(outcome.records), "digits_net on handwritten digits, test data"), least_width=128)
    typer.echo(f"Report: {outcome.report.resolve()}")
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def inspect(
    model: Model,
    prune_residual: PruneResidual = False,
    shapes: Shapes = ONE_IMAGE,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Show which channels of a model can be removed together, which are locked and why, and what the model costs."""
    from secateur.coupling.groups import trace
    from secateur.measuring import count
    from secateur.naming import example_inputs, named_model

    net, inputs = named_model(model, seed), example_inputs(shapes, seed)
    graph = trace(net, inputs, prune_residual=prune_residual)
    show(_groups_table(graph, model))
    if graph.unknown:
        show("Ops without a rule, around which everything is locked:")
        for op, times in sorted(graph.unknown.items()):
            show(f"  {op}  {times} times")
    free = graph.prunable
    channels = sum(group.channels for group in free)
    show(f"{len(free)} of {len(graph.groups)} groups can be pruned: {channels:,} channels.")
    show(f"{count(net, inputs)}, at input {' and '.join(shapes)}.")


@app.command()
def prune(
    model: Model,
    *,
    sparsity: Annotated[float | None, typer.Option(help="Fraction of the channels to remove, in [0, 1).")] = None,
    max_macs: Annotated[
        str | None, typer.Option(metavar="LIMIT", help="MACs that may remain: 0.5 for half, or a whole number.")
    ] = None,
    max_params: Annotated[
        str | None, typer.Option(metavar="LIMIT", help="Parameters that may remain: 0.5 for half, or a whole number.")
    ] = None,
    params_of: Annotated[
        list[str], typer.Option(help="Module name or pattern: --max-params counts only these; may be repeated.")
    ] = [],  # noqa: B006 - typer copies it
    criterion: Annotated[str, typer.Option(help="What makes a channel important; see `secateur criteria`.")] = "l2",
    scope: Annotated[
        str | None,
        typer.Option(help="What competes: 'global' (default for budgets), 'layer' (for --sparsity) or 'isomorphic'."),
    ] = None,
    round_to: Annotated[int, typer.Option(help="Keep widths that are multiples of this number.")] = 1,
    ignore: Annotated[list[str], typer.Option(help="Module name or pattern whose outputs stay; may be repeated.")] = [],  # noqa: B006 - typer copies it
    prune_residual: PruneResidual = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Trained weights of the dense model (.safetensors).")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to save the pruned model (.safetensors).")] = None,
    shapes: Shapes = ONE_IMAGE,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Remove channels from a model, verify the smaller one, and save it.

    Give one of --sparsity, --max-macs and --max-params. Criteria that look at data are for the library.
    """
    from secateur.artifacts import save
    from secateur.naming import example_inputs, named_model
    from secateur.pruning import prune as pruned_by
    from secateur.targets import Target

    _check_suffix(out)
    target = Target(
        sparsity=sparsity,
        max_macs=_limit(max_macs, "--max-macs"),
        max_params=_limit(max_params, "--max-params"),
        of=tuple(params_of) or None,
    )
    net, inputs = named_model(model, seed), example_inputs(shapes, seed)
    if checkpoint is not None:
        _load_weights_(net, checkpoint)
    else:
        typer.echo("Note: no --checkpoint was given, so the weights are fresh, not trained.", err=True)
    pruned = pruned_by(
        net,
        inputs,
        criterion=criterion,
        target=target,
        scope=scope,
        round_to=round_to,
        ignore=ignore,
        prune_residual=prune_residual,
        seed=seed,
    )
    show(_widths_table(pruned.plan, model))
    _show_summary(pruned)
    if out is not None:
        save(pruned, out)
        show(f"Saved to {out}. Load it with secateur.load({str(out)!r}, model).")


@app.command()
def measure(
    model: Model,
    *,
    artifact: Annotated[
        Path | None, typer.Option(help="A pruned version of the model to measure against it (saved by `prune`).")
    ] = None,
    runtime: Annotated[list[str], typer.Option(help="Where to run it; may be repeated.")] = ["eager"],  # noqa: B006
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time to spend per model and runtime.")] = 1.0,
    shapes: Shapes = ONE_IMAGE,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Measure how long a model takes, and with --artifact how much faster its pruned version is."""
    from secateur.artifacts import load
    from secateur.measuring import count
    from secateur.measuring import measure as measured
    from secateur.naming import example_inputs, named_model

    net, inputs = named_model(model, seed), example_inputs(shapes, seed)
    small = net if artifact is None else load(artifact, net)
    if artifact is not None:
        show(f"dense:  {count(net, inputs)}")
        show(f"pruned: {count(small, inputs)}")
    else:
        show(str(count(net, inputs)))
    baseline = None if artifact is None else net
    show(str(measured(small, inputs, runtime, baseline=baseline, threads=threads, seconds=seconds)))


@app.command()
def export(
    model: Model,
    *,
    out: Annotated[Path, typer.Option(help="The file to write: .pt2 (PyTorch) or .onnx.")],
    artifact: Annotated[
        Path | None, typer.Option(help="The pruned version of the model to export (saved by `prune`).")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Trained weights of the dense model (.safetensors).")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Difference to allow, relative to the largest output.", show_default="by its ops"),
    ] = None,
    shapes: Shapes = ONE_IMAGE,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Write a model, or with --artifact its pruned version, for other programs to run, and check what was written.

    The batch size stays open, and so does the length of sequences, wherever the model allows.
    """
    from secateur.artifacts import load
    from secateur.exporting import export as exported
    from secateur.naming import example_inputs, named_model

    if artifact is not None and checkpoint is not None:
        raise InputError("--artifact brings its own weights: leave out --checkpoint.")
    net, inputs = named_model(model, seed), example_inputs(shapes, seed)
    if artifact is not None:
        net = load(artifact, net)
    elif checkpoint is not None:
        _load_weights_(net, checkpoint)
    else:
        typer.echo(
            "Note: no --artifact and no --checkpoint was given, so the weights are fresh, not trained.", err=True
        )
    show(str(exported(net, inputs, out, tolerance=tolerance)))


@app.command()
def criteria(debug: Debug = False) -> None:
    """List every criterion: what it prunes, what it needs and costs, and where it comes from."""
    from rich.table import Table

    from secateur.catalogue import catalogue

    table = Table("name", "prunes", "needs", "cost", "what is kept", "source", box=box())
    for entry in catalogue():
        table.add_row(entry.name, entry.prunes, entry.needs, entry.cost, entry.meaning, entry.source)
    show(table)


def main() -> None:
    """The entry point of the `secateur` command."""
    app()


def _limit(text: str | None, option: str) -> int | float | None:
    """A limit as Target takes it: a whole number is absolute, anything with a point a fraction."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"{option} is a fraction such as 0.5 or a whole number such as 20000000; got {text!r}."
        ) from None


def _check_suffix(out: Path | None) -> None:
    if out is not None and out.suffix != ".safetensors":
        raise InputError(f"--out is a .safetensors file, the one format that is saved; got {str(out)!r}.")


def _load_weights_(net: Any, path: Path) -> None:
    """Put the tensors of a safetensors file into the model."""
    from secateur.plans import check_shapes, tensor_shapes
    from secateur.tensorfiles import read_header, read_tensors

    _, entries = read_header(path)
    given = {name: entry.shape for name, entry in entries.items()}
    kept = net.state_dict().keys()
    wanted = {name: shape for name, shape in tensor_shapes(net).items() if name in kept}
    check_shapes(given, wanted, f"the checkpoint {path}", "the model")
    net.load_state_dict(read_tensors(path), strict=False)  # what is missing is tied to something that is there


def _groups_table(graph: Graph, title: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("group", title=escape(title), title_justify="left", box=box())
    table.add_column("channels", justify="right")
    table.add_column("layers", justify="right")
    table.add_column("locked because", ratio=1)
    for group in graph.groups:
        table.add_row(escape(group.name), f"{group.channels:,}", str(len(group.layers)), escape(group.locked or ""))
    return table


def _widths_table(plan: Plan, title: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("layer", title=escape(title), title_justify="left", box=box())
    for head in ("before", "after", "kept"):
        table.add_column(head, justify="right")
    for row in plan.widths:
        table.add_row(escape(row.layer), f"{row.before:,}", f"{row.after:,}", f"{row.after / row.before:.0%}")
    return table


def _show_summary(pruned: Pruned) -> None:
    summary = pruned.summary
    for name, (before, after) in (("params", summary.params), ("MACs", summary.macs)):
        show(f"{name:<9} {before:>14,} -> {after:>14,}  ({after / before:.1%} kept)")
    show(f"criterion {summary.criterion}")
    show(
        f"verified: differs from the original with those channels zeroed by {summary.verified_difference:.1e} at most."
    )
