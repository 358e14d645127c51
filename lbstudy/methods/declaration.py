"""What every method says about itself, and how a method is found by its name.

A built-in method is a module of its room that holds a declaration; its name is the module's. A method of a user's own
is named `module:attribute`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, TypeVar, cast

from pydantic import Field, create_model

from lbstudy.study.run import RunSpec, Spec

Function = TypeVar("Function", bound=Callable[..., Any])
_remembering: list[Any] = []


def remembered(function: Function) -> Function:
    """`functools.cache` until `forget`, for what depends on a user's modules, which may give way to others."""
    cached = cache(function)
    _remembering.append(cached)
    return cast(Function, cached)


def forget() -> None:
    """Ask all `remembered` functions afresh."""
    for cached in _remembering:
        cached.cache_clear()


class MethodError(ValueError):
    """A method that is not there or cannot be used. The message is meant for the person who named it."""


class RunNumbers(Spec):
    """The hyper-parameters of every run."""

    learning_rate: float = Field(gt=0)
    gradient_clip: float | None = Field(None, gt=0, description="largest global norm of the gradient")


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What a study must know of a method.

    Args:
        label: its name in tables, figures and sentences.
        source: citation.
        numbers: its hyper-parameters, each with bounds, default and a sentence; they may be tuned, or fixed. One
            without a default must be given.
        settings: what else it can be told, `fixed.NAME` of a study.
    """

    label: str
    source: str
    numbers: type[Spec] = Spec
    settings: type[Spec] = Spec

    def own(self, run: RunSpec, name: str) -> tuple[Any, Any]:
        """The method's numbers and settings in a run that names it so."""
        numbers = {number: run.hyper[number] for number in self.numbers.model_fields if number in run.hyper}
        return self.numbers.model_validate(numbers), self.settings.model_validate(run.settings.get(name, {}))


def built_in(room: ModuleType) -> list[str]:
    """The names of a room's methods: of its modules that declare one."""
    return [name for name in _modules(room) if hasattr(_import(f"{room.__name__}.{name}"), "METHOD")]


def find(kind: str, name: str, room: ModuleType, others: Sequence[str] = ()) -> Any:
    """The built-in method of this name, or what a dotted name stands for.

    Args:
        kind: "optimizer" or the like, for the errors.
        name: a module of the room, or `module:attribute`.
        room: package of the built-in ones.
        others: names that are no methods, but may have been meant.

    Raises:
        MethodError: there is none, or its module cannot be imported; then that error is its cause.
    """
    if ":" in name:
        return attribute(kind, name)
    method = getattr(_import(f"{room.__name__}.{name}"), "METHOD", None) if name in _modules(room) else None
    if method is None:
        raise MethodError(unknown(kind, name, [*others, *built_in(room)]) + "; one of your own is named `module:name`")
    return method


@remembered
def attribute(kind: str, name: str) -> Any:
    """What a dotted name, `module:attribute`, stands for. Raises MethodError where there is no such thing."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise MethodError(f"{kind} {name!r} should be `module:name`, such as torch.optim:NAdam")
    try:
        found: Any = _import(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.split(".")[0] == error.name.split(".")[0]:
            raise MethodError(f"{kind} {name}: there is no module {error.name}, in `code` or installed") from None
        raise MethodError(f"{kind} {name}: module {module_name} needs {error.name}, which is not installed") from error
    except Exception as error:  # whatever the user's module does wrong is the user's to read
        raise MethodError(f"{kind} {name}: module {module_name} cannot be imported: {named(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_")]
            raise MethodError(f"{kind} {name}: " + unknown("attribute", part, names, f" in {module_name}"))
        found = getattr(found, part)
    return found


def named(error: BaseException) -> str:
    """An exception's class and what it says, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> str:
    """`there is no KIND NAME`, and what was meant, or what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        hint = f"; did you mean {' or '.join(close)}?"
    else:
        hint = f"; known are {', '.join(names)}" if 0 < len(names) <= 40 else ""
    return f"there is no {kind} {name!r}{where}{hint}"


def numbers_of(constructor: Callable[..., Any], skip: Iterable[str]) -> tuple[type[Spec], dict[str, tuple[str, int]]]:
    """What can be tuned of a constructor: its arguments whose defaults are numbers or switches.

    Args:
        constructor: a class or function.
        skip: arguments that are not for the user.

    Returns:
        Numbers with the arguments' names and defaults, and of those that stand for one entry of a tuple (`beta1` and
        `beta2` of `betas`) the argument and the entry's place.
    """
    fields: dict[str, Any] = {}
    entries: dict[str, tuple[str, int]] = {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        default = parameter.default
        if name in skip or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if isinstance(default, bool | int | float):
            wants_float = parameter.annotation in (float, "float")  # with a default of 0, as torch's momentum
            fields[name] = (float if wants_float else _kind(default), default)
        elif isinstance(default, tuple | list) and default and all(isinstance(n, int | float) for n in default):
            for place, entry in enumerate(default):
                single = f"{name.removesuffix('s')}{place + 1}"
                fields[single], entries[single] = (_kind(entry), entry), (name, place)
    return create_model("Numbers", __base__=Spec, **fields), entries


def _kind(default: float) -> type:
    return bool if isinstance(default, bool) else float if isinstance(default, float) else int


def _import(name: str) -> ModuleType:
    return importlib.import_module(name)


@cache
def _modules(room: ModuleType) -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(room.__path__))
