"""Importing a user's own code: from a copy, one study's at a time, and what is said of its errors."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbstudy.methods import optimizers, user_code
from lbstudy.methods.declaration import MethodError, attribute
from lbstudy.study.code import Code


@pytest.fixture(autouse=True)
def afterwards_none() -> Iterator[None]:
    yield
    user_code.activate(Code())


def code(text: str, name: str = "mine.py", **others: str) -> Code:
    files = {name: text, **{f"{module}.py": content for module, content in others.items()}}
    return Code(
        {path: content.encode() for path, content in files.items()}, {path: f"/home/me/{path}" for path in files}
    )


def told_of(name: str) -> str:
    with pytest.raises(MethodError) as caught:
        attribute("optimizer", name)
    return user_code.told(caught.value)


def test_what_is_imported_is_the_code_of_the_present_study():
    """A module of the same name is another one in another study, and so are those that it imports and all methods."""
    optimizer = "import torch, helper\nclass Sgd(torch.optim.SGD):\n    mark = helper.MARK\n"
    marks = []
    for mark in ("1", "2", "1"):
        user_code.activate(code(optimizer, helper=f"MARK = {mark}"))
        marks.append(attribute("optimizer", "mine:Sgd").mark)
        assert optimizers.get("mine:Sgd").build is not None
    assert marks == [1, 2, 1]
    user_code.activate(Code())
    assert "mine" not in sys.modules
    assert "helper" not in sys.modules
    assert "there is no module mine, in `code` or installed" in told_of("mine:Sgd")
    with pytest.raises(MethodError, match="there is no module mine"):
        optimizers.get("mine:Sgd")


def test_nothing_but_the_code_is_found(tmp_path: Path):
    (tmp_path / "helper.py").write_text("")
    found = Code({"mine.py": b"import helper"}, {"mine.py": str(tmp_path / "mine.py")})
    user_code.activate(found)
    told = told_of("mine:x")
    assert told.startswith("optimizer mine:x: module mine needs helper, which is not installed\n")
    assert f'  File "{tmp_path}/mine.py", line 1, in <module>' in told


def test_packages_and_their_data_are_found():
    user_code.activate(
        Code({
            "nets/__init__.py": b"from nets.deep import block",
            "nets/deep/block.py": b"from pathlib import Path\nDATA = (Path(__file__).parent / 'x.bin').read_bytes()",
            "nets/deep/x.bin": b"\x00\x01",
        })
    )  # fmt: skip
    assert attribute("model", "nets:block.DATA") == b"\x00\x01"


def test_the_traceback_is_the_users_own_and_no_more():
    text = "import torch\n\n\ndef deep():\n    return torch.zeros(2) @ torch.zeros(3)\n\n\ndeep()\n"
    user_code.activate(code(text))
    headline, *lines = told_of("mine:x").splitlines()
    assert headline.startswith("optimizer mine:x: module mine cannot be imported: RuntimeError: ")
    shown = [line for line in lines if line.startswith("  File") or line.startswith("    File")]
    assert [line.split(", ")[0].strip() for line in shown] == 2 * ['File "/home/me/mine.py"']
    assert [line.split(", ")[1] for line in shown] == ["line 8", "line 5"]
    assert lines[-1].startswith("  RuntimeError: ")
    assert "lbstudy" not in "".join(lines)


def test_a_syntax_error_is_shown_where_it_is():
    user_code.activate(code("def f(:\n    pass\n"))
    told = told_of("mine:f")
    assert '  File "/home/me/mine.py", line 1' in told.replace("    File", "  File")
    assert "def f(:" in told


def test_a_copy_that_was_tampered_with_is_laid_down_again():
    files = code("x = 1")
    user_code.activate(files)
    path = Path(attribute("optimizer", "mine:__file__"))
    assert path.parent.parent.stat().st_mode & 0o077 == 0
    user_code.activate(Code())
    path.write_text("x = 2")
    user_code.activate(files)
    assert attribute("optimizer", "mine:x") == 1


def test_the_same_code_is_not_imported_twice():
    user_code.activate(code("x = object()"))
    first = attribute("optimizer", "mine:x")
    user_code.activate(code("x = object()"))
    assert attribute("optimizer", "mine:x") is first
