"""Can the comparison be trusted? One verdict per cell and check, each with a sentence, and what a study is missing.

The checks follow the tuning playbook (equal budgets, best values inside their ranges, runs that had converged) and
Choi et al. (2019): an optimizer that contains another must not lose to it. K-FAC contains SGD only in the limit of
large damping, and only with settings that few studies have; without them, losing says nothing about its tuning.

A study that was tuned for the time to a target asks, instead of whether runs had converged, whether they got there.

Convergence and over-fitting are judged on the confirmed runs of a cell's best configuration, or else on its best trial.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, inf, isinf, isnan, sqrt
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from lbstudy.analysis import load, stats
from lbstudy.analysis.tables.best import accuracy_by_repeat, best_trials, count_statuses, edges, winners
from lbstudy.analysis.tables.published import SAME, published_table
from lbstudy.analysis.tables.targets import speed_ratio, tuned_target, winners_times
from lbstudy.records.folder import StudyFolder
from lbstudy.study.spec import Cell, StudySpec

DIVERGED_SHARE = 0.5
"""From this share of diverged trials on, a cell's budget has gone into finding where training breaks."""

TAIL = 0.1
"""The end of a run: its last tenth, at least two epochs."""

NOISE_WINDOWS, LEAST_WINDOWS = 6, 5
"""Over so many times that length before the end the noise of a run's last gain is found, and over how many at least."""

OVERFIT_RISE = 0.1
"""Over-fitting: the validation loss ends this much above its minimum, relatively, while the training loss falls."""

LEARNT = 0.05
"""A run that ends less than this share of the way from guessing to perfect has not learnt."""

LARGE_DAMPING = 1e4
"""From here on K-FAC counts as SGD: on LeNet-5 and the digits its step differs from SGD's by 5 % or less (`pi`)."""


class Finding(NamedTuple):
    """The outcome of one check."""

    verdict: Literal["ok", "warning", "cannot tell"]
    sentence: str


def health_table(folder: StudyFolder) -> pd.DataFrame:
    """A row per cell and check: `cell`, its further factors, `check`, `verdict` (ok, warning, cannot tell) and a
    `sentence` for readers."""
    folder = load.Snapshot.of(folder)
    study, trials, confirmed = folder.study(), load.trials(folder), load.confirmed(folder)
    best = best_trials(study, trials).set_index("cell")
    curves, goal = best_curves(folder, best, confirmed), tuned_target(study)
    times = winners_times(confirmed, load.confirmed_epochs(folder), goal) if goal else None
    published = published_table(folder)
    others, rows = published[published["note"] != SAME], []
    for part, cell in [(variant, cell) for variant in study.variants() for cell in variant.list_cells()]:
        series = curves[curves["cell"] == cell.name]
        findings = {
            "budget": budget(study, count_statuses(trials, cell.name)),
            "divergence": divergence(count_statuses(trials, cell.name), count_statuses(winners(confirmed), cell.name)),
            "edge": edge(folder, part, cell, best),
            **(
                {"pruning": pruning(study, cell, trials, best), "convergence": convergence(series, study.tuning.metric)}
                if times is None
                else {"target": reaches_target(study, cell, best, times)}
            ),
            "learning": learning(series, folder.of_data("classes")),
            "over-fitting": over_fitting(series),
        }
        of_cell = others[(others[[*cell.values]] == pd.Series(cell.values)).all(axis=1)]
        if times is None and len(of_cell):
            findings["published"] = against_published(of_cell)
        if cell.optimizer == "kfac":
            findings["against SGD"] = special_case(part, cell, best, confirmed, times)
        key = {"cell": cell.name, **dict(cell.factors)}
        rows += [{**key, "check": check, **found._asdict()} for check, found in findings.items()]
    return pd.DataFrame(rows, columns=["cell", *study.factors, "check", "verdict", "sentence"])


