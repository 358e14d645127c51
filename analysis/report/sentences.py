"""Numbers of the tables in words, as the report says them: accuracies in percent, differences in points, intervals.

A row is one of the gap table as a dict, see `gaps.gap_table`, after `worded`.
"""

from __future__ import annotations

from math import isinf, isnan
from typing import Any

import pandas as pd

from lbstudy.analysis import stats
from lbstudy.analysis.tables.best import FAILED_SHARE
from lbstudy.analysis.tables.gaps import WEAK_NOTE
from lbstudy.study.factors import labels
from lbstudy.study.spec import StudySpec


def worded(row: dict[str, Any], study: StudySpec) -> dict[str, Any]:
    """A row of the gap table with its methods as sentences call them."""
    return row | {name: study.label(row[name]) for name in ("optimizer", "smoothing")}


def smoothed(label: str) -> str:
    """With or without a smoothing, by what sentences call it."""
    return "without smoothing" if label == "no smoothing" else f"with {label}"


def selected_sentence(study: StudySpec, configs: pd.DataFrame, of: str = "") -> str:
    """The cell that validation prefers at the largest batch size, and its test accuracy; `of`: which variant it is."""
    metric = study.tuning.metric
    largest = configs[configs["batch_size"].eq(configs["batch_size"].max()) & configs[metric].notna()]
    if largest.empty:
        return ""
    best_first = largest.sort_values(metric, ascending=study.tuning.direction == "minimize", kind="stable")
    row = best_first.iloc[0]
    value = f"{percent(row[metric])} %" if metric == "val_accuracy" else f"{row[metric]:.3g}"
    what = f"{metric.replace('val_', 'validation ')} {value}"
    if study.tuning.goal:
        unit = metric.partition("_")[0]
        what = f"{study.tuning.goal} " + ("not reached" if isinf(row[metric]) else f"after {row[metric]:.4g} {unit}")
    who = study.label(row["optimizer"]) + (f" ({of})" if of else "")
    sentence = (
        f"At batch {row['batch_size']} tuning did best {smoothed(study.label(row['smoothing']))} under {who}: "
        f"{what} in one trial"
    )
    if "test_accuracy" not in configs or isnan(row["test_accuracy"]):
        return f"{sentence}; its test accuracy is not known."
    interval = "" if isnan(row["test_low"]) else f" [{percent(row['test_low'])}, {percent(row['test_high'])}]"
    few = row["test_min"] < FAILED_SHARE * row["test_max"]
    runs = f"; single runs {percent(row['test_min'])} to {percent(row['test_max'])} %" if few else ""
    return (
        f"{sentence}, test accuracy {percent(row['test_accuracy'])} %{interval} when confirmed "
        f"({count(row['n'])}{runs})."
    )


def gap_sentence(row: dict[str, Any]) -> str:
    """What a larger batch costs, from a row of the gap table."""
    who = f"{row['optimizer']} {smoothed(row['smoothing'])}"
    way = f"From batch {row['small_batch']} to {row['large_batch']}, {who}"
    if isnan(row["gap"]):
        return f"{way}: no gap is known ({row['note'] or 'no common seeds'})."
    verb, ends = _lost(row["gap"], row["gap_low"], row["gap_high"])
    size = points(abs(row["gap"]))
    if isnan(row["gap_low"]):
        why = "with one seed, which has" if row["n"] == 1 else f"at each of {row['n']} seeds, which have"
        return f"{way} {verb} {size} points of test accuracy {why} no interval."
    if row["gap_low"] <= -1 and row["gap_high"] >= 1:  # no accuracies differ by more
        return f"{way} {verb} {size} points of test accuracy ({count(row['n'])}), with an interval that holds any gap."
    sentence = f"{way} {verb} {size} points of test accuracy [{ends}] ({count(row['n'])})"
    if row["gap_low"] <= 0 <= row["gap_high"]:
        shown = f"a gap of {points(row['resolvable'])} points" if row["resolvable"] < 1 else "no gap"
        sentence += f", which cannot be told from nothing: {shown} would be found four times in five"
    return f"{sentence}{_at_best_epoch(row)}."


def _at_best_epoch(row: dict[str, Any]) -> str:
    """What the gap is where each run is read at its best epoch, if that decides another thing than the last epoch."""
    stopped, low, high = (row[f"gap_at_best_epoch{end}"] for end in ("", "_low", "_high"))
    if isnan(low) or stats.side(low, high) == stats.side(row["gap_low"], row["gap_high"]):
        return ""
    verb, ends = _lost(stopped, low, high)
    known = "" if stats.side(low, high) else ", which cannot be told from nothing"
    return f"; read where its validation was best, it {verb} {points(abs(stopped))} [{ends}]{known}"


def _lost(gap: float, low: float, high: float) -> tuple[str, str]:
    """Whether a gap is a loss, and its interval as one of what was lost or gained."""
    ends = (low, high) if gap >= 0 else (-high, -low)
    return "lost" if gap >= 0 else "gained", ", ".join(map(points, ends))


def gaps_sentence(rows: list[dict[str, Any]], study: StudySpec) -> str:
    """What a larger batch costs an optimizer under several combinations of further factors, a row of the gap table
    each."""
    first = rows[0]
    low, high = (points(end(row["gap"] for row in rows)) for end in (min, max))
    keys = [name.replace("_", " ").replace(".", " ") for name in labels(study.factors).values()]
    return (
        f"From batch {first['small_batch']} to {first['large_batch']}, {first['optimizer']} without smoothing lost "
        f"{low} to {high} points of test accuracy in {len(rows)} combinations of {' and '.join(keys)}."
    )


