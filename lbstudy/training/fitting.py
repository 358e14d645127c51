"""The fitting room: whether a study's methods, data and mini-batches go together, before any work begins.

Methods that are not ours are tried in a few training steps, for what they do wrong there would else be told by every
trial. Ours are not, so a study of these costs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from lbstudy.methods import configure, models, smoothing
from lbstudy.methods.checks import batch_norm_problems
from lbstudy.methods.declaration import MethodError, named
from lbstudy.methods.user_code import told, traceback_of
from lbstudy.parallel.batch_norm import has_batch_norm
from lbstudy.study.factor_checks import said_once
from lbstudy.study.file import KeyProblems, Keys, Problem
from lbstudy.study.run import Budget, DatasetSpec, GhostBatchNorm, RunSpec, Schedule
from lbstudy.study.spec import Cell, StudySpec
from lbstudy.training.data import EpochImages, ImageData, Images
from lbstudy.training.dataset import Dataset
from lbstudy.training.datasets import Datasets, input_shape, misfits, source, training_samples
from lbstudy.training.loop import DTYPES, Loop, MiniBatch
from lbstudy.training.train import train

SAMPLES = 8
STEPS = 2


def check(study: StudySpec, data: Datasets) -> None:
    """Make sure that a study's cells and models can work with their data.

    Raises:
        KeyProblems: a batch size is larger than the training split, a split too small for its classes, or the model
            does not take these images and mini-batches.
    """
    found = []
    for part in study.variants():
        dataset = data[source(part.dataset)]
        wrong = [*misfits(part, dataset), *_evaluated_too_rarely(part, dataset)]
        found.append((part, wrong or list(_model(part, dataset))))
    if problems := list(said_once(found, study)):
        raise KeyProblems(*problems)


def _model(study: StudySpec, dataset: Dataset) -> Iterator[Problem]:
    """What keeps the study's model from working with these images and mini-batches."""
    ghost = study.batch_norm.ghost if isinstance(study.batch_norm, GhostBatchNorm) else None
    shape = input_shape(study.dataset, dataset)
    try:
        network = models.check(study.model.name, shape, dataset.classes, study.model.settings, ghost=ghost)
    except MethodError as error:
        yield Problem(("model",), told(error))
        return
    yield from batch_norm_problems(study, has_batch_norm(network))
    if models.normalises_vectors(network, shape):
        yield from _lone_samples(study, ghost, training_samples(study.dataset, dataset))


def _evaluated_too_rarely(study: StudySpec, dataset: Dataset) -> Iterator[Problem]:
    """Evaluations within epochs that no run is long enough for."""
    samples = training_samples(study.dataset, dataset)
    steps = [study.steps_per_epoch(cell, samples) for cell in study.list_cells()]
    longest = max(map(study.budget.total_steps, steps))
    if study.evaluate_every and study.evaluate_every > longest:
        reason = f"must be no more than the steps of the longest run, {longest}; got {study.evaluate_every}"
        yield Problem(("evaluate_every",), reason)


def _lone_samples(study: StudySpec, ghost: int | None, samples: int) -> Iterable[Problem]:
    """Mini-batches, or ghost batches of them, of a single sample."""
    for size in sorted({cell.batch_size for cell in study.list_cells()}):
        last = 0 if study.dataset.drop_last else samples % size
        for whole, name in ((size, "a"), (last, "the last")):
            if whole and (whole % ghost if ghost else whole) == 1:
                part = f"{name} mini-batch of {whole}" + (f" leaves a ghost batch of {ghost} with" if ghost else " has")
                reason = f"{size}: {part} one sample, which batch norm cannot normalise after a linear layer"
                hint = "" if whole == size else "; `dataset.drop_last: true` leaves it out"
                yield Problem(("cells", "batch_size"), reason + hint)


def try_on(study: StudySpec, data: Datasets) -> None:
    """Make sure that all methods of others do what a training run needs of them.

    Raises:
        KeyProblems: one does not, with the user's own traceback where an error was raised.
    """
    found = [(part, list(_tried(part, data[source(part.dataset)]))) for part in study.variants()]
    if problems := list(said_once(found, study)):
        raise KeyProblems(*problems)


def _tried(study: StudySpec, dataset: Dataset) -> Iterator[Problem]:
    """What is wrong with the methods of others in a variant of a study, each once."""
    combinations = {(cell.optimizer, cell.smoothing): cell for cell in study.list_cells()}
    foreign = [cell for cell in combinations.values() if any(map(_is_foreign, cell.methods))]
    if models.of_users(study.model.name) and not foreign:
        foreign = list(combinations.values())[:1]
    if not foreign:
        return
    data, told_already = _images(study.dataset, dataset), set()
    with torch.random.fork_rng(devices=[]):
        faulty = set()
        for name, cell in {cell.optimizer: cell for cell in foreign if _is_foreign(cell.optimizer)}.items():
            for problem in _optimizer(study, cell, data):
                faulty.add(name)
                yield problem
        for cell in foreign:
            for problem in _run(study, cell, data) if cell.optimizer not in faulty else ():
                if problem.message not in told_already:
                    told_already.add(problem.message)
                    yield problem


