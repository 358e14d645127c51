"""What holds for every number of a study: what was fixed, and what a reader must keep in mind.

Fixed hyper-parameters are caveats (tuning playbook): a comparison is one of cells under these conditions.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import pandas as pd

from lbstudy.analysis.stats import written
from lbstudy.analysis.tables.best import workers_of
from lbstudy.analysis.tables.cost import Spent, hours, in_words, lost_in_words
from lbstudy.study.factors import labels, value_text
from lbstudy.study.spec import StudySpec


def list_caveats(
    study: StudySpec, trials: pd.DataFrame, confirmed: pd.DataFrame, gap_table: pd.DataFrame, rivals: Sequence[int]
) -> list[str]:
    """What a reader must keep in mind, a sentence or two each; `rivals`: how many other trials of each cell are as good
    as its best one (`tables.best.as_good`)."""
    sizes = sorted({cell.batch_size for cell in study.list_cells()})
    caveats = [
        "What was fixed is part of every statement above: another model, data set, budget or fixed hyper-parameter may "
        "turn it.",
        f"The budget is {study.tuning.trials} trials a cell, found by {study.tuning.sampler}"
        + (", of which ASHA ended the unpromising early" if study.tuning.pruner != "none" else "")
        + ". An optimizer with more hyper-parameters needs more of them to be tuned as well.",
        "Intervals are two-sided 95 % intervals over seeds, each for itself: nothing is corrected for how many there "
        "are. Seeds vary the initialisation and the order of the data, not the split nor the test set.",
    ]
    if chance := sum(map(bool, rivals)):
        caveats.append(
            f"In {chance} of {len(rivals)} cells another completed trial came within one standard error of the best "
            "one's validation accuracy, that of so many images: which configuration is best there is partly chance."
        )
    if len(sizes) > 1 and any(part.budget.epochs for part in study.variants()):
        caveats.append(
            f"The budget is in epochs, so batch {sizes[-1]} takes {written(sizes[-1] / sizes[0], 3)} times fewer steps "
            f"than batch {sizes[0]}: a gap holds both the batch size and the number of steps"
            + (", which its split tells apart." if any(part.splits for part in study.variants()) else ".")
        )
    resolvable = 100 * gap_table["resolvable"].dropna()
    shown = resolvable[resolvable < 100]  # more than that no accuracies can differ by
    if len(shown):
        least = "in the least steady one" + (" that can show any" if len(shown) < len(resolvable) else "")
        caveats.append(
            f"Four times in five these seeds would show a single gap of {shown.min():.2f} points in the steadiest pair "
            f"of cells, and one of {shown.max():.2f} {least}."
        )
    if confirmed["train_on"].eq("all").any():
        caveats.append(
            "Confirmed runs trained on the validation samples too, so their validation accuracy says nothing."
        )
    used = [device for runs in (trials, confirmed) if "device" in runs for device in runs["device"]]
    devices = sorted({str(device) for device in used if device})
    if len(devices) > 1:
        caveats.append(
            f"Runs ran on different devices ({', '.join(devices)}), which round differently, so that equal "
            "configurations may differ as different seeds do; and their seconds cannot be compared."
        )
    if "," in (numbers := workers_of(trials, confirmed)):
        caveats.append(
            f"Runs were trained by different numbers of workers ({numbers}), which changes the rounding of sums; "
            "training amplifies that, so equal configurations may differ as different seeds do."
        )
    return caveats


def describe_compared(study: StudySpec) -> str:
    """What was compared, in a line."""
    cells = study.list_cells()
    optimizers, smoothings = (
        _listed([study.label(name) for name in dict.fromkeys(getattr(cell, factor) for cell in cells)])
        for factor in ("optimizer", "smoothing")
    )
    sizes = _listed([str(size) for size in sorted({cell.batch_size for cell in cells})])
    names = labels(study.factors)
    factors = [f"{names[key].replace('_', ' ')} {_listed([*map(value_text, study.factors[key])])}" for key in names]
    of = f"{study.model} on {study.dataset.name}" if "model" not in names else f"on {study.dataset.name}"
    return f"{optimizers}; batch {sizes}; {smoothings}; {'; '.join([*factors, of])}"


def describe_cost(spent: Spent) -> str:
    """What it cost: trials, hours of devices, and images seen in training."""
    counts = {"trial": spent.trials, "confirmed run": spent.confirmed}
    parts = [f"{count} {noun}{'' if count == 1 else 's'}" for noun, count in counts.items() if count]
    if not parts:
        return "Nothing has run yet."
    if spent.devices:
        parts.append(hours(spent.devices))
    again = f" L{lost_in_words(spent)[1:]}." if spent.lost or spent.moves else ""
    return f"{', '.join(parts)}, {in_words(spent.images)} images seen.{again}"


MOST_LISTED = 5


def _listed(names: list[str]) -> str:
    """`a, b and c`, or how many there are."""
    if len(names) > MOST_LISTED:
        return f"{', '.join(names[:2])}, … {names[-1]} ({len(names)})"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def describe_fixed(
    study: StudySpec, confirmed: pd.DataFrame, environment: dict[str, Any], confirming: dict[str, Any]
) -> dict[str, str]:
    """What was the same in every cell, in words, by what it is; of what further factors vary, what there was.

    Args:
        study: the study.
        confirmed: `load.confirmed` of its folder.
        environment: `StudyFolder.environment`.
        confirming: likewise, of the confirmed runs.
    """
    parts = study.variants()
    described = [_describe(part, confirmed, environment) for part in parts]
    fixed = {
        name: "; or: ".join(dict.fromkeys(words[name] for words in described if name in words))
        for name in dict.fromkeys(name for words in described for name in words)
    }
    if confirming:
        last = f"{_environment(confirming)}, begun {confirming.get('started')}"
        fixed["confirmed with"] = ". ".join([last, *_versions_before(confirming)])
    factors = {key: ", ".join(map(value_text, values)) for key, values in study.factors.items()}
    return {"factors": "; ".join(f"{key}: {values}" for key, values in factors.items())} | fixed if factors else fixed


def _describe(study: StudySpec, confirmed: pd.DataFrame, environment: dict[str, Any]) -> dict[str, str]:
    data, tuning, machine = study.dataset, study.tuning, environment.get("machine", {})
    share = data.validation_size
    size = f"{100 * share:g} %" if share < 1 else f"{share:g} samples"
    trained_on = {"split": "the rest of them", "all": "all of them, validation samples too"}
    used = sorted({trained_on[str(part)] for part in confirmed["train_on"].dropna()})
    pruner = "no pruner" if tuning.pruner == "none" else f"ASHA ({_words(tuning.pruner.model_dump(exclude={'name'}))})"
    varied = {key.removeprefix("fixed.") for key in study.factors}
    fixed = {
        "model": f"{study.model}, {study.precision}, batch norm: {_words(study.batch_norm)}",
        "data": data.name
        + (f" in {data.root}" if data.root else "")
        + f"; augmentation: {', '.join(data.augment) or 'none'}",
        "split": f"{size} of the training samples validate, drawn with seed {study.seed}"
        + (f"; confirmed runs train on {' or '.join(used)}" if used else ""),
        "budget": f"{study.budget.in_words}; {study.schedule.name} schedule, "
        + _words(study.schedule.model_dump(exclude={"name"}, exclude_none=True)),
        "tuning": f"{tuning.trials} trials a cell, {tuning.sampler}, {pruner}; by {tuning.in_words}"
        + (f", evaluated every {study.evaluate_every} steps" if study.evaluate_every else ""),
        "ranges": "; ".join(
            f"{name} {entry}{f' ({when})' if (when := _words(entry.when)) else ''}"
            for name, entries in study.search.items()
            for entry in entries
            if any(entry is study.ranges(cell).get(name) for cell in study.list_cells())
        ),
        "hyper-parameters": _words(
            {n: value for n, value in study.fixed.numbers.items() if n not in study.search and n not in varied}
        ),
    }
    for method, settings in study.fixed.settings.items():
        if method in study.methods:
            fixed[study.label(method)] = _words(settings)
    if study.published:
        fixed["published"] = f"{len(study.published)} configurations from the literature are among the trials"
    fixed["seed"] = str(study.seed)
    if environment:
        fixed |= {
            "versions": f"Python {environment.get('python')}; {_words(environment.get('packages', {}))}",
            **({"versions before": ". ".join(told)} if (told := _versions_before(environment)) else {}),
            "commit": str(environment.get("commit") or "not known"),
            "machine of the driver": ", ".join(str(machine[name]) for name in ("host", "system") if machine.get(name))
            + f", {machine.get('cpus')} CPUs",
            "last driver": f"{environment.get('started')}: {shlex.join(map(str, environment.get('command', [])))}",
        }
    return fixed


def _environment(found: dict[str, Any]) -> str:
    return f"Python {found.get('python')}; {_words(found.get('packages') or {})}; commit {found.get('commit')}"


def _versions_before(environment: dict[str, Any]) -> list[str]:
    """What drivers before the last one had that had other versions."""
    return [f"{earlier['started']}: {_environment(earlier)}" for earlier in environment.get("earlier", [])]


def _words(settings: Any) -> str:
    """Settings as `name value, name value`; empty ones are left out."""
    if isinstance(settings, str):
        return settings
    plain = settings if isinstance(settings, dict) else settings.model_dump(mode="json", exclude_none=True)
    parts = []
    for name, value in plain.items():
        shown = "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if shown:
            parts.append(f"{str(name).replace('_', ' ')} {shown}")
    return ", ".join(parts)
