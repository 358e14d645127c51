"""A thousand random cases: image trees, study files and environments as nobody foresaw them.

Never an exception but a StudyError, never a silent loss: each file of a tree is used or named, and each study file is
read to what it says or refused with its place. A case is a number; one that fails is repeated with
`FUZZ=NUMBER pytest -m slow tests/test_fuzz.py -k trees` (or studies, environments).
"""

import io
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from ruamel.yaml import YAML

from lbstudy.methods.checks import check_study
from lbstudy.study.file import KeyProblems, StudyError, StudyFile
from lbstudy.study.run import DatasetSpec
from lbstudy.training import datasets, summary, trees
from tests.analysis.report.test_page import whole_study

pytestmark = pytest.mark.slow

BLOCKS = 10
COUNTS = {"trees": 500, "studies": 400, "environments": 100}


def each_case(kind: str, block: int, try_case: Callable[[int], None]) -> None:
    """Try the cases of a block; one that fails says its number."""
    only = os.environ.get("FUZZ")
    count = COUNTS[kind] // BLOCKS
    for number in [int(only)] if only else range(block * count, (block + 1) * count):
        signal.alarm(300)  # what hangs fails too
        try:
            try_case(number)
        except BaseException as error:
            error.add_note(f"to repeat: FUZZ={number} pytest -m slow tests/test_fuzz.py -k {kind}")
            raise
        finally:
            signal.alarm(0)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """An alarm is an exception."""

    def ring(*arguments: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.signal(signal.SIGALRM, before)


# Image trees

NAMES = [
    "0",
    "a b",
    "[red]",
    "ü",
    "日本",
    "x" * 100,
    "a\nb",
    "-rf",
    "\udcff",
    ":100:",
    "A",
    "$HOME",
    "tab\t",
    "'q'",
    "%s",
]
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]
FORMATS = {  # mode -> endings of formats that keep it
    "1": ["png", "tif", "bmp"], "L": ["png", "bmp", "tif", "pgm", "jpg"], "LA": ["png", "tif"],
    "P": ["png", "bmp", "tif"], "RGB": ["png", "bmp", "tif", "ppm", "jpg", "webp"], "RGBA": ["png", "tif", "webp"],
    "CMYK": ["jpg", "tif"], "I;16": ["png", "tif", "pgm"], "F": ["tif"], "I": ["tif"],
}  # fmt: skip
EXACT = {"png", "bmp", "tif", "pgm", "ppm"}
GREY = {"1", "L", "LA", "I;16"}


