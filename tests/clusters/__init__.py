"""What the tests of cluster files share."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"([\w.-]+(?:\[[\w,]+\])?)==([\w.+]+)")


def pinned_versions() -> dict[str, str]:
    """What pyproject.toml pins of what a study needs to run: by name, with extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = project["project"]["optional-dependencies"]["run"]
    names = {re.split(r"[<>=\[]", line)[0] for line in needed}
    pins = dict(
        m.groups() for line in [*needed, *project["tool"]["uv"]["constraint-dependencies"]] if (m := PIN.match(line))
    )
    return {name: version for name, version in pins.items() if name.split("[")[0] in names}
