"""The studies that are shipped with their records: today's code reads them, and says what their pages say."""

import io
import re
import shutil
from math import isnan
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from lbstudy.analysis.report import page
from lbstudy.console.cli import app
from lbstudy.records.folder import StudyFolder

RESULTS = Path(__file__).parents[2] / "docs/results"
SHIPPED = sorted(path.parent for path in RESULTS.glob("*/study.yaml"))
METHODS = {
    "SGD": ("sgd", "none"), "SGD, Mixup": ("sgd", "mixup"),
    "K-FAC": ("kfac", "none"), "K-FAC, Mixup": ("kfac", "mixup"),
}  # fmt: skip
INTERVAL = r"(−?[\d.]+) \[(−?[\d.]+), (−?[\d.]+)\]"


def table(study: str, *kind: str) -> pd.DataFrame:
    """As `table` prints it, or `best` without a kind."""
    command = ["table", str(RESULTS / study), *kind] if kind else ["best", str(RESULTS / study)]
    result = CliRunner().invoke(app, [*command, "--format", "csv"])
    assert result.exit_code == 0, result.stderr
    return pd.read_csv(io.StringIO(result.stdout))


def rows_of(study: str) -> dict[str, list[str]]:
    """The rows of the tables in its README, by their first cell."""
    lines = [line for line in (RESULTS / study / "README.md").read_text().splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in ([part.strip() for part in line.strip("|").split("|")] for line in lines)}


def numbers(cell: str) -> list[float]:
    """A value and the ends of its interval."""
    found = re.fullmatch(INTERVAL, cell)
    assert found, cell
    return [float(part.replace("−", "-")) for part in found.groups()]


def test_critical_batch_sizes():
    found, text = table("steps_to_target", "critical").set_index("optimizer"), (RESULTS / "steps_to_target/README.md")
    for label, optimizer in {"SGD": "sgd", "K-FAC": "kfac"}.items():
        row = found.loc[optimizer]
        line = next(line for line in text.read_text().splitlines() if line.startswith(f"| {label} |") and "[" in line)
        cells = [cell.strip() for cell in line.strip("|").split("|")[1:]]
        for cell, name in zip(cells, ("b_crit", "s_min"), strict=True):
            assert numbers(cell) == [round(row[column]) for column in (name, f"{name}_low", f"{name}_high")]
        assert f"{cells[0]}" in (RESULTS.parents[1] / "README.md").read_text()


def test_the_gap_split():
    found = table("split_gap", "split").query("budget == 'same_updates'").set_index(["optimizer", "smoothing"])
    for label, key in METHODS.items():
        row = found.loc[key] * 1
        for cell, part in zip(rows_of("split_gap")[label], ("gap", "few_updates", "less_noise"), strict=True):
            columns = [part, f"{part}_low", f"{part}_high"]
            assert numbers(cell) == pytest.approx([100 * row[column] for column in columns], abs=0.0501)
        assert row["gap"] == pytest.approx(row["few_updates"] + row["less_noise"], abs=1e-12)


def test_the_slides():
    found, gaps = table("hpml2019"), table("hpml2019", "gap").set_index(["optimizer", "smoothing"])
    rows = rows_of("hpml2019")
    for row in found.to_dict("records"):
        label = f"{'SGD' if row['optimizer'] == 'sgd' else 'K-FAC'} {row['batch_size']}"
        cells = rows[label + ", Mixup" * (row["smoothing"] == "mixup")]
        values = [row[name] for name in ("learning_rate", "mixup_alpha", "damping")]
        assert cells[:3] == ["" if isnan(value) else f"{value:.3g}" for value in values]
        assert float(cells[3]) == pytest.approx(100 * row["val_accuracy"], abs=0.0501)
        columns = ("test_accuracy", "test_low", "test_high")
        assert numbers(cells[4]) == pytest.approx([100 * row[name] for name in columns], abs=0.0501)
        assert float(cells[5]) == pytest.approx(100 * row["test_at_best_epoch"], abs=0.0501)
        assert int(cells[6]) == row["n"]
    for label, key in METHODS.items():
        for cell, gap in zip(rows[label], ("gap", "gap_at_best_epoch"), strict=True):
            columns = (gap, f"{gap}_low", f"{gap}_high")
            assert numbers(cell) == pytest.approx([100 * gaps.at[key, name] for name in columns], abs=0.00501)


@pytest.mark.slow
@pytest.mark.parametrize("study", SHIPPED, ids=lambda path: path.name)
def test_the_page(study: Path, tmp_path: Path):
    folder = StudyFolder.open(str(shutil.copytree(study, tmp_path / study.name)))
    written = page.write(folder)
    assert 100_000 < len(written.read_bytes()) < 3_000_000
