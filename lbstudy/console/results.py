"""The commands that look at a study: how far it is, its tables, figures and report. None needs torch or Ray."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated

import typer

from lbstudy.console.session import err
from lbstudy.console.terminal import out, print_table
from lbstudy.console.track import TrackerChoice, track_study
from lbstudy.console.watch import watch_study
from lbstudy.records.folder import StudyFolder
from lbstudy.storage import locate
from lbstudy.study.file import StudyError

results = typer.Typer()


class TableFormat(StrEnum):
    """How `best` and `table` print."""

    table = "table"
    csv = "csv"
    json = "json"
    markdown = "markdown"
    latex = "latex"


class TableKind(StrEnum):
    """What `table` shows."""

    published = "published"
    gap = "gap"
    parts = "split"  # `split` is a method of every text
    targets = "targets"
    critical = "critical"
    health = "health"
    sharpness = "sharpness"
    correlations = "correlations"
    noise = "noise"


class ComparedTable(StrEnum):
    """What `compare` shows."""

    best = "best"
    gap = "gap"
    targets = "targets"
    claims = "claims"


class FigureFormat(StrEnum):
    """What `figures` writes."""

    svg = "svg"
    png = "png"
    pdf = "pdf"


Folder = Annotated[str, typer.Argument(help="a study's folder, or its address in an object store", metavar="STUDY")]


@results.command()
def status(study: Folder) -> None:
    """How far each cell of a study has come, what is running, how fast, what is left, and what it has cost so far."""
    from lbstudy.analysis import load
    from lbstudy.analysis.tables import best as tables
    from lbstudy.analysis.tables import cost

    folder = load.Snapshot(StudyFolder.open(study))
    found = tables.progress(folder)
    print_table(tables.for_reading(found), title=folder.study().name)
    for sentence in cost.sentences(cost.standing(folder)):
        out.print(sentence, highlight=False, soft_wrap=True)
    _tell(found.attrs["damaged"])


@results.command()
def watch(
    study: Folder,
    interval: Annotated[int, typer.Option(min=1, metavar="SECONDS", help="from one page to the next; longer where a "
        "page takes long to make")] = 60,
) -> None:  # fmt: skip
    """Write a study's report again and again while it runs, until it is complete or Ctrl-C ends it."""
    watch_study(StudyFolder.open(study), interval)


@results.command()
def best(
    study: Folder, format: Annotated[TableFormat, typer.Option(help="how to print it")] = TableFormat.table
) -> None:
    """The best configuration of each cell."""
    print_best(StudyFolder.open(study), format)


@results.command()
def table(
    study: Folder,
    kind: Annotated[TableKind, typer.Argument(help="published: what configurations from the literature "
                                              "reach; gap: small against large batch; split: how much of it is "
                                              "few updates, and how much less noise; targets: time to reach a loss "
                                              "and an accuracy; critical: how far these fall with the batch "
                                              "size; health: can the comparison be trusted; sharpness: how "
                                              "sharp the minima are, and their test accuracy; correlations: of both; "
                                              "noise: gradient noise scales at the solutions")],
    format: Annotated[TableFormat, typer.Option(help="how to print it")] = TableFormat.table,
    loss: Annotated[float | None, typer.Option(help="targets, critical: training loss; default: baseline's")] = None,
    accuracy: Annotated[float | None, typer.Option(help="targets, critical: validation accuracy, a fraction")] = None,
) -> None:  # fmt: skip
    """Compare the cells of a study, by their confirmed runs."""
    if kind not in (TableKind.targets, TableKind.critical) and (loss is not None or accuracy is not None):
        raise StudyError(f"--loss and --accuracy are for the tables `targets` and `critical`, but got `{kind.value}`")
    import pandas as pd

    from lbstudy.analysis import load
    from lbstudy.analysis.minima import results
    from lbstudy.analysis.tables import best as tables
    from lbstudy.analysis.tables import critical, gaps, health, noise, published, split, targets
    from lbstudy.analysis.tables import minima as minima_table

    folder = load.Snapshot(StudyFolder.open(study))
    spec, trials = folder.study(), load.trials(folder)
    confirmed, epochs = load.confirmed(folder), load.confirmed_epochs(folder)
    if kind is TableKind.gap:
        found = gaps.gap_table(spec, confirmed)
    elif kind is TableKind.parts:
        found = split.split_table(spec, confirmed)
    elif kind in (TableKind.targets, TableKind.critical):
        goals = [
            (part, targets.choose_targets(spec.whole(part), confirmed, loss, accuracy)) for part in spec.variants()
        ]
        if kind is TableKind.targets:
            parts = [targets.targets_table(part, confirmed, epochs, of_part) for part, of_part in goals]
        else:
            tuning = critical.Tuning(trials, load.epochs(folder))
            parts = [critical.critical_table(part, confirmed, epochs, tuning, of_part) for part, of_part in goals]
        found = pd.concat(parts, ignore_index=True)
    elif kind is TableKind.published:
        found = published.published_table(folder)
    elif kind is TableKind.noise:
        found = noise.noise_table(spec, results.noise(folder))
    elif kind is TableKind.health:
        found = health.health_table(folder)
    else:
        sharpness, lines = results.sharpness(folder), results.landscape(folder, "line")
        minima = minima_table.runs(confirmed, sharpness, lines)
        found = minima_table.minima_table(spec, minima)
        if kind is TableKind.correlations:
            found = minima_table.correlations(found)
        elif format is TableFormat.table:
            found = minima_table.for_terminal(found)
        for sentence in (minima_table.WHICH_SIDE, *minima_table.list_left_out(minima, sharpness, lines)):
            err.print(sentence)
    if format is TableFormat.table:
        shown = tables.for_reading(found, digits=3)
        if len(shown):
            names = tables.short_names(found).values()
            print_table(shown.loc[:, (shown != "-").any()], title=f"{spec.name}: {kind.value}", names=names)
    else:
        print(tables.render(found, format.value))  # type: ignore[arg-type]
    if found.empty and kind is TableKind.published:
        how = "none has been confirmed; lbstudy confirm STUDY --published does that"
        err.print(f"published configurations: {how if spec.published else 'the study names none'}")
    absent = health.list_absent(spec) if kind is TableKind.gap else []
    _tell(health.list_missing(spec, trials, confirmed) + absent + load.list_damaged(trials, confirmed, epochs))


