"""README and the documents: links lead somewhere, every `lbstudy ...` is a command, and studies that are shown load."""

import re
import shlex
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
import typer

from lbstudy.console.cli import app
from lbstudy.methods.checks import load_study

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "clusters").rglob("*.md")])
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
HOLDER = re.compile(r"[A-Z][A-Z0-9_]*")  # stands for a value: STUDY, N
EXAMPLE = "1"  # a value that both a text and a number may have
ENDS = {"&&", "||", "|", ";", ">", "<", "&"}


@cache
def anchors(path):
    """Of a document's headings, as GitHub makes them."""
    found = []
    for line in re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL).splitlines():
        if heading := re.match(r"#+ (.+)", line):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            found.append(slug + (f"-{found.count(slug)}" if slug in found else ""))
    return found


def links():
    for path in DOCUMENTS:
        for target in LINK.findall(CODE.sub("", path.read_text())):
            if not re.match(r"https?:|mailto:", target):
                yield pytest.param(path, target, id=f"{path.name}: {target}")


@pytest.mark.parametrize(("path", "target"), links())
def test_links_lead_somewhere(path, target):
    file, _, anchor = target.partition("#")
    there = (path.parent / file).resolve() if file else path
    assert there.exists(), f"{path}: {target}"
    if anchor:
        assert anchor in anchors(there), f"{path}: {target}; there are {anchors(there)}"


def studies():
    for path in DOCUMENTS:
        for number, block in enumerate(re.findall(r"```yaml\n(name:.*?)```", path.read_text(), re.DOTALL)):
            if "\ncode:" not in block:  # with code of one's own: tests/test_bring_your_own.py
                yield pytest.param(block, id=f"{path.name} {number}")


@pytest.mark.parametrize("text", studies())
def test_studies_load(text, tmp_path):
    (tmp_path / "study.yaml").write_text(text)
    study = load_study(tmp_path / "study.yaml")
    assert study.list_cells()


def command_lines(text):
    """The arguments of every `lbstudy ...` in a document, and whether it stands in a block, whole."""
    fenced = [(block, True) for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)]
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = ["\n".join(re.findall(r"^ {4}(.+)$", rest, re.MULTILINE))]
    inline = [(code.replace("\n", " "), False) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", rest)]
    for code, whole in [*fenced, *((block, True) for block in indented), *inline]:
        for line in code.replace("\\\n", " ").splitlines():
            for match in re.finditer(r"(?:^|[\s\"'/])lbstudy (?=[a-z-])", line):
                yield arguments(line[match.end() :], line[: match.end()]), whole


def arguments(rest, before):
    """What a shell would hand to it: up to a comment, the next command, or the quote that it stands in."""
    for quote in "'\"":
        if before.count(quote) % 2:
            rest = rest.split(quote)[0]
    words = shlex.split(rest, comments=True)
    return list(takewhile(lambda word: word not in ENDS, words))


def commands():
    for path in DOCUMENTS:
        for words, whole in command_lines(path.read_text()):
            yield pytest.param(words, whole, id=f"{path.name}: {' '.join(words)}"[:90])


def fault(words, whole):
    """What is wrong with a command: it, an option, a choice or an argument does not exist, or one is missing."""
    root = typer.main.get_command(app)
    name, *rest = words
    if name.startswith("-"):  # not parsed: `--install-completion` does it at once
        return (
            None if name in [option for parameter in root.params for option in parameter.opts] else f"no option {name}"
        )
    if name not in root.commands:
        return f"no such command: {name}"
    try:
        root.commands[name].make_context(name, [EXAMPLE if HOLDER.fullmatch(word) else word for word in rest])
    except typer.Exit:  # of an option that prints something
        return None
    except type(typer.BadParameter("")).__mro__[1] as error:  # UsageError, which typer does not name
        if type(error).__name__ == "MissingParameter" and not whole:
            return None
        message = error.format_message()
        return None if f"'{EXAMPLE}' is not one of" in message else f"{type(error).__name__}: {message}"
    return None


@pytest.mark.parametrize(("words", "whole"), commands())
def test_commands_exist(words, whole):
    assert fault(words, whole) is None


@pytest.mark.parametrize("words", [
    ["begin", "x"], ["run", "x", "--store", "y"], ["run"], ["table", "x", "gaps"], ["confirm", "x", "--seeds", "many"],
    ["best", "x", "y"], ["init", "x", "--cluster", "azure"], ["--versions"],
])  # fmt: skip
def test_the_check_sees_what_does_not_exist(words):
    assert fault(words, whole=True)


def test_the_search_finds_commands_as_people_write_them():
    text = (
        "    uv run lbstudy run mine.yaml --name mine   # tune\n\n"
        '```bash\nray exec c.yaml "lbstudy status /s/NAME" && x\nsbatch a -- \\\n    lbstudy best s --format csv | head\n```\n'
        "Say `lbstudy plan FILE --price 3`, or `~/v/bin/lbstudy report s`; `import lbstudy.analysis` is none.\n"
    )
    assert [words for words, _ in command_lines(text)] == [
        ["status", "/s/NAME"], ["best", "s", "--format", "csv"], ["run", "mine.yaml", "--name", "mine"],
        ["plan", "FILE", "--price", "3"], ["report", "s"],
    ]  # fmt: skip