def best_curves(folder: StudyFolder, best: pd.DataFrame, confirmed: pd.DataFrame) -> pd.DataFrame:
    """Epochs of each cell's best configuration: `cell`, `number`, `epoch`, `train_loss`, `val_loss`, `val_accuracy`.

    Those of its completed confirmed runs, with the training loss on clean images, if they kept the validation split
    apart; else those of its best trial, with the training loss as it was optimised.
    """
    columns = ["cell", "number", "epoch", "train_loss", "val_loss", "val_accuracy"]
    runs = winners(confirmed)
    runs = runs[(runs["status"] == "completed") & (runs["train_on"] != "all")]
    epochs = load.confirmed_epochs(folder).merge(runs[["cell", "number"]])
    epochs["train_loss"] = epochs["clean_train_loss"]
    numbers = best.loc[~best.index.isin(epochs["cell"]), "number"]
    series = {
        (record.cell, record.number): folder.epochs(record)
        for record in load.records(folder).sound
        if record.number == numbers.get(record.cell) and len(folder.epochs(record)) == record.epochs
    }
    rows = [{"cell": cell, "number": n} | report for (cell, n), reports in series.items() for report in reports]
    trial_epochs = pd.DataFrame(rows).reindex(columns=columns)
    return pd.concat([frame for frame in (epochs[columns], trial_epochs) if len(frame)] or [trial_epochs])


def budget(study: StudySpec, trials: dict[str, int]) -> Finding:
    """Whether a cell has had its trials; `trials` as `count_statuses` counts them."""
    ended, planned = trials["ended"], study.tuning.trials
    if ended == planned:
        return Finding("ok", f"All {planned} trials have ended.")
    return Finding("warning", f"{ended} of {planned} trials have ended: not yet a fair comparison.")


def divergence(trials: dict[str, int], confirmed: dict[str, int]) -> Finding:
    """Whether too many trials diverged, or any confirmed run."""
    diverged, ended = trials["diverged"], trials["ended"]
    if not ended:
        return Finding("cannot tell", "No trial has ended.")
    sentence = f"{diverged} of {ended} trials diverged"
    if confirmed["diverged"]:
        runs = confirmed["ended"] + confirmed["running"]
        sentence += f", and {confirmed['diverged']} of {runs} confirmed runs, which are in no mean"
        return Finding("warning", f"{sentence}: the best configuration is not stable.")
    if diverged == ended:
        return Finding("warning", f"{sentence}: there is no result; lower the learning rates.")
    if diverged >= DIVERGED_SHARE * ended:
        return Finding("warning", f"{sentence}: much of the budget; narrow the ranges.")
    return Finding("ok", f"{sentence}.")


def edge(folder: StudyFolder, study: StudySpec, cell: Cell, best: pd.DataFrame) -> Finding:
    """Whether a best value lies at an end of its range, and a better one may lie outside (`tables.best.edges`)."""
    if cell.name not in best.index:
        return Finding("cannot tell", "No trial has completed.")
    values = {name: float(best.at[cell.name, f"params.{name}"]) for name in study.ranges(cell)}  # type: ignore[arg-type]
    at_end = {
        name: f"{name} {value:.4g} (the {end} end of {study.ranges(cell)[name]})"
        for name, value in values.items()
        if (end := study.ranges(cell)[name].edge(value))
    }
    if open_ended := [at_end[name] for name in edges(folder, cell)]:
        return Finding("warning", f"The best value may lie outside the range: {', '.join(open_ended)}.")
    if at_end:
        level = "a trial in the middle half is as good, within one standard error of the validation accuracy"
        return Finding("ok", f"The best value lies at an end, but {level}: {', '.join(at_end.values())}.")
    return Finding("ok", "The best values lie inside their ranges.")


def pruning(study: StudySpec, cell: Cell, trials: pd.DataFrame, best: pd.DataFrame) -> Finding:
    """Whether a pruned trial stood higher than the one that was chosen, the best of those that completed, ended."""
    if cell.name not in best.index:
        return Finding("cannot tell", "No trial has completed.")
    metric, sign = study.tuning.metric, 1 if study.tuning.direction == "maximize" else -1
    chosen = best.loc[cell.name]
    pruned = trials[(trials["cell"] == cell.name) & (trials["status"] == "pruned")]
    ahead = pruned[sign * (pruned[metric] - chosen[metric]) > 0]
    if ahead.empty:
        return Finding("ok", f"None of {len(pruned)} pruned trials stood higher than the chosen one ended.")
    first = ahead.sort_values(metric, ascending=sign < 0).iloc[0]
    which = ", a published one among them," if ahead["published"].astype(bool).any() else ""
    return Finding(
        "warning",
        f"{len(ahead)} of {len(pruned)} pruned trials{which} stood higher when they were pruned than the chosen one "
        f"ended: {metric} {first[metric]:.4g} at epoch {first['epochs']} against {chosen[metric]:.4g} at epoch "
        f"{chosen['epochs']}. Whether one would have ended better, or over-fitted, a longer grace period or no pruner "
        "would tell.",
    )


