"""Bad study files, flags and data sets: one error each, exit code 2, no traceback, no Ray, nothing left on disk."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lbstudy.console import cli

GOOD = """\
name: tiny
model: lenet5
dataset: {name: synthetic, samples: 640}
budget: {epochs: 4}
cells: {optimizer: [sgd], batch_size: [32, 64], smoothing: [none, mixup, noise]}
search:
  learning_rate:
    - {log_uniform: [1e-3, 1e-1], when: {batch_size: 32}}
    - {log_uniform: [1e-2, 1]}
  mixup_alpha: {uniform: [0.1, 1], when: {smoothing: mixup}}
  noise_magnitude: {choice: [0.001, 0.01], when: {smoothing: noise}}
published:
  - {optimizer: sgd, batch_size: 64, smoothing: mixup, params: {learning_rate: 0.5}}
tuning: {trials: 4}
"""

# name -> (text of the good file, what stands there instead, parts of the one error line)
FILES: dict[str, tuple[str, str, list[str]]] = {
    # keys
    "misspelt section": ("tuning:", "tunning:", ["study.yaml:14: tunning: unknown key; did you mean `tuning`?"]),
    "misspelt key": ("trials: 4", "trails: 4", [":14: tuning.trails: unknown key; did you mean `trials`?"]),
    "misspelt kind of range": ("{uniform:", "{unifrom:", [":10: search.mixup_alpha.unifrom: unknown key", "`uniform`"]),
    "misspelt hyper-parameter": ("mixup_alpha:", "mixup_alfa:", [":10: search.mixup_alfa: not a hyper-parameter; did you mean `mixup_alpha`?"]),
    "unlike any key": ("trials: 4", "trials: 4, zzz: 1", ["tuning.zzz: unknown key; known are trials, sampler"]),
    "key of another section": ("tuning:", "workers: 2\ntuning:", [":14: workers: unknown key; did you mean `resources.workers`?"]),
    "section left out by wrong nesting": ("budget: {epochs: 4}", "epochs: 4", [":4: epochs: unknown key; did you mean `budget.epochs`?"]),
    "duplicate key": ("model: lenet5\n", "model: lenet5\nmodel: vgg9\n", ["study.yaml:3: not valid YAML", "duplicate key", "model"]),
    "missing section": ("budget: {epochs: 4}\n", "", ["budget: is required, but missing", "epochs, steps"]),
    "missing key": ("{trials: 4}", "{sampler: tpe}", [":14: tuning.trials: is required, but missing; it should be a whole number"]),
    "number as key": ("tuning:", "3: x\ntuning:", ["3: unknown key"]),
    # values
    "unknown model": ("lenet5", "lenet6", [":2: model: there is no model 'lenet6'; did you mean lenet5 or resnet8?"]),
    "depth of no network": ("lenet5", "resnet9", [":2: model: resnet9: the CIFAR ResNets have 6n + 2 layers (resnet8, resnet14, ...)"]),
    "unknown data set": ("name: synthetic", "name: cifar11", ["dataset.name", "'cifar10'", "got 'cifar11'"]),
    "unknown optimizer": ("[sgd]", "[sdg]", [":5: cells.optimizer.0: there is no optimizer 'sdg'; did you mean sgd?"]),
    "no of YAML 1.1": ("[none, mixup, noise]", "[no, mixup, noise]", ["cells.smoothing.0: there is no smoothing 'no'; did you mean none"]),
    "number in quotes, misspelt": ("epochs: 4", "epochs: '4x'", ["budget.epochs: input should be a whole number; got '4x'"]),
    "fraction of an epoch": ("epochs: 4", "epochs: 2.5", ["budget.epochs: input should be a whole number; got 2.5"]),
    "null": ("trials: 4", "trials: null", ["tuning.trials: input should be a whole number; got null"]),
    "null section": ("budget: {epochs: 4}", "budget:", [":4: budget: input should be a mapping; its keys are epochs, steps, updates_of; got null"]),
    "true as a number": ("trials: 4", "trials: true", ["tuning.trials: input should be a whole number; got true"]),
    "true in a list of numbers": ("[32, 64]", "[32, 64, true]", ["cells.batch_size.2: input should be a whole number; got true"]),
    "text as a truth": ("samples: 640", "samples: 640, drop_last: perhaps", ["dataset.drop_last: input should be true or false; got 'perhaps'"]),
    "number as a name": ("name: tiny", "name: 2019", [":1: name: input should be text; got 2019"]),
    "date as a name": ("name: tiny", "name: 2019-01-01", ["name: input should be text; got 2019-01-01"]),
    "value without brackets": ("[sgd]", "sgd", ["cells.optimizer: input should be a list of names; got 'sgd'"]),
    "empty list": ("[sgd]", "[]", ["cells.optimizer: input should have at least one entry; got []"]),
    "list as a section": ("{epochs: 4}", "[4]", ["budget: input should be a mapping; its keys are epochs, steps, updates_of; got [4]"]),
    "zero trials": ("trials: 4", "trials: 0", ["tuning.trials: input should be greater than 0; got 0"]),
    "negative seed": ("tuning:", "seed: -1\ntuning:", ["seed: input should be greater than or equal to 0; got -1"]),
    "startup trials as text": ("trials: 4", "trials: 4, startup_trials: few", ["tuning.startup_trials: input should be a whole number; got 'few'"]),
    "batch norm as a number": ("tuning:", "batch_norm: 3\ntuning:", ["batch_norm: input should be 'sync', or {ghost: N} with N at least 2; got 3"]),
    "ghost of one": ("tuning:", "batch_norm: {ghost: 1}\ntuning:", ["batch_norm.ghost: input should be greater than 1; got 1"]),
    "pruner by name": ("trials: 4", "trials: 4, pruner: asha", ["tuning.pruner: input should be 'none', or {name: asha,", "got 'asha'"]),
    "another pruner": ("trials: 4", "trials: 4, pruner: {name: median}", ["tuning.pruner.name: input should be 'asha'; got 'median'"]),
    "grace period of zero": ("trials: 4", "trials: 4, pruner: {grace_period: 0}", ["tuning.pruner.grace_period: input should be greater than 0"]),
    "gpus as text": ("tuning:", "resources: {gpus_per_worker: all}\ntuning:", ["resources.gpus_per_worker: input should be 'auto', or a number from 0 up; got 'all'"]),
    "validation size as text": ("samples: 640", "samples: 640, validation_size: some", ["dataset.validation_size: input should be a number of samples, or a fraction below 1; got 'some'"]),
    "metric and direction": ("trials: 4", "trials: 4, metric: val_loss, direction: maximize", ["tuning: `direction` of metric val_loss must be minimize"]),
    "infinite hyper-parameter": ("tuning:", "fixed: {weight_decay: .inf}\ntuning:", ["fixed.weight_decay: input should be a finite number; got inf"]),
    "momentum of one": ("tuning:", "fixed: {momentum: 1}\ntuning:", ["fixed.momentum: input should be less than 1; got 1"]),
    "unsafe name": ("name: tiny", "name: ../tiny", [":1: name: input should be letters, digits, '.', '_' and '-' only", "got '../tiny'"]),
    "name that is too long": ("name: tiny", "name: " + 101 * "x", ["name: input should be at most 100 characters long"]),
    # ranges
    "inverted range": ("[0.1, 1]", "[1, 0.1]", [":10: search.mixup_alpha: `low < high` must hold, but got low=1, high=0.1"]),
    "empty range": ("[0.1, 1]", "[1, 1]", ["search.mixup_alpha: `low < high` must hold, but got low=1, high=1"]),
    "log of zero": ("[1e-2, 1]", "[0, 1]", [":9: search.learning_rate.1: `low > 0` must hold for log_uniform, but got low=0"]),
    "range of one end": ("[0.1, 1]", "[0.1]", ["search.mixup_alpha.uniform: input should be [low, high], two numbers; got [0.1]"]),
    "range of three ends": ("[0.1, 1]", "[0.1, 0.5, 1]", ["search.mixup_alpha.uniform: input should be [low, high], two numbers; got [0.1, 0.5, 1]"]),
    "range as a number": ("[0.1, 1]", "0.1", ["search.mixup_alpha.uniform: input should be [low, high], two numbers; got 0.1"]),
    "range missing": ("{uniform: [0.1, 1], when: {smoothing: mixup}}", "", ["search.mixup_alpha: input should be a range, such as", "got null"]),
    "two kinds of range": ("uniform: [0.1, 1]", "uniform: [0.1, 1], choice: [0.1, 1]", ["search.mixup_alpha: give exactly one of log_uniform, uniform, one_minus_log_uniform, int, choice; got uniform, choice"]),
    "choice of one": ("[0.001, 0.01]", "[0.001]", ["search.noise_magnitude: `choice` needs at least two different finite numbers"]),
    "infinite choice": ("[0.001, 0.01]", "[0.001, .inf]", ["search.noise_magnitude: `choice` needs at least two different finite numbers"]),
    "range beyond what is allowed": ("  mixup_alpha:", "  momentum: {uniform: [0.5, 1.5]}\n  mixup_alpha:", ["search.momentum: 1.5 is not allowed: input should be less than 1"]),
    "range without effect": (", when: {smoothing: mixup}", "", ["search.mixup_alpha: has no effect in cell sgd-b32-none; restrict it with `when`"]),
    "needed range missing": ("  mixup_alpha: {uniform: [0.1, 1], when: {smoothing: mixup}}\n", "", ["search.mixup_alpha: cell sgd-b32-mixup needs it, in `search` or in `fixed`"]),
    # conditions
    "when that no cell meets": ("when: {batch_size: 32}", "when: {batch_size: 33}", [":8: search.learning_rate.0.when: never applies: no cell has batch_size 33; the nearest is 32"]),
    "range behind another": ("    - {log_uniform: [1e-2, 1]}\n", "    - {log_uniform: [1e-2, 1]}\n    - {uniform: [1, 2]}\n", [":10: search.learning_rate.2: never applies: the entries above it cover all of its cells"]),
    "exclude that no cell meets": ("noise]}", "noise], exclude: [{batch_size: 60}]}", ["cells.exclude.0: leaves nothing out: no cell has batch_size 60; the nearest is 64"]),
    "exclude of everything": ("noise]}", "noise], exclude: [{optimizer: sgd}]}", ["cells.exclude: leaves no cell at all"]),
    "misspelt condition": ("when: {batch_size: 32}", "when: {batchsize: 32}", ["search.learning_rate.0.when.batchsize: unknown key; did you mean `batch_size`?"]),
    "condition on an unknown smoothing": ("when: {smoothing: mixup}", "when: {smoothing: mixed}", ["search.mixup_alpha.when: never applies: no cell has smoothing mixed; the cells have none, mixup, noise"]),
    # factors
    "factor that is no key": ("noise]}", "noise], modle: [lenet5, vgg9]}", [":5: cells.modle: unknown key; did you mean `model`?"]),
    "factor without its section": ("noise]}", "noise], weight_decay: [0, 1]}", [":5: cells.weight_decay: unknown key; did you mean `fixed.weight_decay`?"]),
    "factor that must not vary": ("noise]}", "noise], tuning.trials: [4, 8]}", ["cells.tuning.trials: unknown key; `tuning` is the same in all cells"]),
    "factor of one value": ("noise]}", "noise], model: [lenet5]}", ["cells.model: a factor needs at least two values; a single one belongs at the key itself, `model: 'lenet5'`; got ['lenet5']"]),
    "factor of no list": ("noise]}", "noise], model: lenet5}", ["cells.model: input should be a list of values, or a mapping of names to values; got 'lenet5'"]),
    "factor given twice": ("noise]}", "noise], fixed.weight_decay: [0, 1e-4], fixed.weight_decay: [0, 1e-3]}", [":5: not valid YAML", "duplicate key", "fixed.weight_decay"]),
    "factor within a factor": ("noise]}", "noise], fixed.noise: {a: {copies: 1}, b: {copies: 2}}, fixed.noise.copies: [1, 2]}", ["cells.fixed.noise.copies: is a part of another factor, `fixed.noise`; make one of the two a factor"]),
    "value of a factor twice": ("noise]}", "noise], fixed.weight_decay: [1e-4, 0.0001]}", ["cells.fixed.weight_decay: each value once, but got [0.0001, 0.0001]"]),
    "one value by two names": ("noise]}", "noise], schedule: {a: {warmup: 1}, b: {warmup: 1}}}", ["cells.schedule: each value once, but got {a: {warmup: 1}, b: {warmup: 1}}"]),
    "wrong value of a factor": ("noise]}", "noise], precision: [fp32, fp31]}", [":5: cells.precision.1: input should be 'fp32', 'bf16' or 'fp64'; got 'fp31'; did you mean 'fp32'?"]),
    "wrong value below a named one": ("noise]}", "noise], schedule: {a: {warmup: 1}, b: {warmpu: 2}}}", ["cells.schedule.b: warmpu: unknown key; did you mean `warmup`?"]),
    "truth as a number of a factor": ("noise]}", "noise], fixed.weight_decay: [0, true]}", ["cells.fixed.weight_decay.1: input should be a number; got true"]),
    "nameless value of a factor": ("noise]}", "noise], dataset.augment: [[crop], [flip]]}", ["cells.dataset.augment: a value that is no number, text or truth needs a name: `dataset.augment: {NAME: ['crop'], ...}`"]),
    "factor's key in parts": ("noise]}", "noise], fixed: {weight_decay: [0, 1e-4]}}", ["cells.fixed: the key of a factor is written in one: `fixed.weight_decay`, not `weight_decay` below it"]),
    "value that is no part of a name": ("noise]}", "noise], dataset.root: [a/b, c]}", ["cells.dataset.root: stands in folder names", "or name it: `dataset.root: {NAME: 'a/b', ...}`; got 'a/b'"]),
    "factor that is tuned": ("noise]}", "noise], fixed.mixup_alpha: [0.1, 1]}", ["cells.fixed.mixup_alpha: is tuned as well, in `search.mixup_alpha`; it can be only one of the two"]),
    "factor set otherwise": ("noise]}", "noise], model: [vgg9, resnet18]}", ["cells.model: the study says `model: 'lenet5'` too, none of the factor's values; leave one of the two out"]),
    "too many cells": ("[32, 64]", "[32, 64], fixed.momentum: [" + ", ".join(f"0.{n:03}" for n in range(1, 101)) + "], fixed.nesterov: [true, false], fixed.weight_decay: [" + ", ".join(map(str, range(20))) + "]", [":5: cells: 1 optimizer x 2 batch_size x 100 fixed.momentum x 2 fixed.nesterov x 20 fixed.weight_decay x 3 smoothing = 24,000 cells; at most 1,000 can be compared"]),
    "values that do not go together": ("noise]}", "noise], schedule.name: [constant, multi_step]}", [":5: cells.schedule.name.1: `milestones` are needed by `multi_step`, and only there"]),
    "value that the budget does not hold": ("noise]}", "noise], schedule.warmup: [1, 5]}", [":5: cells.schedule.warmup.1: must be no longer than the budget of 4 epochs; got 5"]),
    "budget that does not hold the warm-up": ("budget: {epochs: 4}\ncells: {", "schedule: {warmup: 3}\ncells: {budget: {short: {epochs: 2}, long: {epochs: 4}}, ", [":4: schedule.warmup: must be no longer than the budget of 2 epochs; got 3 (with budget short)"]),
    "when of no factor": ("when: {batch_size: 32}", "when: {model: lenet5}", [":8: search.learning_rate.0.when.model: unknown key; known are optimizer, batch_size, smoothing"]),
    "when of no value of a factor": ("noise]}", "noise], exclude: [{precision: fp64}], precision: [fp32, bf16]}", ["cells.exclude.0: leaves nothing out: no cell has precision fp64; the cells have fp32, bf16"]),
    "published for no value of a factor": ("batch_size: 64, smoothing: mixup", "batch_size: 64, smoothing: mixup, optimiser: sgd", [":13: published.0.optimiser: unknown key; did you mean `optimizer`?"]),
    # published
    "published outside its range": ("learning_rate: 0.5", "learning_rate: 5", [":13: published.0.params.learning_rate: 5 lies outside the search range [0.01, 1] log"]),
    "published for no cell": ("batch_size: 64, smoothing: mixup", "batch_size: 99, smoothing: mixup", [":13: published.0: sgd-b99-mixup is no cell of this study"]),
    "published and not tuned": ("{learning_rate: 0.5}", "{momentum: 0.5}", ["published.0.params.momentum: is not tuned in cell sgd-b64-mixup"]),
    "more published than trials": ("tuning: {trials: 4}", "  - {optimizer: sgd, batch_size: 64, smoothing: mixup, params: {learning_rate: 0.4}}\ntuning: {trials: 1}", [":15: tuning.trials: must be at least 2, the published configurations of cell sgd-b64-mixup; got 1"]),
    # budgets and sizes
    "epochs and steps": ("{epochs: 4}", "{epochs: 4, steps: 9}", [":4: budget: give either `epochs` or `steps`, and not both"]),
    "warm-up beyond the budget": ("tuning:", "schedule: {warmup: 5}\ntuning:", [":14: schedule.warmup: must be no longer than the budget of 4 epochs; got 5"]),
    "milestones for cosine": ("tuning:", "schedule: {name: cosine, milestones: [3]}\ntuning:", ["schedule: `milestones` are needed by `multi_step`, and only there"]),
    "batch size twice": ("[32, 64]", "[32, 32]", ["cells.batch_size: each value once, but got [32, 32]"]),
    "more workers than samples": ("tuning:", "resources: {workers: 33}\ntuning:", ["resources.workers: must be no more than the samples of the smallest mini-batch, 32; got 33"]),
    "ghost larger than the mini-batch": ("model: lenet5", "model: vgg9\nbatch_norm: {ghost: 40}", [":3: batch_norm.ghost: must be no more than the smallest batch size it is for, 32; got 40"]),
    "noise ghost larger than the mini-batch": ("tuning:", "fixed: {noise: {ghost: 40}}\ntuning:", ["fixed.noise.ghost: must be no more than the smallest batch size it is for, 32; got 40"]),
    "micro-batches that change batch norm": ("model: lenet5", "model: vgg9\nresources: {micro_batch_size: 8}", ["batch_norm: `micro_batch_size` = 8 splits the mini-batch"]),
    # targets
    "no target": ("{trials: 4}", "{trials: 4, metric: steps_to_target}", [":14: tuning.target: is needed by metric steps_to_target; it should be {val_accuracy: A}, {val_loss: L} or {train_loss: L}, or 'auto'"]),
    "target without its metric": ("{trials: 4}", "{trials: 4, target: {val_accuracy: 0.7}}", [":14: tuning.target: is for the metrics steps_to_target, epochs_to_target, seconds_to_target only; got metric val_accuracy"]),
    "target in percent": ("{trials: 4}", "{trials: 4, metric: steps_to_target, target: {val_accuracy: 70}}", [":14: tuning.target.val_accuracy: input should be less than or equal to 1; got 70"]),
    "target loss of zero": ("{trials: 4}", "{trials: 4, metric: steps_to_target, target: {train_loss: 0}}", [":14: tuning.target.train_loss: input should be greater than 0; got 0"]),
    "two targets": ("{trials: 4}", "{trials: 4, metric: steps_to_target, target: {val_accuracy: 0.7, val_loss: 1}}", [":14: tuning.target: input should be {val_accuracy: A}, {val_loss: L} or {train_loss: L}, or 'auto'; got {val_accuracy: 0.7, val_loss: 1}"]),
    "target of another metric": ("{trials: 4}", "{trials: 4, metric: steps_to_target, target: {val_acuracy: 0.7}}", [":14: tuning.target.val_acuracy: unknown key; did you mean `val_accuracy`?"]),
    "target that is a number": ("{trials: 4}", "{trials: 4, metric: steps_to_target, target: 0.7}", [":14: tuning.target: input should be {val_accuracy: A}, {val_loss: L} or {train_loss: L}, or 'auto'; got 0.7"]),
    "misspelt time": ("{trials: 4}", "{trials: 4, metric: steps_to_targt, target: {val_loss: 1}}", [":14: tuning.metric:", "'steps_to_target'", "got 'steps_to_targt'; did you mean 'steps_to_target'?"]),
    "direction of a time": ("{trials: 4}", "{trials: 4, metric: steps_to_target, direction: maximize, target: {val_loss: 1}}", [":14: tuning: `direction` of metric steps_to_target must be minimize, but got maximize"]),
    "evaluated every zero steps": ("tuning:", "evaluate_every: 0\ntuning:", [":14: evaluate_every: input should be greater than 0; got 0"]),
    "evaluated beyond the budget": ("{epochs: 4}", "{steps: 9}\nevaluate_every: 10", [":5: evaluate_every: must be no more than the budget of 9 steps; got 10"]),
    "evaluated beyond the longest run": ("tuning:", "evaluate_every: 73\ntuning:", [":14: evaluate_every: must be no more than the steps of the longest run, 72; got 73"]),
    "evaluations as a factor": ("cells: {", "cells: {evaluate_every: [5, 10], ", [":5: cells.evaluate_every: unknown key; `evaluate_every` is the same in all cells, so that they can be compared"]),
    "batch size larger than the training split": ("[32, 64]", "[32, 64, 600]", [":5: cells.batch_size: 600 is more than the 576 training samples"]),
    "validation set that takes everything": ("samples: 640", "samples: 640, validation_size: 640", [":3: dataset.validation_size: 640 asks for 640 of 640"]),
    "fewer validation samples than classes": ("samples: 640", "samples: 640, validation_size: 9", [":3: dataset.validation_size: leaves 631 samples to train and 9 to validate"]),
    # YAML
    "not YAML": ("cells: {", "cells: {{", ["study.yaml:", "not valid YAML"]),
    "tab": ("  mixup_alpha", "\tmixup_alpha", ["study.yaml:10: not valid YAML", "'\\t'"]),
    "alias of nothing": ("name: tiny", "name: *other", ["study.yaml:1: not valid YAML", "undefined alias"]),
    "alias that contains itself": ("published:\n", "source: &a [*a]\npublished:\n", [":12: source: input should be text"]),
    "Python object": ("name: tiny", "name: !!python/object:os.system x", ["study.yaml:1: name: input should be text"]),
    "two documents": ("tuning:", "---\ntuning:", ["not valid YAML", "another document"]),
}  # fmt: skip

WHOLE_FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "a study file is a mapping of keys, such as `name: my_study`, but it is empty"),
    "a list": (b"- 1\n- 2\n", "a study file is a mapping of keys, such as `name: my_study`, but this is [1, 2]"),
    "bytes": (b"\xff\xfe\x00\x80", "not valid YAML: it is not UTF-8 text"),
    "control character": (b"name: \x07\n", "not valid YAML"),
}

# name -> (arguments, parts of the one error line); FILE is a good file, FOLDER its folder
FLAGS: dict[str, tuple[list[str], list[str]]] = {
    "no such file": (["run", "nowhere.yaml"], ["nowhere.yaml: no such study file; the shipped studies are cifar10_split_gap.yaml, cifar10_steps_to_target.yaml, demo.yaml, digits.yaml"]),
    "misspelt shipped study": (["run", "digist"], ["digist: no such study file; did you mean `digits.yaml`?"]),
    "folder without a study": (["run", "FOLDER"], ["no study here; a study's folder holds a study.yaml"]),
    "no file at all": (["run"], ["Missing argument", "file"]),
    "--set without value": (["run", "FILE", "--set", "tuning.trials"], ["--set tuning.trials: must be KEY=VALUE"]),
    "--set with broken YAML": (["run", "FILE", "--set", "cells.batch_size=[1"], ["--set cells.batch_size=[1: the value is not valid YAML"]),
    "--set of an unknown key": (["run", "FILE", "--set", "tuning.trails=3"], ["command line: tuning.trails: unknown key; did you mean `trials`?"]),
    "--set below a value": (["run", "FILE", "--set", "model.name=x"], ["--set model.name: `model` is not a mapping, but 'lenet5'"]),
    "zero epochs": (["run", "FILE", "--epochs", "0"], ["command line: budget.epochs: input should be greater than 0; got 0"]),
    "epochs as text": (["run", "FILE", "--epochs", "few"], ["--epochs", "valid integer"]),
    "unknown flag": (["run", "FILE", "--epoch", "3"], ["--epoch"]),
    "unsafe --name": (["run", "FILE", "--name", "a/b"], ["command line: name: input should be letters", "got 'a/b'"]),
    "--workers without work": (["run", "FILE", "--workers", "99"], ["command line: resources.workers: must be no more than", "32; got 99"]),
    "storage is a file": (["run", "FILE", "--storage", "FILE"], ["cannot be written: Not a directory"]),
    "storage is no file system": (["run", "FILE", "--storage", "/proc/lbstudy"], ["/proc/lbstudy/tiny: cannot be written"]),
    "storage of an unknown kind": (["run", "FILE", "--storage", "ftp://bucket"], ["ftp://bucket: must be a folder, or an address that begins with s3://, gs://"]),
    "storage with credentials": (["run", "FILE", "--storage", "s3://key:secret@bucket"], ["s3://bucket: credentials do not belong into an address"]),
    "storage without a bucket": (["run", "FILE", "--storage", "s3://"], ["s3://: names no bucket; write s3://BUCKET/FOLDER"]),
    "storage with an unknown option": (["run", "FILE", "--storage", "s3://bucket/x?endpont=a"], ["unknown option `endpont`; allowed are region, scheme, endpoint_override"]),
    "storage holds something else": (["run", "FILE", "--storage", "OCCUPIED"], ["is not empty and holds no study"]),
    "data for what has no files": (["run", "FILE", "--data", "/nowhere"], ["--data /nowhere: the study's data, synthetic, are in no files"]),
    "data nowhere": (["run", "FILE", "--set", "dataset={name: image_folder}", "--data", "/nowhere"], ["command line: dataset.root: no image tree in /nowhere"]),
    "plan of a bad study": (["plan", "FILE", "--trials", "-1"], ["command line: tuning.trials: input should be greater than 0; got -1"]),
    "doctor of a bad study": (["doctor", "nowhere.yaml"], ["nowhere.yaml: no such study file"]),
    "best of no study": (["best", "FOLDER"], ["no study here"]),
    "unknown format": (["best", "FOLDER", "--format", "xls"], ["--format", "'xls'"]),
    **{f"{verb} of no study": ([verb, "FOLDER"], ["no study here"]) for verb in ("confirm", "landscape", "sharpness", "figures", "report", "status")},
    "table of no study": (["table", "FOLDER", "gap"], ["no study here"]),
    "unknown table": (["table", "FOLDER", "gaps"], ["'gaps'", "targets"]),
    "targets of another table": (["table", "FOLDER", "gap", "--loss", "1"], ["--loss and --accuracy are for the tables `targets` and `critical`, but got `gap`"]),
    "no seed to confirm with": (["confirm", "FOLDER", "--seeds", "0"], ["--seeds", "greater than or equal to 1"]),
    "confirm on other samples": (["confirm", "FOLDER", "--train-on", "test"], ["--train-on", "'test'"]),
    "unknown landscape": (["landscape", "FOLDER", "--kind", "cube"], ["--kind", "'cube'"]),
    "landscape of no samples": (["landscape", "FOLDER", "--samples", "0"], ["--samples", "greater than or equal to 1"]),
    "unknown normalisation": (["landscape", "FOLDER", "--normalisation", "filters"], ["--normalisation", "'filters'"]),
    "figures in an unknown format": (["figures", "FOLDER", "--format", "bmp"], ["--format", "'bmp'"]),
}  # fmt: skip


def paint(path: Path, size: tuple[int, int] = (20, 20), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


def corrupt_image(root: Path) -> None:
    (root / "train" / "dog" / "003.png").write_bytes(b"not an image")


def truncated_image(root: Path) -> None:
    path = root / "train" / "dog" / "004.png"
    path.write_bytes(path.read_bytes()[:48])


def rename_test_class(root: Path) -> None:
    (root / "test" / "dog").rename(root / "test" / "bird")


def only_one_class(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "dog").rename(root.parent / f"{part}-dog")


def empty_class(root: Path) -> None:
    for image in (root / "test" / "dog").iterdir():
        image.unlink()


def no_images(root: Path) -> None:
    for image in (root / "test").glob("*/*"):
        image.rename(image.with_suffix(".txt"))


def small_images(root: Path) -> None:
    for image in root.glob("*/*/*"):
        paint(image, (15, 20))


# name -> (what is done to a good image tree, keys of the data set, parts of the one error line)
TREES: dict[str, tuple[Callable[[Path], object], str, list[str]]] = {
    "corrupt image": (corrupt_image, "", ["study.yaml:3: dataset.root:", "dog/003.png is no readable image"]),
    "truncated image": (truncated_image, "", ["dataset.root:", "dog/004.png is no readable image"]),
    "image of another size": (lambda root: paint(root / "train" / "dog" / "odd.png", (21, 20)), "", ["odd.png is 20x21, the images before it are 20x20; set dataset.image_size"]),
    "pixels without a range": (lambda root: paint(root / "train" / "dog" / "odd.tif", mode="F"), "", ["odd.tif has pixels of floating-point numbers, whose range is not known"]),
    "different classes": (rename_test_class, "", ["have different classes: bird, dog"]),
    "one class": (only_one_class, "", ["two classes or more are needed; got cat in"]),
    "class without images": (empty_class, "", ["class 'dog' has no test images in"]),
    "no images": (no_images, "", ["no images in"]),
    "images too small for the model": (small_images, "", ["study.yaml:2: model: lenet5 cannot be built for images of 3x20x15 and 2 classes: "]),
    "images made too small": (lambda root: None, "image_size: 12, ", ["model: lenet5 cannot be built for images of 3x12x12 and 2 classes: "]),
    "not the data set it should be": (lambda root: None, "name: mnist, ", ["is not mnist: it has 2 classes of 3x20x20, not 10 of 1x28x28"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs; its cache lies elsewhere, and it has no Ray."""

    def no_ray(*arguments: object, **options: object) -> None:
        raise AssertionError("Ray was started")

    from lbstudy.tuning import tuner

    monkeypatch.setattr(tuner, "connect", no_ray)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "run" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Run a command that must be refused; returns its error lines."""
    before = {path: path.stat().st_size for path in Path.cwd().rglob("*")}
    monkeypatch.setattr(sys, "argv", ["lbstudy", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert "Traceback" not in printed.err
    assert "starting Ray" not in printed.err
    assert {path: path.stat().st_size for path in Path.cwd().rglob("*")} == before
    return [line for line in printed.err.splitlines() if line.lower().startswith("error:")]


def the_error(*arguments: object) -> str:
    lines = errors(*arguments)  # type: ignore[arg-type]
    assert len(lines) == 1, "\n".join(lines)
    return lines[0]


def contains(line: str, parts: list[str]) -> None:
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize("case", FILES)
def test_bad_file(case: str, place: Path, monkeypatch, capsys):
    old, new, parts = FILES[case]
    assert GOOD.count(old) == 1
    (place / "study.yaml").write_text(GOOD.replace(old, new))
    contains(the_error(monkeypatch, capsys, "run", "study.yaml"), parts)


@pytest.mark.parametrize("case", WHOLE_FILES)
def test_file_that_is_no_study(case: str, place: Path, monkeypatch, capsys):
    content, part = WHOLE_FILES[case]
    (place / "study.yaml").write_bytes(content)
    contains(the_error(monkeypatch, capsys, "run", "study.yaml"), ["study.yaml", part])


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flag(case: str, place: Path, monkeypatch, capsys):
    arguments, parts = FLAGS[case]
    (place / "good.yaml").write_text(GOOD)
    (place / "occupied" / "tiny").mkdir(parents=True)
    (place / "occupied" / "tiny" / "thesis.tex").write_text("do not touch")
    names = {"FILE": "good.yaml", "FOLDER": "folder", "OCCUPIED": "occupied"}
    contains(the_error(monkeypatch, capsys, *(names.get(a, a) for a in arguments)), parts)


@pytest.mark.parametrize("case", TREES)
def test_bad_image_tree(case: str, place: Path, tmp_path: Path, monkeypatch, capsys):
    spoil, keys, parts = TREES[case]
    root = tmp_path / "tree"
    for part, count in (("train", 50), ("test", 4)):
        for name in ("cat", "dog"):
            for number in range(count):
                paint(root / part / name / f"{number:03d}.png")
    spoil(root)
    keys = keys if "name" in keys else f"name: image_folder, {keys}"
    (place / "study.yaml").write_text(GOOD.replace("name: synthetic, samples: 640", f"{keys}root: {root}"))
    contains(the_error(monkeypatch, capsys, "run", "study.yaml"), parts)


def idx(values: np.ndarray) -> bytes:
    """MNIST's own format: magic number, sizes, bytes."""
    return b"".join(n.to_bytes(4, "big") for n in (0x800 + values.ndim, *values.shape)) + values.tobytes()