@results.command()
def compare(
    studies: Annotated[list[str], typer.Argument(help="folders of two studies or more", metavar="STUDY STUDY ...")],
    table: Annotated[ComparedTable, typer.Option(help="best: of each cell; gap: small against large batch; targets: "
        "time to each study's own; claims: the verdicts")] = ComparedTable.best,
    format: Annotated[TableFormat, typer.Option(help="how to print it")] = TableFormat.table,
    figure: Annotated[str | None, typer.Option(metavar="FILE", help="draw test accuracy against batch size, a line "
        "style per study; .svg, .png or .pdf")] = None,
) -> None:  # fmt: skip
    """Put several studies side by side: another model, other data, another seed."""
    from lbstudy.analysis.report import compare as comparison
    from lbstudy.analysis.tables import best as tables

    if figure is not None:
        comparison.require_figure(figure)
    compared = comparison.open_all(studies)
    found = comparison.compare(compared, table.value)
    for remark in comparison.remarks(compared):
        err.print(f"notice: {remark}")
    if format is TableFormat.table:
        best_ones = table is ComparedTable.best
        shown = tables.for_terminal(found) if best_ones else tables.for_reading(found, digits=3)
        names = ["study", *tables.short_names(found).values()]
        print_table(shown.loc[:, (shown != "-").any()], title=f"{table.value}: {len(compared)} studies", names=names)
    else:
        print(tables.render(found, format.value))  # type: ignore[arg-type]
    _tell(comparison.missing(compared))
    if figure is not None:
        err.print(f"figure: {comparison.write_figure(compared, figure)}")


@results.command()
def figures(
    study: Folder, format: Annotated[FigureFormat, typer.Option(help="of the files")] = FigureFormat.svg
) -> None:
    """Draw a study's figures into its folder; what cannot be drawn is named, with the reason."""
    from lbstudy.analysis.figures import all as figures

    for drawing, path in figures.write_all(StudyFolder.open(study), format.value):
        print(path if path else f"left out {drawing.name}: {drawing.reason}")


@results.command()
def report(study: Folder) -> None:
    """Write the study's report, one self-contained page: the answer, the evidence, and what is missing."""
    from lbstudy.analysis import load
    from lbstudy.analysis.report import page as report

    folder = load.Snapshot(StudyFolder.open(study))
    with err.status("drawing the figures"):
        path = report.write(folder)
    print(path)
    _tell_damaged(folder)


@results.command()
def export(
    study: Folder,
    to: Annotated[str | None, typer.Option(metavar="DIR", help="default: `export` in the study's folder")] = None,
) -> None:
    """Write all trials, epochs and confirmed runs as Parquet and CSV, with a dictionary of their columns."""
    from lbstudy.analysis import load
    from lbstudy.analysis.export import export as write

    folder = load.Snapshot(StudyFolder.open(study))
    for path in write(folder, locate(to) if to else folder.path / "export"):
        print(path)
    _tell_damaged(folder)


@results.command()
def track(
    study: Folder,
    to: Annotated[list[TrackerChoice] | None, typer.Option(help="a tracker; may be repeated; default: "
        "those that the study names")] = None,
) -> None:  # fmt: skip
    """Bring trackers up to date with a study's records. Run again, it tells them what is new, and nothing twice."""
    track_study(StudyFolder.open(study), to)


def print_best(folder: StudyFolder, style: TableFormat) -> None:
    """The best configuration of each cell, for a terminal or in a format."""
    from lbstudy.analysis.tables import best as tables

    configs = tables.best_configs(folder)
    _tell(configs.attrs["damaged"])
    if style is not TableFormat.table:
        print(tables.render(configs, style.value))  # type: ignore[arg-type]
        return
    study = folder.study()
    names = tables.short_names(configs).values()
    print_table(tables.for_terminal(configs), title=f"{study.name}: best configurations", names=names)
    out.print(f"c/p/d/f: completed, pruned, diverged, failed. {tables.budget_sentence(study, configs)}")
    if configs["edge"].any():
        out.print(
            "edge: the best value lies within 5 % of that end of its range, which is not known to be level there; "
            "consider a wider one."
        )


def _tell_damaged(folder: StudyFolder) -> None:
    """Which records of a study do not count."""
    from lbstudy.analysis import load

    _tell(load.list_damaged(load.trials(folder), load.confirmed(folder), load.confirmed_epochs(folder)))


def _tell(sentences: Iterable[str]) -> None:
    """What a table lacks, beside it, where it does not get into a file."""
    for sentence in sentences:
        err.print(f"missing: {sentence}")