def convergence(curves: pd.DataFrame, metric: str) -> Finding:
    """Whether the validation metric was still improving when the runs ended: by more than twice the noise.

    Of runs of 10 to 150 epochs that do not improve, 1 to 4 % are called improving, whether their noise is white or
    correlated from epoch to epoch (autoregressive, 0.7 and 0.9); with fewer epochs it would be up to 12 %.
    """
    sign = 1 if metric == "val_accuracy" else -1
    series = [sign * run.sort_values("epoch")[metric].to_numpy(float) for _, run in curves.groupby(["cell", "number"])]
    series = [
        values for values in series if len(values) >= LEAST_WINDOWS * _window(len(values)) and np.isfinite(values).all()
    ]
    if not series:
        return Finding("cannot tell", f"There is no run with {metric} over at least ten epochs.")
    gain, error = final_gain(series)
    changed = f"{metric} got {abs(gain):.2g} {'better' if gain >= 0 else 'worse'} over the last epochs"
    noisy = f"(noise {error:.2g}, n = {len(series)})"
    if gain > 2 * error and gain > 1e-9:  # what rounding leaves of a constant is no gain
        return Finding(
            "warning", f"Still improving at the end: {changed} {noisy}; a longer budget may change the order."
        )
    return Finding("ok", f"Not improving at the end: {changed} {noisy}.")


def learning(curves: pd.DataFrame, classes: int | None) -> Finding:
    """Whether all runs end better than guessing one of so many classes: some seeds may never leave it."""
    ends = curves.sort_values("epoch").groupby(["cell", "number"])["val_accuracy"].last().dropna()
    if classes is None or ends.empty:
        return Finding("cannot tell", "No run has ended." if ends.empty else "The number of classes is not known.")
    guess = 1 / classes
    lost = ends[ends < guess + LEARNT * (1 - guess)]
    if lost.empty:
        return Finding("ok", f"All {len(ends)} runs have learnt: {ends.min():.3g} and more; guessing has {guess:.2g}.")
    return Finding(
        "warning",
        f"{len(lost)} of {len(ends)} runs of the best configuration have hardly learnt: a validation accuracy of "
        f"{lost.min():.3g}, where guessing has {guess:.2g}.",
    )


def reaches_target(study: StudySpec, cell: Cell, best: pd.DataFrame, times: pd.DataFrame) -> Finding:
    """Whether a cell's best configuration gets to the target that the study was tuned for.

    Args:
        study: the study.
        cell: the cell.
        best: the best trials, by cell.
        times: `targets.winners_times` of the study's target.
    """
    goal, metric = study.tuning.goal, study.tuning.metric
    if cell.name not in best.index:
        return Finding("cannot tell", "No trial has completed.")
    time, nearest = (float(best.at[cell.name, name]) for name in (metric, "nearest"))  # type: ignore[arg-type]
    if isinf(time):
        sentence = f"No trial has reached {goal}: the best one came to {nearest:.3g}"
        return Finding("warning", f"{sentence}; lengthen the budget, widen the ranges or take a nearer target.")
    runs = times.loc[times["cell"] == cell.name, "steps"]
    reached = int((runs < inf).sum())
    sentence = f"The best trial has reached {goal} after {time:.4g} {metric.partition('_')[0]}"
    if reached < len(runs):
        return Finding("warning", f"{sentence}, but of {len(runs)} confirmed runs {reached} have within the budget.")
    return Finding("ok", f"{sentence}" + (f", and all {len(runs)} confirmed runs have." if len(runs) else "."))