@pytest.mark.parametrize(
    ("spoil", "part"),
    {
        "images and labels": ("train-labels", "the training set in /", " has 600 images, but 599 labels"),
        "label out of range": ("t10k-labels", "the test labels in /", " should be 0 to 9; got 0 to 77"),
        "damaged": ("t10k-images", "mnist in /", " is damaged: "),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_mnist(spoil: str, part: tuple[str, str, str], place: Path, tmp_path: Path, monkeypatch, capsys):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 600), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(np.zeros((count, 28, 28), np.uint8)))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels))
    if spoil == "images and labels":
        (raw / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(599, np.uint8)))
    elif spoil == "label out of range":
        (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([0, 77] * 10, np.uint8)))
    else:
        (raw / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03rubbish")
    text = GOOD.replace("name: synthetic, samples: 640", f"name: mnist, root: {tmp_path / 'data'}")
    (place / "study.yaml").write_text(text)
    contains(the_error(monkeypatch, capsys, "run", "study.yaml"), ["study.yaml:3: dataset.root: ", *part[1:]])


def test_all_problems_are_told_at_once_in_the_order_of_the_file(place: Path, monkeypatch, capsys):
    """What pydantic finds and what only the whole study tells, together."""
    text = GOOD.replace("lenet5", "x").replace("{trials: 4}", "{trials: none}").replace("rate: 0.5", "rate: 5")
    (place / "study.yaml").write_text(text)
    lines = errors(monkeypatch, capsys, "run", "study.yaml")
    assert [line.split(": ")[2] for line in lines] == ["model", "published.0.params.learning_rate", "tuning.trials"]


def test_what_the_command_line_narrows_is_not_a_slip(place: Path, monkeypatch, capsys):
    """Ranges of cells that --set takes away stay without effect; the next error is the one to see."""
    (place / "good.yaml").write_text(GOOD)
    sets = ["cells.smoothing=[none]", "published=[]", "cells.exclude=[{optimizer: lars}]", "tuning.trials=0"]
    arguments = [part for text in sets for part in ("--set", text)]
    contains(the_error(monkeypatch, capsys, "run", "good.yaml", *arguments), ["tuning.trials"])


def test_numbers_of_yaml_1_1_and_merge_keys_are_taken(place: Path, monkeypatch, capsys):
    text = GOOD.replace("[0.1, 1]", "['1e-1', 1e0]").replace("tuning: {trials", "tuning: {<<: {sampler: qmc}, trials")
    (place / "good.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["lbstudy", "plan", "good.yaml"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    assert "qmc" in capsys.readouterr().out
