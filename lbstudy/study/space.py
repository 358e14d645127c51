"""Search ranges: the values a hyper-parameter may take in a cell, and how near to an end a value lies."""

from __future__ import annotations

from math import isfinite, log
from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field, model_validator

from lbstudy.study.factors import Value
from lbstudy.study.run import Spec

if TYPE_CHECKING:
    from lbstudy.study.spec import Cell

EDGE_SHARE = 0.05
"""A best value within this share of the range from one of its ends says that the range may be too narrow."""


class Condition(Spec):
    """Which cells an entry is for. An empty list means any. Further factors of the cells go by their keys, and named
    values by their names; `load` refuses keys that are no factors."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, list[Value]]

    optimizer: list[str] = []
    batch_size: list[int] = []
    smoothing: list[str] = Field([], description="a smoothing, or one of its parts: `a` matches `a` and `a+b`")

    @model_validator(mode="before")
    @classmethod
    def _scalars_are_lists_of_one(cls, value: object) -> object:
        if isinstance(value, dict):
            return {key: v if isinstance(v, list | dict) else [v] for key, v in value.items()}
        return value

    def matches(self, cell: Cell) -> bool:
        """Whether a cell meets the condition."""
        parts, further = {cell.smoothing, *cell.smoothing.split("+")}, dict(cell.factors)
        return (
            (not self.optimizer or cell.optimizer in self.optimizer)
            and (not self.batch_size or cell.batch_size in self.batch_size)
            and (not self.smoothing or bool(parts & set(self.smoothing)))
            and all(further.get(key) in values for key, values in self.__pydantic_extra__.items() if values)
        )


class Range(Spec):
    """The range of one hyper-parameter: exactly one of the five kinds, and the cells it is for."""

    log_uniform: tuple[float, float] | None = Field(None, description="[low, high], uniform in the logarithm")
    uniform: tuple[float, float] | None = Field(None, description="[low, high]")
    one_minus_log_uniform: tuple[float, float] | None = Field(
        None, description="[low, high] of 1 - value, uniform in its logarithm: for momentum and the like"
    )
    integer: tuple[int, int] | None = Field(None, alias="int", description="[low, high], both included")
    choice: list[float] | None = Field(None, description="a list of numbers")
    when: Condition = Field(Condition(), description="the cells that tune this; default: all")

    @model_validator(mode="after")
    def _one_sound_kind(self) -> Range:
        given = [field.alias or kind for kind, field in KINDS.items() if getattr(self, kind) is not None]
        if len(given) != 1:
            kinds = ", ".join(field.alias or kind for kind, field in KINDS.items())
            raise ValueError(f"give exactly one of {kinds}; got {', '.join(given) or 'none'}")
        if self.choice is not None:
            if len(set(self.choice)) < 2 or not all(map(isfinite, self.choice)):
                raise ValueError(f"`choice` needs at least two different finite numbers, but got {self.choice}")
            return self
        low, high = self.searched_bounds
        if not (isfinite(low) and isfinite(high) and low < high):
            raise ValueError(f"`low < high` must hold, but got low={low:g}, high={high:g}")
        if self.is_log and low <= 0:
            raise ValueError(f"`low > 0` must hold for {given[0]}, but got low={low:g}")
        return self

    @property
    def is_log(self) -> bool:
        """Whether the logarithm of what is searched is uniform."""
        return self.log_uniform is not None or self.one_minus_log_uniform is not None

    @property
    def searched_bounds(self) -> tuple[float, float]:
        """Smallest and largest number that is searched, which is `searched` of the value."""
        if self.choice is not None:
            return min(self.choice), max(self.choice)
        return self.log_uniform or self.one_minus_log_uniform or self.uniform or self.integer  # type: ignore[return-value]

    def searched(self, value: float) -> float:
        """What is searched for a value, and the other way round: the value itself, or 1 - value."""
        return 1 - value if self.one_minus_log_uniform else value

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value."""
        low, high = sorted(map(self.searched, self.searched_bounds))
        return low, high

    @property
    def middle(self) -> float:
        """A value from the middle of the range, of a choice the smallest."""
        if self.choice is not None:
            return min(self.choice)
        low, high = self.bounds
        middle = (low * high) ** 0.5 if self.log_uniform else (low + high) / 2
        return int(middle) if self.integer else middle

    def contains(self, value: float) -> bool:
        """Whether the range holds the value."""
        if self.choice is not None:
            return value in self.choice
        low, high = self.bounds
        return low <= value <= high and (self.integer is None or float(value).is_integer())

    def position(self, value: float) -> float:
        """Where the value lies, from 0 (low end) to 1 (high end), in the range's own scale."""
        if self.choice is not None:
            values = sorted(set(self.choice))
            return values.index(value) / (len(values) - 1)
        low, high = self.bounds
        if self.log_uniform:
            return log(value / low) / log(high / low)
        if self.one_minus_log_uniform:
            return log((1 - low) / (1 - value)) / log((1 - low) / (1 - high))
        return (value - low) / (high - low)

    def edge(self, value: float) -> str | None:
        """`low` or `high` if the value lies within EDGE_SHARE of that end, else None.

        Of a choice, the smallest and the largest value are its ends; a choice of two has nothing between them and no
        ends, since its best value would always be one.
        """
        if self.choice is not None and len(set(self.choice)) < 3:
            return None
        position = self.position(value)
        if position <= EDGE_SHARE:
            return "low"
        return "high" if position >= 1 - EDGE_SHARE else None

    def __str__(self) -> str:
        if self.choice is not None:
            return "{" + ", ".join(f"{value:g}" for value in self.choice) + "}"
        low, high = self.bounds
        kind = " log" if self.log_uniform else " int" if self.integer else " log of 1 - x" if self.is_log else ""
        return f"[{low:g}, {high:g}]{kind}"


KINDS = {name: field for name, field in Range.model_fields.items() if name != "when"}