def final_gain(series: list[np.ndarray]) -> tuple[float, float]:
    """How much runs gained at their end, and the standard error of it from what such gains vary by.

    A run's gain is the mean of its last tenth of epochs (w of them, at least two) minus the mean of the w before. The
    gains over the same 2 w epochs that end earlier, within the last 6 w, tell its noise: their standard deviation about
    their mean is large where noise is correlated over epochs, which the differences of successive epochs do not show,
    and a steady trend leaves it alone. The mean gain of R runs has the standard error rms(deviation) / sqrt(R).
    """
    gains, variances = [], []
    for values in series:
        w = _window(len(values))
        means = np.convolve(values[-NOISE_WINDOWS * w :], np.ones(w) / w, mode="valid")
        differences = means[w:] - means[:-w]
        gains.append(differences[-1])
        variances.append(differences.var(ddof=1))
    return float(np.mean(gains)), sqrt(np.mean(variances) / len(series))


def over_fitting(curves: pd.DataFrame) -> Finding:
    """Whether, in most runs, the validation loss has risen from its minimum while the training loss went on falling."""
    rises, falling, window = [], [], 0
    for _, run in curves.groupby(["cell", "number"]):
        run, window = run.sort_values("epoch"), _window(len(run))
        smooth = run[["val_loss", "train_loss"]].astype(float).rolling(window).mean().dropna()
        if len(smooth) < 2:
            continue
        lowest = smooth["val_loss"].to_numpy().argmin()
        rises.append(smooth["val_loss"].iloc[-1] / smooth["val_loss"].iloc[lowest] - 1)
        falling.append(smooth["train_loss"].iloc[-1] < smooth["train_loss"].iloc[lowest])
    if not rises:
        return Finding("cannot tell", "There is no run with validation and training loss over several epochs.")
    how = f"running means of {window} epochs; median, n = {len(rises)}"
    risen = f"the validation loss ends {100 * np.median(rises):.0f} % above its minimum ({how})"
    if np.median(np.where(falling, rises, 0)) > OVERFIT_RISE:
        return Finding("warning", f"Over-fitting: {risen}, while the training loss falls.")
    why = ", but the training loss does not fall meanwhile" if np.median(rises) > OVERFIT_RISE else ""
    return Finding("ok", f"No over-fitting: {risen}{why}.")


def against_published(rows: pd.DataFrame) -> Finding:
    """Whether tuning has found something as good as what the literature says; rows of `published_table`, of one cell,
    but the cell's best configuration."""
    strongest = rows.sort_values("tuning_adds").iloc[0]
    value, low, high = (100 * float(strongest[f"tuning_adds{end}"]) for end in ("", "_low", "_high"))
    points = f"The best configuration against the literature's: {value:+.2f} points of test accuracy"
    if isnan(low):
        return Finding("cannot tell", f"{points}; one seed has no interval.")
    points += f" [{low:.2f}, {high:.2f}], n = {int(strongest['n'])}."
    if high >= 0:
        return Finding("ok", points)
    choice = "Tuning, or its pruner, has chosen the worse one, and what is said of this cell is said of that choice."
    return Finding("warning", f"{points} {choice}")


def special_case(
    study: StudySpec, cell: Cell, best: pd.DataFrame, confirmed: pd.DataFrame, times: pd.DataFrame | None = None
) -> Finding:
    """Whether K-FAC loses to SGD, all other factors equal, and whether it could have been SGD.

    Args:
        study: the variant.
        cell: K-FAC's cell.
        best: the best trials, by cell.
        confirmed: `load.confirmed`.
        times: of a study that was tuned for a target, `targets.winners_times` of it: what they lose in then.
    """
    other = cell.but(optimizer="sgd")
    if other not in study.list_cells():
        return Finding("cannot tell", f"The study has no cell {other.name} to compare with.")
    if times is not None:
        return _slower(study, cell, other, best, times)
    lead = stats.paired_difference(accuracy_by_repeat(confirmed, cell.name), accuracy_by_repeat(confirmed, other.name))
    if lead.n >= 2:
        if isnan(lead.low):
            same = f"{100 * lead.value:+.2f} points of test accuracy with each of {lead.n} seeds"
            return Finding("cannot tell", f"K-FAC against SGD: {same}; equal differences have no interval.")
        interval = f"[{100 * lead.low:.2f}, {100 * lead.high:.2f}]"
        points = f"{100 * lead.value:+.2f} points of test accuracy {interval}, n = {lead.n}"
        if lead.high >= 0:
            return Finding("ok", f"K-FAC against SGD: {points}.")
        return _behind(points, apart_from_sgd(study, cell, other, best))
    metric = study.tuning.metric
    if not {cell.name, other.name} <= {*best.index}:
        return Finding("cannot tell", f"{cell.name} or {other.name} has no completed trial.")
    own, others = (float(best.at[name, metric]) for name in (cell.name, other.name))  # type: ignore[arg-type]
    return Finding(
        "cannot tell",
        f"Best {metric} {own:.4g} against {others:.4g} of SGD; two confirmed seeds would tell whether K-FAC loses.",
    )