class RandomTree:
    """An image tree of a random kind, and what a reader should make of it."""

    def __init__(self, root: Path, draw: Random):
        self.root, self.draw = root, draw
        self.used: dict[Path, NDArray[np.uint8] | None] = {}  # and the pixels, where the format keeps them
        self.grey: list[bool] = []
        self.left_out = 0
        self.refused = False  # there is something that must be refused
        self.sizes: set[tuple[int, int]] = set()
        self.size = draw.choice([None, None, 6])
        classes = draw.sample(NAMES, draw.choice([1, 2, 2, 2, 3, 4]))
        self.refused |= len(classes) < 2
        shape = (draw.randint(1, 9), draw.randint(1, 9))
        for part in trees.PARTS:
            for name in classes:
                (root / part / name).mkdir(parents=True)
                for number in range(draw.randint(1, 3)):
                    self.add_image(root / part / name, f"{number}", shape)
        for _ in range(draw.choice([0, 0, 1, 2, 4])):
            place = root / draw.choice(trees.PARTS) / draw.choice(classes)
            draw.choice(ODDITIES)(self, place, shape)
        if not self.size and len(self.sizes) > 1:
            self.refused = True

    def add_image(self, folder: Path, name: str, shape: tuple[int, int]) -> None:
        """A sound image that is to be used, unless its mode has no known range."""
        folder.mkdir(parents=True, exist_ok=True)
        mode = self.draw.choice(MODES) if self.draw.random() < 0.98 else self.draw.choice(["F", "I"])
        ending = self.draw.choice(FORMATS[mode])
        file = folder / f"{name}.{ending.upper() if self.draw.random() < 0.2 else ending}"
        numbers = np.random.default_rng(self.draw.randrange(2**32))
        image, pixels = picture(mode, shape, numbers)
        if (mode, ending) == ("I;16", "pgm"):
            wide = np.asarray(image).astype(">u2").tobytes()
            file.write_bytes(b"P5\n%d %d\n65535\n" % (shape[1], shape[0]) + wide)
        else:
            with file.open("wb") as out:
                image.save(out, format={"jpg": "jpeg", "tif": "tiff", "pgm": "ppm"}.get(ending, ending))
        self.refused |= mode in ("I", "F")
        self.used[file] = pixels if ending in EXACT else None
        self.grey.append(mode in GREY)
        self.sizes.add(shape)

    # What else may lie in a class

    def deeper(self, place: Path, shape: tuple[int, int]) -> None:
        """In a folder within the class."""
        self.add_image(place / "sub" / self.draw.choice(NAMES), "deep", shape)

    def hidden(self, place: Path, shape: tuple[int, int]) -> None:
        """Hidden, or an operating system's."""
        name = self.draw.choice([".x.png", "._0.png", "Thumbs.db", "desktop.ini", ".DS_Store", "__MACOSX/0.png"])
        self._write(place / name, b"whatever")

    def other_ending(self, place: Path, shape: tuple[int, int]) -> None:
        """Of no image, as far as its name says."""
        self._write(place / self.draw.choice(["x.gif", "README", "x.png.bak", "x.json", "x.heic", "x."]), b"whatever")

    def loose(self, place: Path, shape: tuple[int, int]) -> None:
        """Beside the classes."""
        self._write(place.parent / "loose.png", b"whatever")

    def _write(self, file: Path, content: bytes) -> None:
        self.left_out += not file.exists()
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)

    def hidden_class(self, place: Path, shape: tuple[int, int]) -> None:
        """A folder of images that is no class."""
        self._write(place.parent / ".ipynb_checkpoints" / "0.png", b"whatever")

    def broken(self, place: Path, shape: tuple[int, int]) -> None:
        """No image, though its name says so."""
        whole = io.BytesIO()
        Image.new("RGB", (50, 50), "red").save(whole, "png")
        content = [b"", b"text", whole.getvalue()[:60], b"version https://git-lfs.github.com/spec/v1\n"]
        (place / "broken.png").write_bytes(self.draw.choice(content))
        self.refused = True

    def other_size(self, place: Path, shape: tuple[int, int]) -> None:
        """Of another size than the others."""
        self.add_image(place, "larger", (shape[0] + 3, shape[1]))

    def linked(self, place: Path, shape: tuple[int, int]) -> None:
        """An image by a link."""
        elsewhere = self.root.parent / "elsewhere"
        self.add_image(elsewhere, f"{len(self.used)}", shape)
        file, pixels = self.used.popitem()
        link = place / f"link{file.suffix}"
        if link.is_symlink():
            self.grey.pop()
            return
        link.symlink_to(file)
        self.used[link] = pixels

    def dangling(self, place: Path, shape: tuple[int, int]) -> None:
        """A link to nothing."""
        with suppress(FileExistsError):
            (place / "gone.png").symlink_to("nowhere.png")
        self.refused = True

    def loop(self, place: Path, shape: tuple[int, int]) -> None:
        """A link to a folder that it lies in."""
        with suppress(FileExistsError):
            (place / "loop").symlink_to(place, target_is_directory=True)

    def itself(self, place: Path, shape: tuple[int, int]) -> None:
        """A link to itself."""
        with suppress(FileExistsError):
            (place / "self.png").symlink_to("self.png")
        self.refused = True

    def pipe(self, place: Path, shape: tuple[int, int]) -> None:
        """A named pipe, which whoever reads it waits for."""
        if not (place / "pipe.png").exists():
            os.mkfifo(place / "pipe.png")
            self.left_out += 1

    def socket(self, place: Path, shape: tuple[int, int]) -> None:
        """A socket."""
        here = Path.cwd()
        os.chdir(place)  # its path would be too long
        try:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as made:
                made.bind("s.png")
                self.left_out += 1
        finally:
            os.chdir(here)

    def class_on_one_side(self, place: Path, shape: tuple[int, int]) -> None:
        """A class that the other part lacks."""
        self.add_image(place.parent / "only here", "0", shape)
        self.refused = True

    def empty_class(self, place: Path, shape: tuple[int, int]) -> None:
        """A class without images."""
        for part in trees.PARTS:
            (self.root / part / "empty").mkdir(exist_ok=True)
        self.refused = True


