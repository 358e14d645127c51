"""The study file as text: YAML with line numbers, and errors that say where they are and what is allowed.

`StudyFile` reads a file and takes the command line's changes; `explain` puts pydantic's findings into plain words.
What a study means is `study.py`'s business: this module is handed the class that describes it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from inspect import isclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lbstudy.storage import StoragePath
from lbstudy.study.run import Spec

Keys = tuple[str | int, ...]

# What these keys allow, in words; for the others it follows from their types.
ALLOWED = {
    ("cells", "optimizer"): "a list of names",
    ("cells", "smoothing"): "a list of names",
    ("batch_norm",): "'sync', or {ghost: N} with N at least 2",
    ("tuning", "pruner"): "'none', or {name: asha, grace_period: EPOCHS, reduction_factor: R}",
    ("tuning", "target"): "{val_accuracy: A}, {val_loss: L} or {train_loss: L}, or 'auto'",
    ("resources", "gpus_per_worker"): "'auto', or a number from 0 up",
    ("dataset", "validation_size"): "a number of samples, or a fraction below 1",
}
ALLOWED_IN_RANGES = {
    "uniform": "[low, high], two numbers",
    "log_uniform": "[low, high], two numbers",
    "one_minus_log_uniform": "[low, high], two numbers",
    "int": "[low, high], two whole numbers",
    "choice": "a list of numbers",
}
A_RANGE = "a range, such as {uniform: [0.1, 1]}, or a list of ranges"
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class StudyError(Exception):
    """A study that cannot be run as it stands. The message is meant for the person who wrote it."""


@contextmanager
def writing(place: object) -> Iterator[None]:
    """Write something there.

    Raises:
        StudyError: it cannot be written; says where, and why.
    """
    try:
        yield
    except OSError as error:
        raise StudyError(f"{place}: cannot be written: {error.strerror or error}") from error


class NothingYet(StudyError):
    """What comes before has not come to anything that a step could go on from."""


class Problem(NamedTuple):
    """What is wrong with the value at some keys."""

    keys: Keys
    message: str


class KeyProblems(StudyError):
    """Problems with certain keys, found where the file is not known; `StudyFile.error` adds file and line."""

    def __init__(self, *problems: Problem):
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(f"{dotted(keys)}: {message}" for keys, message in self.problems)


class StudyFile:
    """A study file and the values that replace some of its own.

    Args:
        path: the YAML file.
        overrides: values that replace those of the file, by dotted key (`tuning.trials`).

    Raises:
        StudyError: it cannot be read, or is no mapping.
    """

    def __init__(self, path: StoragePath, overrides: Mapping[str, Any] | None = None):
        self.path = path
        self._raw = _read_yaml(path)
        if not isinstance(self._raw, dict):
            found = "it is empty" if self._raw is None else f"this is {show(self._raw)}"
            raise StudyError(f"{path}: a study file is a mapping of keys, such as `name: my_study`, but {found}")
        self._overridden: set[Keys] = set()
        for key, value in (overrides or {}).items():
            self._override(key, value)
        try:
            self.content: dict[str, Any] = _plain(self._raw)
        except RecursionError as error:
            raise StudyError(f"{path}: an alias contains itself, or the file is nested too deeply") from error

    def changes(self, section: str) -> bool:
        """Whether the command line changes anything in a section."""
        return any(keys[0] == section for keys in self._overridden)

    def error(self, problems: Iterable[Problem]) -> StudyError:
        """All problems as one error, one a line, in the order of the file; of several with a key, the first."""
        first_of_each_key = dict(reversed([(self._as_written(keys), message) for keys, message in problems]))
        found = [(*self._where(keys), f"{dotted(keys)}: {message}") for keys, message in first_of_each_key.items()]
        lines = [f"{where}: {text}" for _, where, text in sorted(found, key=lambda entry: entry[0])]
        return StudyError("\n".join(dict.fromkeys(lines)))

    def _as_written(self, keys: Keys) -> Keys:
        """Without the index of a list of one that the file writes without brackets."""
        node: Any = self.content
        written: list[str | int] = []
        for part in keys:
            if isinstance(part, int) and isinstance(node, dict):
                continue
            written.append(part)
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                node = None
        return tuple(written)

    def _where(self, keys: Keys) -> tuple[int, str]:
        """The nearest line (0 where none is known), and how to write the place."""
        if any(keys[: len(changed)] == changed for changed in self._overridden):
            return 0, "command line"
        node, line = self._raw, None
        for part in keys:
            position = getattr(node, "lc", None)  # values from the command line have no lines
            with suppress(AttributeError, KeyError, TypeError, IndexError):
                line = (position.key if isinstance(node, dict) else position.item)(part)[0]  # type: ignore[union-attr]
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                break
        return (line or 0), f"{self.path}:{line + 1}" if line is not None else str(self.path)

    def _override(self, key: str, value: Any) -> None:
        section, _, rest = key.partition(".")
        one_key = section == "cells" or key.startswith("search.schedule.")  # of a factor, and of a schedule's number
        *parents, last = [section, rest] if one_key and rest else key.split(".")
        node: Any = self._raw
        for depth, part in enumerate(parents):
            if not isinstance(node.get(part, {}), dict):
                raise StudyError(
                    f"--set {key}: `{'.'.join(parents[: depth + 1])}` is not a mapping, but {show(node[part])}"
                )
            node = node.setdefault(part, {})
        node[last] = value
        self._overridden.add((*parents, last))


def parse_override(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` of --set: a dotted key and a YAML value."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise StudyError(f"--set {text}: must be KEY=VALUE, such as --set tuning.sampler=random")
    try:
        return key.strip(), YAML(typ="safe", pure=True).load(value)
    except YAMLError as error:
        raise StudyError(f"--set {text}: the value is not valid YAML: {_what(error)}") from error


def dotted(keys: Keys) -> str:
    """Keys as they are written in messages and in --set."""
    return ".".join(map(str, keys)) or "study"


def show(value: Any) -> str:
    """A value as it may stand in a study file, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {show(entry)}" for key, entry in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(map(show, value)) + "]"
    else:
        text = repr(value) if isinstance(value, str | int | float) else str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def nearest(word: Any, known: Iterable[str], known_at_most: int = 12) -> str:
    """`; did you mean ...?`, or else what is known, if that is not too long a list."""
    names = list(known)
    if close := difflib.get_close_matches(str(word), names, n=1):
        return f"; did you mean `{close[0]}`?"
    return f"; known are {', '.join(names)}" if len(names) <= known_at_most else ""


