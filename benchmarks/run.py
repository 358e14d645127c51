"""All benchmarks of this folder, one after the other, into one table in Markdown with machine and date.

uv run python benchmarks/run.py --smoke                       # that they work: minutes
uv run python benchmarks/run.py --data ROOT -o results.md     # that they measure: hours of a free machine
uv run python benchmarks/run.py step kfac -- --device cuda    # some of them, with arguments for each
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import NamedTuple

from benchmarks import _measuring as measuring

FOLDER = Path(__file__).parent


class Outcome(NamedTuple):
    """What came of a benchmark."""

    name: str
    said: list[str]  # all lines
    problem: str  # empty where all went well

    @property
    def rows(self) -> list[str]:
        """The lines that are results, as rows of the table."""
        return [f"| {self.name} {line}" for line in self.said if measuring.LINE.fullmatch(line)]


def names() -> list[str]:
    """The benchmarks."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_") and p != Path(__file__))


def takes_data(name: str) -> bool:
    """Whether a benchmark can be told where CIFAR-10 is."""
    return '"--data"' in (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def run(name: str, arguments: list[str]) -> Outcome:
    """Run one in a process of its own; what it says is shown as it comes."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line.rstrip())
    problem = f"exit code {process.returncode}: {said[-1] if said else 'it said nothing'}" if process.returncode else ""
    return Outcome(name, said, problem)


def table(outcomes: list[Outcome], smoke: bool) -> str:
    """The results in Markdown."""
    note = " A smoke run: the numbers say nothing." if smoke else ""
    lines = [f"{measuring.machine()}, {date.today()}.{note}", ""]
    lines += ["| benchmark | what | value | unit | compared with |", "|---|---|---|---|---|"]
    lines += [row for outcome in outcomes for row in outcome.rows]
    for outcome in outcomes:
        if outcome.problem:
            lines += ["", f"{outcome.name}: {outcome.problem}"]
        elif not outcome.rows:  # it prints in a way of its own
            lines += ["", f"{outcome.name}:", "", *(f"    {line}" for line in outcome.said)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run them and write the table; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; default: all")
    parser.add_argument("--smoke", action="store_true", help="see that they work: tiny, numbers of no use")
    parser.add_argument("--data", metavar="ROOT", help="CIFAR-10 as an image tree, for those that train on it")
    parser.add_argument("-o", "--output", type=Path, help="file of the table; default: printed at the end")
    given = sys.argv[1:]
    place = given.index("--") if "--" in given else len(given)
    options, others = parser.parse_args(given[:place]), given[place + 1 :]
    if unknown := set(options.benchmarks) - set(names()):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    if options.data and not Path(options.data).is_dir():
        parser.error(f"--data {options.data}: there is no such folder")
    outcomes = []
    for name in options.benchmarks or names():
        print(f"== {name}", flush=True)
        data = ["--data", options.data] if options.data and takes_data(name) else []
        outcomes.append(run(name, [*(["--smoke"] if options.smoke else []), *data, *others]))
    text = table(outcomes, options.smoke)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(f"\n{text}", end="")
    return int(any(outcome.problem for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