ODDITIES = [
    RandomTree.deeper, RandomTree.hidden, RandomTree.other_ending, RandomTree.loose, RandomTree.hidden_class,
    RandomTree.broken, RandomTree.other_size, RandomTree.linked, RandomTree.dangling, RandomTree.loop,
    RandomTree.itself, RandomTree.pipe, RandomTree.socket, RandomTree.class_on_one_side, RandomTree.empty_class,
]  # fmt: skip


def picture(
    mode: str, shape: tuple[int, int], numbers: np.random.Generator
) -> tuple[Image.Image, NDArray[np.uint8] | None]:
    """An image, and what it is in 8 bits, grey or RGB; None where only Pillow knows."""
    grey = numbers.integers(0, 256, shape, dtype=np.uint8)
    colour = numbers.integers(0, 256, (*shape, 3), dtype=np.uint8)
    if mode == "1":
        return Image.fromarray(np.where(grey > 127, 255, 0).astype(np.uint8)).convert("1"), np.where(
            grey > 127, 255, 0
        ).astype(np.uint8)
    if mode in ("L", "LA"):
        return Image.fromarray(grey).convert(mode), grey
    if mode == "RGB":
        return Image.fromarray(colour), colour
    if mode == "RGBA":
        return Image.fromarray(np.dstack([colour, grey])), colour
    if mode == "I;16":
        wide = numbers.integers(0, 65536, shape, dtype=np.uint16)
        return Image.fromarray(wide), np.round(wide / 65535 * 255).astype(np.uint8)
    if mode == "P":
        image = Image.fromarray(colour).quantize(16)
        return image, np.asarray(image.convert("RGB"))
    if mode == "CMYK":
        return Image.fromarray(colour).convert("CMYK"), None
    return Image.fromarray(grey.astype(np.float32 if mode == "F" else np.int32)), None