def explain(error: ValidationError, content: dict[str, Any], root: type[Spec]) -> list[Problem]:
    """pydantic's findings in plain words, one for each thing that is wrong.

    Args:
        error: what pydantic found.
        content: the study file.
        root: the class that describes it.
    """
    problems: list[Problem] = []
    missing: list[Problem] = []
    branches: dict[Keys, list[Problem]] = {}  # what each branch of a union found, by the union's keys
    instead: set[Keys] = set()  # keys meant by unknown ones
    for entry in error.errors():
        keys, union = _split(tuple(entry["loc"]), entry["type"] == "missing", content)
        if entry["type"] == "extra_forbidden":
            meant = _meant(keys, root)
            instead |= {meant[:1], meant} if meant else set()
            hint = f"; did you mean `{dotted(meant if meant[:-1] != keys[:-1] else meant[-1:])}`?" if meant else ""
            hint = hint or f"; known are {', '.join(_names(_annotation(root, keys[:-1])))}"
            problems.append(Problem(keys, f"unknown key{hint}"))
        elif entry["type"] == "missing" and entry["loc"][-1] == keys[-1]:
            missing.append(Problem(keys, f"is required, but missing; it should be {_allowed(keys, root)}"))
        else:
            found = Problem(keys, _message(dict(entry), keys, root))
            branches.setdefault(keys[:union], []).append(found) if union is not None else problems.append(found)
    for keys, found_there in branches.items():
        inside = [problem for problem in found_there if len(problem.keys) > len(keys)]
        got = show(_value(content, keys))
        known = any(len(problem.keys) > len(keys) and problem.keys[: len(keys)] == keys for problem in problems)
        problems += inside or ([] if known else [Problem(keys, f"input should be {_allowed(keys, root)}; got {got}")])
    return problems + [problem for problem in missing if problem.keys not in instead]