def _behind(by: str, differences: list[str]) -> Finding:
    """What it means that K-FAC is behind SGD by so much, with what keeps its cell from SGD's best configuration."""
    if differences:
        why = f"the cell cannot become SGD, for {'; '.join(differences)}"
        return Finding("warning", f"K-FAC is behind SGD: {by}. It may be under-tuned or worse: {why}.")
    return Finding(
        "warning",
        f"K-FAC loses to SGD: {by}. At damping {LARGE_DAMPING:g} and as many times the learning rate it would "
        "nearly be SGD's best configuration, which lies within its ranges: a sign of too little tuning.",
    )


def _slower(study: StudySpec, cell: Cell, other: Cell, best: pd.DataFrame, times: pd.DataFrame) -> Finding:
    """Whether K-FAC needs more steps than SGD to the target that both were tuned for."""
    if study.tuning.metric == "seconds_to_target":
        return Finding(
            "cannot tell", "A step of K-FAC takes longer, so that in seconds it may lose however it is tuned."
        )
    own, sgd = (times[times["cell"] == name.name].set_index("repeat") for name in (cell, other))
    if min(len(own), len(sgd)) < 2 or not np.isfinite([*own["epochs"], *sgd["epochs"]]).all():
        return Finding(
            "cannot tell", "Two confirmed seeds of both that reach the target would tell whether K-FAC loses."
        )
    ratio = speed_ratio(own["epochs"], sgd["epochs"], own["epochs_low"], sgd["epochs_low"])
    value, low, high = (stats.written(number, 2) for number in (ratio.value, ratio.low, ratio.high))
    steps = f"{value} times SGD's steps to the target [{low}, {high}], n = {ratio.n}"
    if ratio.low <= 1:
        return Finding("ok", f"K-FAC against SGD: {steps}.")
    return _behind(steps, apart_from_sgd(study, cell, other, best))


def apart_from_sgd(study: StudySpec, kfac: Cell, sgd: Cell, best: pd.DataFrame) -> list[str]:
    """What keeps K-FAC's cell from SGD's best configuration; empty if it holds it, at a damping of LARGE_DAMPING.

    The limit of large damping is SGD with the rate divided by the damping if nothing clips the step, weight decay is
    preconditioned with the gradient, and every parameter is.
    """
    tuned, fixed = study.ranges(kfac), study.fixed
    reasons = []
    settings = fixed.settings.get("kfac", {})
    if "kl_clip" in tuned or "kl_clip" in fixed.numbers:
        reasons.append("kl_clip shortens its steps")
    decays = "weight_decay" in tuned or fixed.numbers.get("weight_decay", 0) > 0
    if settings.get("weight_decay", "plain") == "plain" and decays:
        reasons.append("weight decay is not preconditioned")
    if settings.get("batch_norm") == "plain":
        reasons.append("batch norm is not preconditioned")
    needed = {name: float(best.at[sgd.name, f"params.{name}"]) for name in study.ranges(sgd)}  # type: ignore[arg-type]
    needed.setdefault("learning_rate", float(fixed.numbers.get("learning_rate", 0.0)))
    needed = needed | {"damping": LARGE_DAMPING, "learning_rate": LARGE_DAMPING * needed["learning_rate"]}
    absent = [
        f"{name} {value:.3g}"
        for name, value in needed.items()
        if not (tuned[name].contains(value) if name in tuned else fixed.numbers.get(name) == value)
    ]
    return [*reasons, f"its ranges lack {', '.join(absent)}"] if absent else reasons


