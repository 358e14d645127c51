"""What else a result may depend on: versions, commit and machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ["lbstudy", "ray", "torch", "torchvision", "optuna", "numpy", "pandas"]


def utc_now() -> str:
    """The present time, as records hold it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def environment() -> dict[str, Any]:
    """Versions, commit and machine of this process."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "started": utc_now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": versions,
        "commit": _commit(),
        "machine": {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()},
    }


def other_versions(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of Python, the packages and the commit is another: `torch 2.10.0 then, 2.11.0 now`. What either does not
    know does not count.

    Args:
        before: an `environment`, as a study's folder has kept it.
        now: another.
    """
    old, new = _versions(before), _versions(now)
    return [f"{name} {old[name]} then, {new[name]} now" for name in new if old.get(name, new[name]) != new[name]]


def following(before: dict[str, Any]) -> dict[str, Any]:
    """The `environment` of now, with those before it that had other versions as `earlier`.

    Args:
        before: the one that is there; empty where there is none.
    """
    now = environment()
    earlier = before.pop("earlier", [])
    if other_versions(before, now):
        earlier = [*earlier, {key: before.get(key) for key in ("started", "python", "packages", "commit")}]
    return now | ({"earlier": earlier} if earlier else {})


def _versions(known: dict[str, Any]) -> dict[str, str]:
    packages = known.get("packages")
    versions = {"Python": known.get("python")} | (packages if isinstance(packages, dict) else {})
    return {name: str(version) for name, version in (versions | {"commit": known.get("commit")}).items() if version}


def _commit() -> str | None:
    """The commit of the source tree that runs, marked where it has uncommitted changes; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed: a repository around it is somebody else's
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