def truths_as_numbers(content: dict[str, Any], root: type[Spec]) -> Iterator[Problem]:
    """`true` where a number belongs; pydantic would take it for 1."""

    def leaves(node: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
        entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in entries:
            yield from leaves(value, (*keys, key))
        if isinstance(node, bool):
            yield keys, node

    for keys, value in leaves(content, ()):
        kinds = _options(_annotation(root, keys))
        kinds += [inner for kind in kinds if get_origin(kind) is list for inner in _options(get_args(kind)[0])]
        if bool not in kinds and {int, float} & {kind for kind in kinds if isclass(kind)}:
            yield Problem(keys, f"input should be {_allowed(keys, root)}; got {show(value)}")


def _read_yaml(path: StoragePath) -> Any:
    """Parse YAML 1.2, where 1e-3 is a number; duplicate keys are errors. Values keep their line numbers."""
    try:
        return YAML(typ="rt", pure=True).load(path.read_text(encoding="utf-8-sig"))
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise StudyError(f"{path}{line}: not valid YAML: {_what(error)}") from error
    except (YAMLError, ValueError, RecursionError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else _what(error)
        raise StudyError(f"{path}: not valid YAML: {reason}") from error
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror or error}") from error


def _what(error: Exception) -> str:
    """What a YAML error is about, on one line."""
    return re.sub(r"\s+", " ", str(getattr(error, "problem", None) or error)).strip()


def _plain(node: Any) -> Any:
    """The same as plain dictionaries and lists, merge keys resolved."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, list) else node


def _value(content: Any, keys: Keys) -> Any:
    for key in keys:
        content = content[key]
    return content


def _split(loc: Keys, missing: bool, content: Any) -> tuple[Keys, int | None]:
    """The keys of the file in pydantic's location, and how many of them lead to a union, whose branches it names."""
    node, keys, union = content, [], None
    for position, part in enumerate(loc):
        inside = isinstance(node, dict) and part in node
        if inside or (isinstance(node, list) and isinstance(part, int) and part < len(node)):
            node = node[part]
            keys.append(part)
        elif isinstance(part, str) and missing and position == len(loc) - 1:
            keys.append(part)
        elif isinstance(part, str):
            union = len(keys)  # otherwise a list of one that the file may write without brackets
    return tuple(keys), union


def _message(entry: Mapping[str, Any], keys: Keys, root: type[Spec]) -> str:
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    text = entry["msg"].removeprefix("Value error, ")
    text = text[0].lower() + text[1:]
    if kind == "value_error":
        return text if "got " in text else f"{text}; got {show(value)}"
    if kind == "string_pattern_mismatch":
        text = "input should be letters, digits, '.', '_' and '-' only, with a letter or digit first"
    elif kind == "string_too_long":
        text = f"input should be at most {context['max_length']} characters long"
    elif kind == "literal_error":
        hint = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", context["expected"]), n=1)
        return f"{text}; got {show(value)}" + (f"; did you mean '{hint[0]}'?" if hint else "")
    elif kind == "too_short":
        text = "input should have at least one entry"
    elif not kind.startswith(("greater_than", "less_than")):
        text = f"input should be {_allowed(keys, root)}"
    return f"{text}; got {show(value)}"


def _allowed(keys: Keys, root: type[Spec]) -> str:
    """What may stand at these keys."""
    named = tuple(key for key in keys if isinstance(key, str))
    if named in ALLOWED:
        return ALLOWED[named]
    if named[0] == "search" and named[-1] in ALLOWED_IN_RANGES:
        return ALLOWED_IN_RANGES[named[-1]]
    if named[0] == "search" and len(named) == 2:
        return A_RANGE
    return " or ".join(map(_in_words, _options(_annotation(root, keys)))) or "left out"


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(filter(None, (", ".join(map(repr, get_args(kind)[:-1])), repr(get_args(kind)[-1]))))
    if get_origin(kind) in (list, tuple):
        return f"a list; each entry {_in_words(_options(get_args(kind)[0])[0])}"
    if names := _names(kind):
        return f"a mapping; its keys are {', '.join(names)}"
    return WORDS.get(kind, "a mapping")


def _names(annotation: Any) -> list[str]:
    """The keys that the mapping at an annotation knows."""
    specs = [kind for kind in _options(annotation) if isclass(kind) and issubclass(kind, Spec)]
    specs += [spec for kind in _options(annotation) if get_origin(kind) is list for spec in get_args(kind)[:1]]
    return [f.alias or name for spec in specs if hasattr(spec, "model_fields") for name, f in spec.model_fields.items()]


def _meant(keys: Keys, root: type[Spec]) -> Keys:
    """The keys that an unknown key most likely stands for; () if there are none.

    The same key at one other place is a matter of nesting; a similar one beside it, or else anywhere, is a slip.
    """
    word, known = str(keys[-1]), list(paths(root))
    same = [path for path in known if path[-1] == word]
    if len(same) == 1:
        return same[0]
    if close := difflib.get_close_matches(word, _names(_annotation(root, keys[:-1])), n=1):
        return (*keys[:-1], close[0])
    close = difflib.get_close_matches(word, {str(path[-1]) for path in known}, n=1, cutoff=0.8)
    similar = [path for path in known if path[-1] in close]
    return similar[0] if len(similar) == 1 else ()


def paths(annotation: Any) -> Iterator[Keys]:
    """All keys of the mappings below, but not those inside lists."""
    for kind in _options(annotation):
        if isclass(kind) and issubclass(kind, Spec):
            for name, field in kind.model_fields.items():
                yield (field.alias or name,)
                yield from ((field.alias or name, *path) for path in paths(field.annotation))


def _annotation(root: Any, keys: Keys) -> Any:
    """The type of the value at these keys; None where there is no such key."""
    for key in keys:
        root = _step(root, key)
    return root


def _step(annotation: Any, key: str | int) -> Any:
    for kind in _options(annotation):
        if isclass(kind) and issubclass(kind, Spec):
            for name, field in kind.model_fields.items():
                if key == (field.alias or name):
                    return field.annotation
        elif get_origin(kind) in (list, tuple):
            inner = get_args(kind)[0]
            return inner if isinstance(key, int) else _step(inner, key)  # a list of one, written without brackets
        elif get_origin(kind) is dict:
            return get_args(kind)[1]
    return None


def _options(annotation: Any) -> list[Any]:
    """The branches of a union, null left out."""
    if annotation is None or annotation is NoneType:
        return []
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for branch in get_args(annotation) for kind in _options(branch)]
    return [annotation]
