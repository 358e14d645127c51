"""What a running study says: one updating line per cell on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress import Progress as Bar
from rich.table import Table

from lbstudy.records.trial import FINISHED, TrialRecord
from lbstudy.study.spec import Cell, StudySpec


class Progress:
    """Follows the trials of a study and shows them.

    Args:
        study: the study.
        console: where to show; a terminal gets a live table, anything else a line per finished trial.
        trials: how many each cell gets, by name; default: the study's number. Cells without any are not shown.
    """

    def __init__(self, study: StudySpec, console: Console, trials: Mapping[str, int] | None = None):
        self._study, self._console = study, console
        counts = {
            cell: study.tuning.trials if trials is None else trials.get(cell.name, 0) for cell in study.list_cells()
        }
        self._cells = {cell.name: CellProgress(study, cell, count) for cell, count in counts.items() if count}
        self._total = sum(counts.values())
        self._width = max([24, *map(len, self._cells)])
        self._before: dict[tuple[str, int], float] = {}  # seconds that interrupted trials have trained
        self._already = 0
        self._began: float | None = None
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=4, transient=True)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def take_up(self, records: Iterable[TrialRecord]) -> None:
        """What there was before this session: a line says how many trials are done already, and none is told again."""
        statuses: Counter[str] = Counter()
        for record in records:
            if record.status in FINISHED:
                self._cells[record.cell].update(record)
                statuses[record.status] += 1
            else:
                self._before[record.cell, record.number] = record.seconds
        self._already = statuses.total()
        if statuses:
            counts = ", ".join(f"{statuses[status]} {status}" for status in FINISHED if statuses[status])
            self._print(f"{self._already} of {self._total} trials are done already: {counts}")

    def update(self, record: TrialRecord) -> None:
        """A trial has begun, reported or ended."""
        trained = record.seconds - self._before.get((record.cell, record.number), 0.0)
        if self._began is None and trained > 0:
            self._began = time.monotonic() - trained  # the lanes' start-up is no trial's time
        cell = self._cells[record.cell]
        cell.update(record)
        if record.status in FINISHED and not self._console.is_terminal:
            done = self._count()
            value = record.metrics.get(self._study.tuning.metric)
            self._print(
                f"{time.strftime('%H:%M:%S')}  {record.cell:<{self._width}} "
                f"trial {record.number:<3} {record.status:<9} "
                f"epoch {record.epochs:<4} {self._study.tuning.metric} {_number(value):<7} "
                f"{done}/{self._total}{self._eta(done)}"
            )

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False)

    def _count(self) -> int:
        return sum(cell.finished for cell in self._cells.values())

    def _eta(self, done: int) -> str:
        """At the rate of this session's trials; of what was there before nobody knows what it took."""
        lately = done - self._already
        if self._began is None or lately < 1 or done >= self._total:
            return ""
        left = (time.monotonic() - self._began) / lately * (self._total - done)
        return f"  ETA {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"

    def _table(self) -> Table:
        done = self._count()
        state = "starting the lanes ..." if self._began is None else f"{done}/{self._total} trials{self._eta(done)}"
        table = Table(title=f"{self._study.name}: {state}", title_justify="left", box=None, pad_edge=False)
        for heading in (
            "cell",
            "trials",
            "running",
            "pruned",
            "diverged",
            "failed",
            f"best {self._study.tuning.metric}",
        ):
            table.add_column(heading, justify="left" if heading == "cell" else "right")
        for cell in self._cells.values():
            table.add_row(*cell.row())
        return table


class TaskProgress:
    """How many of so many tasks are done: a bar on a terminal, a line for every tenth elsewhere.

    Args:
        title: what is computed.
        total: tasks.
        console: where to show.
    """

    def __init__(self, title: str, total: int, console: Console):
        self._title, self._total, self._console, self._done = title, total, console, 0
        self._bar = Bar(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> TaskProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        self._bar.advance(self._task)
        tenths = 10 * self._done // self._total
        if not self._console.is_terminal and tenths > 10 * (self._done - 1) // self._total:
            line = f"{time.strftime('%H:%M:%S')}  {self._title}: {self._done} of {self._total}"
            self._console.print(line, soft_wrap=True, highlight=False)


class CellProgress:
    """The counts of one cell."""

    def __init__(self, study: StudySpec, cell: Cell, trials: int):
        self._study, self._cell, self._trials = study, cell, trials
        self._statuses: dict[int, str] = {}
        self._best: float | None = None

    @property
    def finished(self) -> int:
        """Trials that have ended, in whichever way."""
        return sum(status in FINISHED for status in self._statuses.values())

    def update(self, record: TrialRecord) -> None:
        """Take in a trial's present state."""
        self._statuses[record.number] = record.status
        value = record.metrics.get(self._study.tuning.metric)
        if record.status == "completed" and value is not None:
            better = max if self._study.tuning.direction == "maximize" else min
            self._best = value if self._best is None else better(self._best, value)

    def row(self) -> list[str]:
        """The cell's line."""
        counts = Counter(self._statuses.values())
        numbers = [counts[status] for status in ("running", "pruned", "diverged", "failed")]
        return [
            self._cell.name,
            f"{self.finished}/{self._trials}",
            *map(str, numbers),
            _number(self._best),
        ]


def _number(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"  # steps are whole
