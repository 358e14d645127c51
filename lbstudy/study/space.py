"""Search ranges: the values a hyper-parameter may take in a cell, and how near to an end a value lies."""

from __future__ import annotations

from math import isfinite, log
from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field, model_validator

from lbstudy.study.factors import Value
from lbstudy.study.run import OptimizerName, Spec

if TYPE_CHECKING:
    from lbstudy.study.spec import Cell

EDGE_SHARE = 0.05
"""A best value within this share of the range from one of its ends says that the range may be too narrow."""


class Condition(Spec):
    """Which cells an entry is for. An empty list means any. Further factors of the cells go by their keys, and named
    values by their names; `load` refuses keys that are no factors."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, list[Value]]

    optimizer: list[OptimizerName] = []
    batch_size: list[int] = []
    smoothing: list[str] = Field(
        [], description="a smoothing, or one of its parts: `mixup` matches `mixup` and `mixup+noise`"
    )

    @model_validator(mode="before")
    @classmethod
    def _scalars_are_lists_of_one(cls, value: object) -> object:
        if isinstance(value, dict):
            return {key: v if isinstance(v, list | dict) else [v] for key, v in value.items()}
        return value

    @model_validator(mode="after")
    def _known_smoothing(self) -> Condition:
        known = {"none", "mixup", "noise", "mixup+noise"}
        unknown = [s for s in self.smoothing if s not in known]
        if unknown:
            raise ValueError(f"smoothing should be one of {', '.join(sorted(known))}; got {unknown[0]!r}")
        return self

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
    """The range of one hyper-parameter: exactly one of the four kinds, and the cells it is for."""

    log_uniform: tuple[float, float] | None = Field(None, description="[low, high], uniform in the logarithm")
    uniform: tuple[float, float] | None = Field(None, description="[low, high]")
    integer: tuple[int, int] | None = Field(None, alias="int", description="[low, high], both included")
    choice: list[float] | None = Field(None, description="a list of numbers")
    when: Condition = Field(Condition(), description="the cells that tune this; default: all")

    @model_validator(mode="after")
    def _one_sound_kind(self) -> Range:
        given = [kind for kind in ("log_uniform", "uniform", "integer", "choice") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of log_uniform, uniform, int, choice; got {', '.join(given) or 'none'}")
        if self.choice is not None:
            if len(set(self.choice)) < 2 or not all(map(isfinite, self.choice)):
                raise ValueError(f"`choice` needs at least two different finite numbers, but got {self.choice}")
            return self
        low, high = self.bounds
        if not (isfinite(low) and isfinite(high) and low < high):
            raise ValueError(f"`low < high` must hold, but got low={low:g}, high={high:g}")
        if self.log_uniform and low <= 0:
            raise ValueError(f"`low > 0` must hold for log_uniform, but got low={low:g}")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value."""
        if self.choice is not None:
            return min(self.choice), max(self.choice)
        return self.log_uniform or self.uniform or self.integer  # type: ignore[return-value]

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
        kind = " log" if self.log_uniform else " int" if self.integer else ""
        return f"[{low:g}, {high:g}]{kind}"