@pytest.mark.parametrize("block", range(BLOCKS))
def test_trees(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    outcomes: Counter[str] = Counter()

    def try_tree(number: int) -> None:
        shutil.rmtree(tmp_path / "case", ignore_errors=True)
        tree = RandomTree(tmp_path / "case" / "tree", Random(number))
        spec = DatasetSpec(name="image_folder", root=str(tree.root), image_size=tree.size)
        if tree.refused:
            with pytest.raises(KeyProblems, match=re.escape(str(tree.root))):
                datasets.load(spec)
            outcomes["refused"] += 1
            return
        found = datasets.load(spec)
        outcomes["read"] += 1
        files = trees.list_files(tree.root)
        assert {file for file, _ in files.train + files.test} == set(tree.used)
        assert sum(kind.files for kind in found.origin.left_out.values()) == tree.left_out
        assert len(found.train_labels) + len(found.test_labels) == len(tree.used)
        assert found.train_images.shape[1] == (1 if all(tree.grey) else 3)
        for part, images in ((files.train, found.train_images), (files.test, found.test_images)):
            for (file, label), image in zip(part, images, strict=True):
                assert found.origin.class_names[label] == file.relative_to(tree.root).parts[1]
                if (pixels := tree.used[file]) is not None and tree.size is None:
                    wanted = np.broadcast_to(pixels[..., None] if pixels.ndim == 2 else pixels, (*pixels.shape[:2], 3))
                    np.testing.assert_array_equal(np.broadcast_to(image.transpose(1, 2, 0), wanted.shape), wanted)
        text = "\n".join(summary.summarise(found).sentences())
        assert ("not used" in text) == bool(tree.left_out)
        again = datasets.load(spec)  # from the cache
        assert again.identity == found.identity
        assert again.origin == found.origin

    each_case("trees", block, try_tree)
    assert os.environ.get("FUZZ") or min(outcomes["read"], outcomes["refused"]) > 5


# Study files

SHIPPED = sorted((Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))
ODD_VALUES = [
    None, True, False, 0, -1, 1, 2, 3.5, 1e300, 10**30, math.inf, math.nan, "", "x", "sgd", "none", "é", "a: b", "x" * 5000,
    [], {}, [[]], [None], [1, 2], ["x"], {"x": 1}, {"": None}, [1, [2, [3, [4]]]], "1e-3", "module:function", "../x", "\x00",
]  # fmt: skip


def places(node: Any, keys: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys of every value below."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in inside for place in ((*keys, key), *places(value, (*keys, key)))]


def at(node: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        node = node[key]
    return node


def change(content: Any, draw: Random) -> tuple[str, bool]:
    """Change a study somewhere; returns what was done and whether it must be refused."""
    where = draw.choice(places(content))
    node, key = at(content, where[:-1]), where[-1]
    kind = draw.choice(["odd value", "odd value", "remove", "new key", "slip", "scale", "swap", "twice"])
    if kind == "odd value":
        node[key] = draw.choice(ODD_VALUES)
    elif kind == "remove":
        del node[key]
    elif kind == "new key":
        mappings = [(), *(place for place in places(content) if isinstance(at(content, place), dict))]
        place = draw.choice(mappings)
        at(content, place)["zzz_no_such_key"] = draw.choice([1, "x", [1, 2], {"a": 1}])
        return f"{kind} at {place}", True
    elif kind == "slip" and isinstance(node, dict):
        word = str(key)
        cut = draw.randrange(len(word))
        node[word[:cut] + word[cut + 1 :]] = node.pop(key)
    elif kind == "scale" and isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] *= draw.choice([2, 0.5, -1, 1000])
    elif kind == "swap":
        other = draw.choice(places(content))
        with suppress(KeyError, IndexError, TypeError):
            node[key] = at(content, other)
    elif kind == "twice" and isinstance(node, list):
        node.append(node[key])
    return f"{kind} at {where}", False


def mangle(text: str, draw: Random) -> bytes:
    """Change the text of a file without any sense of what it is."""
    content = bytearray(text.encode())
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content))
        what = draw.choice(["flip", "insert", "cut", "tab", "lines", "byte order mark", "newlines"])
        if what == "flip":
            content[place] = draw.randrange(256)
        elif what == "insert":
            content[place:place] = draw.choice(
                [b"&a ", b"*a", b"{", b"]", b": ", b"\n- ", b"!!python/x ", b"\xff", b"#", b"%", b"|"]
            )
        elif what == "cut":
            del content[place : place + draw.randint(1, 40)]
        elif what == "tab":
            content[place:place] = b"\n\t"
        elif what == "lines":
            lines = content.splitlines(keepends=True)
            draw.shuffle(lines) if draw.random() < 0.2 else lines.pop(draw.randrange(len(lines)))
            content = bytearray(b"".join(lines)) or bytearray(b"\n")
        elif what == "byte order mark":
            content[:0] = b"\xef\xbb\xbf"
        else:
            content = bytearray(bytes(content).replace(b"\n", b"\r\n"))
        content = content or bytearray(b"\n")
    return bytes(content)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_studies(block: int, tmp_path: Path):
    outcomes: Counter[str] = Counter()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False

    def try_study(number: int) -> None:
        draw = Random(number)
        shipped = draw.choice(SHIPPED)
        file, must_refuse, done = tmp_path / f"{number}.yaml", False, "mangled"
        content = YAML(typ="safe", pure=True).load(shipped)
        if draw.random() < 0.3:
            file.write_bytes(mangle(shipped.read_text(encoding="utf-8"), draw))
        else:
            done, must_refuse = change(content, draw)
            with file.open("w", encoding="utf-8") as out:
                yaml.dump(content, out)
        try:
            study = check_study(StudyFile(file), written_by_hand=True)
        except StudyError as refused:
            strange = [
                line
                for line in str(refused).splitlines()
                if not re.match(rf"{re.escape(str(file))}(:\d+)?: \S|  ", line)
            ]
            outcomes["refused"] += 1
            if strange:
                pytest.fail(f"{shipped.name}: {done}: {strange}")
            return
        outcomes["read"] += 1
        assert not must_refuse, f"{shipped.name}: {done} was not seen"
        (tmp_path / "again.yaml").write_text(study.to_yaml(), encoding="utf-8")
        again = check_study(StudyFile(tmp_path / "again.yaml"))
        assert again == study, done
        assert again.list_cells() == study.list_cells()
        if done != "mangled":
            original = check_study(StudyFile(shipped), written_by_hand=True)
            unchanged = content == YAML(typ="safe", pure=True).load(shipped) or done.startswith(
                "remove"
            )  # of a default
            assert study != original or unchanged, f"{shipped.name}: {done} had no effect"

    each_case("studies", block, try_study)
    assert os.environ.get("FUZZ") or min(outcomes["read"], outcomes["refused"]) > 3