def _is_foreign(name: str) -> bool:
    return ":" in name


def _images(spec: DatasetSpec, dataset: Dataset) -> ImageData:
    """Images of noise, of the study's shape and classes."""
    draw = torch.Generator().manual_seed(0)
    shape = input_shape(spec, dataset)
    pixels = torch.randint(0, 256, (SAMPLES, *shape), generator=draw, dtype=torch.uint8)
    images = Images(pixels, torch.arange(SAMPLES) % dataset.classes)
    mean = torch.full((shape[0],), 127.5, dtype=torch.float64)
    return ImageData(images, images, images, dataset.classes, mean, mean / 2)


def _run_spec(study: StudySpec, cell: Cell) -> RunSpec:
    """A few steps of a cell, with values from the middle of what is searched."""
    params = {name: tuned.middle for name, tuned in study.ranges(cell).items()}
    return configure.run_spec(study, cell, params, seed=0).model_copy(
        update={
            "dataset": study.dataset.model_copy(update={"augment": (), "drop_last": False}),
            "batch_size": SAMPLES,
            "budget": Budget(steps=STEPS),
            "schedule": Schedule(),
            "micro_batch_size": None,
            "compile": False,
        }
    )


def _optimizer(study: StudySpec, cell: Cell, data: ImageData) -> Iterator[Problem]:
    """Whether the weights stay where they are while the learning rate is 0, and move when it is not."""
    keys: Keys = ("cells", "optimizer", study.cells.optimizer.index(cell.optimizer))
    try:
        run = _run_spec(study, cell).model_copy(update={"smoothing": smoothing.NONE})
        model = models.build(run.model.name, data.shape, data.classes, run.ghost, run.model.settings)
        model = model.to(DTYPES[run.precision])
        loop = Loop.of(run, model, 1)
        start = _weights(model)
        _step(loop, data, 0, rate=0.0)
        if not torch.equal(start, _weights(model)):
            yield Problem(keys, f"{cell.optimizer} ignores `lr`: it changes the weights while every group's `lr` is 0")
            return
        for step in range(STEPS):
            _step(loop, data, step)
        if torch.equal(start, _weights(model)):
            yield Problem(keys, f"{cell.optimizer} leaves all weights as they are in {STEPS} steps")
    except Exception as error:  # whatever the user's optimizer does wrong is the user's to read
        yield Problem(keys, _failed(cell.optimizer, f"fails in a training step on {SAMPLES} images", error))


def _weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def _step(loop: Loop, data: ImageData, step: int, rate: float | None = None) -> None:
    """A step of the training loop, at the run's learning rate or at this one."""
    images = EpochImages(data, loop.run.dataset, loop.run.seed, 1, DTYPES[loop.run.precision])
    batch = MiniBatch(step, 0, SAMPLES, images)
    loop.course.set(step)
    if rate is not None:
        for group in loop.optimizer.param_groups:
            group["lr"] = rate
    loop.optimizer.zero_grad(set_to_none=True)
    for passes in loop.forward_passes(SAMPLES):
        loop.gradient(batch, passes)
    loop.optimizer.step()


def _run(study: StudySpec, cell: Cell, data: ImageData) -> Iterator[Problem]:
    """A run of a few steps, with its evaluation."""
    kinds = {"optimizer": [cell.optimizer], "smoothing": smoothing.split(cell.smoothing)}
    try:
        train(_run_spec(study, cell), data)
    except Exception as error:  # likewise
        if any(map(_is_foreign, kinds["smoothing"])):
            keys: Keys = ("cells", "smoothing", study.cells.smoothing.index(cell.smoothing))
            name = f"smoothing {cell.smoothing}"
        elif _is_foreign(cell.optimizer):
            keys, name = ("cells", "optimizer", study.cells.optimizer.index(cell.optimizer)), cell.optimizer
        else:
            keys, name = ("model",), study.model.name
        yield Problem(keys, _failed(name, f"fails in a run of {STEPS} steps on {SAMPLES} images", error))


def _failed(name: str, what: str, error: Exception) -> str:
    reason = str(error) if isinstance(error, MethodError) else f"{name} {what}: {named(error)}"
    trace = traceback_of(error)
    return f"{reason}\n{trace}" if trace else reason