def list_missing(study: StudySpec, trials: pd.DataFrame, confirmed: pd.DataFrame) -> list[str]:
    """What a study lacks for the comparison, a sentence each; nothing if all is there."""
    cells, runs = study.list_cells(), winners(confirmed)
    ended = sum(count_statuses(trials, cell.name)["ended"] for cell in cells)
    missing = []
    if ended < len(cells) * study.tuning.trials:
        missing.append(f"{ended} of {len(cells) * study.tuning.trials} trials have ended; `lbstudy run` goes on.")
    tuned = []
    for cell in cells:
        counts = count_statuses(trials, cell.name)
        if counts["completed"]:
            tuned.append(cell.name)
        elif counts["ended"]:
            missing.append(
                f"{cell.name} has no result: of {counts['ended']} trials none completed, {counts['pruned']} "
                f"were pruned and {counts['diverged']} diverged."
            )
    completed = [len(accuracy_by_repeat(confirmed, name)) for name in tuned]
    unconfirmed = [name for name, count in zip(tuned, completed, strict=True) if not count]
    if tuned and len(unconfirmed) == len(tuned) and runs.empty:
        missing.append("Nothing has been confirmed, so there is no test accuracy; `lbstudy confirm` brings it.")
    elif unconfirmed:
        missing.append(f"No completed confirmed run of the best configuration: {', '.join(unconfirmed)}.")
    begun = {name: int((runs["cell"] == name).sum()) for name in tuned}
    most = max(begun.values(), default=0)
    fewer = [f"{name} has {count} of {most} confirmed runs; `lbstudy confirm` goes on." for name, count in begun.items()
             if 0 < count < most]  # fmt: skip
    missing += [*fewer, *_fewer_published(study, trials, confirmed, most)]
    if completed and max(completed) == 1:
        missing.append("One seed a cell: there are no intervals, and no difference can be told from noise.")
    missing += [_lost_runs(count_statuses(runs, cell.name), cell.name) for cell in cells]
    return [sentence for sentence in missing if sentence]


def _fewer_published(study: StudySpec, trials: pd.DataFrame, confirmed: pd.DataFrame, most: int) -> Iterator[str]:
    """Published configurations that have fewer confirmed runs than the best ones, once others have been confirmed."""
    runs, best = confirmed[confirmed["published"].astype(bool)], best_trials(study, trials)
    top = confirmed.drop(runs.index)["rank"].max()  # `confirm --top` has these too
    if not (runs["rank"].isna() | (runs["rank"] > (0 if pd.isna(top) else top))).any():
        return
    chosen = set(zip(best["cell"], best["number"], strict=True))
    for cell, trial in trials.loc[trials["published"].astype(bool), ["cell", "number"]].itertuples(index=False):
        own = runs[(runs["cell"] == cell) & (runs["trial"] == trial)]
        if len(own) < most and (cell, trial) not in chosen:
            yield (
                f"A published configuration of {cell} has {len(own)} of {most} confirmed runs; "
                "`lbstudy confirm --published` goes on."
            )


def list_absent(study: StudySpec) -> list[str]:
    """Which of the sources' questions a study does not ask, in sentences."""
    cells, missing = study.list_cells(), list[str]()
    if len({cell.batch_size for cell in cells}) == 1:
        missing.append("One batch size: there is no gap between small and large batches.")
    smoothings = {cell.smoothing for cell in cells}
    if "none" not in smoothings:
        missing.append("No cell without smoothing: how much of a gap smoothing closes cannot be said.")
    elif smoothings == {"none"}:
        missing.append("No smoothing: nothing closes the gap.")
    if "kfac" not in {cell.optimizer for cell in cells}:
        missing.append("No K-FAC: nothing can be said about second-order optimisation.")
    return missing


def _lost_runs(counts: dict[str, int], cell: str) -> str:
    kinds = [f"{counts[status]} {word}" for status, word in LOST.items() if counts[status]]
    return f"{cell}: of its confirmed runs {', '.join(kinds)}." if kinds else ""


LOST = {"diverged": "diverged", "failed": "failed", "running": "not ended"}


def _window(epochs: int) -> int:
    return max(2, ceil(TAIL * epochs))