def closed_sentence(rows: list[dict[str, Any]]) -> str:
    """How much of an optimizer's gap its smoothings close, from its rows of the gap table, which have shares."""
    first, *others = [(row["smoothing"], _share(row, "closed"), count(row["closed_n"])) for row in rows]
    what = f"{first[1]} of {_gap(rows[0])}" if rows[0]["closed"] >= 0 else f"none of {_gap(rows[0])}: {first[1]}"
    start = f"{capitalise(first[0])} closed {what} ({first[2]})"
    weak = f"; {WEAK_NOTE}" if any(WEAK_NOTE in row["note"] for row in rows) else ""
    return ", ".join([start, *(f"{name} {share} ({n})" for name, share, n in others)]) + f"{weak}."


def share_sentence(row: dict[str, Any]) -> str:
    """How much of the gap a smoothing takes away, in both senses, from a row of the gap table."""
    parts = {
        "closed": f"closed {_share(row, 'closed')} of {_gap(row)}",
        "narrowed": f"narrowed {_gap(row) if isnan(row['closed']) else 'it'} by {_share(row, 'narrowed')}",
    }
    known = [f"{words} ({count(row[f'{name}_n'])})" for name, words in parts.items() if not isnan(row[name])]
    if not known:
        who = f"{row['optimizer']} with {row['smoothing']}, batch {row['large_batch']}"
        return f"{who}: {row['note'] or 'no share is known'}."
    why = f"; {row['note']}" if row["note"] and (len(known) == 1 or WEAK_NOTE in row["note"]) else ""
    return f"{capitalise(row['smoothing'])} {' and '.join(known)}{why}."


def critical_sentence(row: dict[str, Any]) -> str:
    """How far an optimizer's steps to a target fall with the batch size, from a row of `critical.critical_table`."""
    who, limits = f"{row['optimizer']} {smoothed(row['smoothing'])}", _limits(row, "b_crit")
    if isnan(row["b_crit"]) and isnan(row["perfect_until"]):
        return f"{who}: no critical batch size is known ({row['note']})."
    if isnan(row["b_crit"]):
        first = f"{who}, batch {row['smallest_batch']} to {row['largest_batch']}: no critical batch size is known"
    elif row["b_crit"] > row["largest_batch"]:
        first = f"{who}: steps fall up to the largest batch, {row['largest_batch']}; B_crit is larger{limits}"
    elif row["b_crit"] < row["smallest_batch"]:
        first = (
            f"{who}: steps hardly fall from the smallest batch, {row['smallest_batch']}, on; B_crit is smaller{limits}"
        )
    else:
        fewest = f"the fewest (S_min, {_size(row['s_min'])})"
        first = f"{who}: B_crit is {_size(row['b_crit'])}{limits}, where steps are twice {fewest}"
    if isnan(row["perfect_until"]):
        second = "where perfect scaling ends is not known" + _limits(row, "perfect_until")
    elif row["perfect_until"] > row["largest_batch"]:
        second = "they stay within 20 % of perfect scaling throughout" + _limits(row, "perfect_until")
    else:
        second = f"perfect scaling ends at batch {_size(row['perfect_until'])}" + _limits(row, "perfect_until")
    return f"{first}; {second} ({count(row['n'])}, {row['reached']} of {row['runs']} runs got there)."


def _limits(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if isnan(low) else f" [{_size(low)}, {'∞' if isinf(high) else _size(high)}]"


def _size(value: float) -> str:
    """A batch size or number of steps, to three digits, or to four from a thousand on."""
    return stats.written(value, 3 if value < 1000 else 4)


def _gap(row: dict[str, Any]) -> str:
    return f"{row['optimizer']}’s large-batch gap"


def _share(row: dict[str, Any], notion: str) -> str:
    value, low, high = (_signed(100 * row[f"{notion}{end}"], ".0f") for end in ("", "_low", "_high"))
    return f"{value} % [{low}, {high}]"


def ratio_words(ratio: stats.Mean) -> str:
    """A ratio with its interval, as "0.5 times [0.4, 0.6]"."""
    value, low, high = (stats.written(number, 2) for number in (ratio.value, ratio.low, ratio.high))
    return f"{value} times" + ("" if isnan(ratio.low) else f" [{low}, {high}]")


def count(n: int) -> str:
    """How many seeds."""
    return "one seed: no interval" if n == 1 else f"n = {n}"


def points(share: float) -> str:
    """A difference of accuracies in percentage points."""
    return _signed(100 * share, ".2f")


def in_points(difference: stats.Mean, unit: str = "") -> str:
    """A difference of accuracies with its interval, as "1.20 points [0.40, 2.00]"."""
    return f"{points(difference.value)}{unit} [{points(difference.low)}, {points(difference.high)}]"


def percent(share: float) -> str:
    """An accuracy in percent."""
    return f"{100 * share:.2f}"


def capitalise(words: str) -> str:
    """With a first capital, the others left alone."""
    return words[:1].upper() + words[1:]


def _signed(value: float, form: str) -> str:
    """With a true minus sign, and no minus zero."""
    text = format(value, form)
    return (text if float(text) else text.lstrip("-")).replace("-", "−")
