"""How near a run has come to its target, and when it got there.

A run has reached its target at the first evaluation that meets it: at the end of an epoch, or within one
(`evaluate_every`). Until then what counts is how near it has come: the best value of the metric so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lbstudy.study.run import Target


@dataclass
class Pursuit:
    """What reports say of a run and its target; all of it is None where the run has none."""

    target: Target | None
    run_seconds: float | None = field(default=None, init=False)  # of the run so far, training and evaluation
    nearest: float | None = field(default=None, init=False)  # the best value of the target's metric so far
    steps_to_target: int | None = field(default=None, init=False)  # None until the target is reached
    epochs_to_target: float | None = field(default=None, init=False)  # a part of an epoch by its steps
    seconds_to_target: float | None = field(default=None, init=False)

    def see(self, found: Mapping[str, Any], before: float) -> bool:
        """Take in an evaluation, and say whether the target has been reached.

        Args:
            found: `step`, `epochs`, `seconds` (of the present epoch so far), and what was measured.
            before: seconds of the epochs before.
        """
        if self.target is None:
            return False
        self.run_seconds = before + found["seconds"]
        value = found[self.target.measured]
        if math.isfinite(value):
            best = max if self.target.is_accuracy else min
            self.nearest = value if self.nearest is None else best(value, self.nearest)
        if self.steps_to_target is None and self.target.is_met(value):
            self.steps_to_target, self.epochs_to_target = found["step"], found["epochs"]
            self.seconds_to_target = self.run_seconds
        return self.steps_to_target is not None

    def state_dict(self) -> dict[str, Any]:
        """What a report says, and a continuation needs."""
        return {name: value for name, value in asdict(self).items() if name != "target"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        for name, value in state.items():
            setattr(self, name, value)
