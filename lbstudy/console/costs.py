"""What `lbstudy plan --measure` says: what the runs of a study cost here, and what of it the study costs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer

from lbstudy.console.interrupt import Interrupted, interruptible
from lbstudy.console.progress import TaskProgress
from lbstudy.console.session import err, in_lanes, notice, on_ray, require_room
from lbstudy.console.terminal import out, print_table
from lbstudy.study.file import StudyError
from lbstudy.study.spec import StudySpec

if TYPE_CHECKING:
    from lbstudy.training.datasets import Datasets
    from lbstudy.tuning.measure import Measured
    from lbstudy.tuning.tuner import Plan


def print_costs(
    study: StudySpec, images: Datasets, address: str | None, price: float | None, seeds: int, verbose: bool
) -> None:
    """Measure what the study's runs cost, and print what the study does.

    Raises:
        StudyError: a run has failed, so that not all costs are known.
        typer.Exit: Ctrl-C or SIGTERM.
    """
    require_room(study, address)
    found: list[tuple[Plan, Measured]] = []
    began = time.monotonic()

    def work() -> None:
        from lbstudy.tuning import doctor, measure, tuner

        doctor.clean_up(notice)
        planned = tuner.plan_when_there_is_room(study, images, notice)
        count = len(measure.kinds(planned.study))
        err.print(f"measuring {count} kinds of runs on {in_lanes(planned.lanes)}; nothing is kept")
        with TaskProgress("measured", count, err) as progress:
            found.append((planned, measure.measure(planned, began, progress.advance, notice, verbose)))

    try:
        with interruptible():
            on_ray(work, verbose=verbose)
    except Interrupted as interrupted:
        err.print(f"interrupted by {interrupted}; nothing was kept")
        raise typer.Exit(interrupted.exit_code) from interrupted
    print_measured(*found[0], price, seeds)


def print_measured(plan: Plan, measured: Measured, price: float | None, seeds: int) -> None:
    """Print what the study costs by what was measured, and what confirming it with so many seeds costs.

    Raises:
        StudyError: a run has failed, so that not all costs are known.
    """
    import pandas as pd

    from lbstudy.analysis.stats import written
    from lbstudy.analysis.tables.cost import duration
    from lbstudy.tuning import doctor, measure
    from lbstudy.tuning.confirm import repeated
    from lbstudy.tuning.forecast import forecast

    if measured.failed:
        reasons = {name: (text.strip().splitlines() or ["no reason"])[-1] for name, text in measured.failed.items()}
        raise StudyError("\n".join(f"{name} has failed: {reason}" for name, reason in reasons.items()))
    study, costs = plan.study, measured.costs
    extents = {cell.name: measure.extent_of(plan, cell) for cell in study.list_cells()}
    lengths = {name: extent.steps / extent.steps_per_pass for name, extent in extents.items()}
    tuning = forecast(study, measured, lengths, plan.lanes)
    twice = forecast(repeated(study, seeds), measured, lengths, plan.lanes, confirmed=True)
    rows = [
        {
            "cell": name,
            "images_per_second": f"{cost.images_per_second:,.0f}",
            "first_epoch": _seconds(cost.first),
            "epoch": _seconds(cost.epoch),
            "confirmed_epoch": _seconds(cost.confirmed),
            "whole_trial": duration(cost.epoch * lengths[name]),
            "epochs_trained": f"{tuning.shares[name]:.0%}",
            "all_trials": duration(tuning.by_cell[name]),
            "confirmed_runs": duration(twice.by_cell[name]),
        }
        for name, cost in costs.items()
    ]
    resources = study.resources
    device = "GPU" if resources.gpus_per_worker else "CPU"
    per_lane = resources.workers * float(resources.gpus_per_worker or resources.cpus_per_worker)
    out.print()
    print_table(pd.DataFrame(rows), title=f"measured with {in_lanes(plan.lanes)} at work, each {measured.device}")
    for what, cost, lanes in (
        (f"tuning: {len(costs)} cells x {study.tuning.trials} trials", tuning, plan.lanes),
        (f"confirm --seeds {seeds}: {len(costs) * seeds} runs", twice, min(plan.lanes, len(costs) * seeds)),
    ):
        hours = cost.wall * lanes * per_lane / 3600
        money = "" if price is None else f", {hours * price:,.2f} at {price:g} an hour"
        out.print(
            f"{what}, {duration(cost.runs)} of training: about {duration(cost.wall)} on {in_lanes(lanes)}, "
            f"{written(hours, 3)} {device} hours{money}",
            highlight=False,
        )
    out.print(
        f"in this: {measured.starting:.0f} s until the lanes are up, {measured.between:.2g} s before each trial, and "
        f"what a first epoch takes more, once in each {'trial' if device == 'GPU' else 'lane'}",
        highlight=False,
    )
    if study.tuning.pruner != "none":
        out.print(RULE)
    if study.tuning.target is not None:
        out.print("trials end when they reach their target: what the tuning costs is the most that it can")
    if study.tuning.target == "auto":
        out.print("not in this: the tuning of the plain small batch, which the target is taken from")
    gpu = max(cost.device_memory for cost in costs.values())
    on_gpu = f", {doctor.size(gpu)} of its GPU" if gpu else ""
    out.print(f"memory: a worker takes up to {doctor.size(measured.memory)}{on_gpu}", highlight=False)
    disk = doctor.planned_bytes(study, plan.data, plan.lanes)
    out.print(f"disk: at most {doctor.size(disk)} for the tuning", highlight=False)


RULE = (
    "epochs trained: what ASHA is expected to leave, simulated with its own rule; trials come in random order of how "
    "good they are, and the better of two is so at every rung. Diverging trials cost less, a search that learns more"
)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"
