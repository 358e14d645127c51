"""By which rule results in a study's folder were made, so that old ones are never mixed with new ones.

A kind of result gets a new rule when the same settings come to give other numbers. Results say theirs (`rule` in
`settings.json`, and in a file of sharpness); those without one were made by rule 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RULES = {"sharpness": 2, "interpolate": 2}
"""Kind of result -> its rule now; 1 for every other kind."""

CHANGES = {
    "sharpness": "Keskar's subspaces now move a weight no farther than the full box, and there are several; the worst "
    "rise counts the solution itself",
    "interpolate": "running variances now go geometrically, and stay positive beyond the solutions",
}
"""Kind of result -> what is different in its rule now."""


class OldRule(ValueError):
    """A result was made by another rule than today's."""


def require_rule(kind: str, made: Mapping[str, Any]) -> None:
    """Check what settings or a result say of their rule.

    Raises:
        OldRule: it is not today's.
    """
    rule, now = made.get("rule", 1), RULES.get(kind, 1)
    if rule != now:
        raise OldRule(f"made by rule {rule}, and the rule is {now} now: {CHANGES.get(kind, 'see the documentation')}")
