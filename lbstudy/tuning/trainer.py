"""The `TorchTrainer` of a lane: Ray Train's own, without two actors that a lane has no use for.

Each is a process of some 115 MB on the head, for every lane. One hands out shards of Ray Data's data sets, which a lane
does not have. The other removes the placement group of a controller that has died; `supervisor` does that for all lanes
of a study, and without the State API, for which Ray would have to start its dashboard.
"""

from __future__ import annotations

from typing import Any

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

LEFT_OUT = (DatasetsCallback, PlacementGroupCleanerCallback)


class LaneTrainer(TorchTrainer):
    """Ray has no public way to leave its callbacks out; this is the one place where it makes them."""

    def _create_default_callbacks(self) -> list[Any]:
        found: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # mypy sees the first version
        return [callback for callback in found if not isinstance(callback, LEFT_OUT)]