# Environments

SETTINGS: dict[str, list[str]] = {
    "MPLBACKEND": ["module://matplotlib_inline.backend_inline", "nosuchbackend", ""], "RAY_ADDRESS": ["", "auto"],
    "COLUMNS": ["1", "0", "-5", "x", "100000"], "LINES": ["0", "x"], "TERM": ["dumb", "", "xterm", "unknown"],
    "NO_COLOR": ["", "1"], "FORCE_COLOR": ["1", "x"], "TZ": ["UTC", "Nowhere/None", ":", "Asia/Kathmandu"],
    "LC_ALL": ["C", "POSIX", "de_DE.UTF-8", "xx_XX"], "PYTHONIOENCODING": ["ascii", "latin-1", "utf-16"],
    "HOME": ["", "/nonexistent", "/dev/null", "relative"], "TMPDIR": ["/nonexistent", "", "/dev/null"],
    "CUDA_VISIBLE_DEVICES": ["", "-1", "7", "x", "GPU-1"], "OMP_NUM_THREADS": ["1", "x"],
    "HTTP_PROXY": ["http://127.0.0.1:9", "x"], "XDG_CACHE_HOME": ["/nonexistent", ""], "USER": ["", "\udcff"],
    "MPLCONFIGDIR": ["/nonexistent/x"], "PYTHONWARNINGS": ["error"], "PYTHONUTF8": ["0", "1"], "PYTHONOPTIMIZE": ["2"],
}  # fmt: skip
"""What may stand in an environment, and has stood in some."""

COMMANDS = [["best"], ["status"], ["table", "gap"], ["table", "health"], ["table", "targets"], ["unlock"], ["compare"]]


@pytest.mark.parametrize("block", range(BLOCKS))
def test_environments(block: int, tmp_path: Path):
    """Each in a process of its own: most are read at a start."""
    study = whole_study(tmp_path / "s").path

    def try_environment(number: int) -> None:
        draw = Random(number)
        chosen = draw.sample(sorted(SETTINGS), draw.randint(1, 6))
        environment = {name: draw.choice(SETTINGS[name]) for name in chosen}
        command = draw.choice(COMMANDS)
        arguments = [*command[:1], str(study), *command[1:], *([str(study)] if command == ["compare"] else [])]
        done = subprocess.run(
            [sys.executable, "-m", "lbstudy", *arguments], env=os.environ | environment, capture_output=True,
            timeout=300, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert b"Traceback" not in done.stdout + done.stderr, (environment, command, done.stderr[-2000:])
        assert done.returncode in (0, 2), (environment, command, done.stderr[-2000:])

    each_case("environments", block, try_environment)
