"""Where a study's folder can lie: on a file system (local, NFS), or in an object store (s3://, gs://, abfs://).

On a file system a path is a `pathlib.Path`; in an object store it is an `ObjectPath`, which has as much of the same
interface as the records need. The functions here are what the two do differently. Both give what the records build on:
a file is replaced in one step, so readers see the old content or the new, never a part. An object store has no folders,
no appending (a series is written anew) and no locks (see `create`).

pyarrow, which talks to the object stores, comes with Ray and is imported only when such an address is used.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit
from uuid import uuid4

from lbstudy.scratch import scratch_folder

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

SCHEMES = ("s3", "gs", "abfs", "abfss")  # stores in which a put replaces an object in one step
S3_OPTIONS = ("region", "scheme", "endpoint_override")
ATTEMPTS, RETRY_SECONDS = 5, 20  # of a request: S3 is told how often to try, Google how long
SETTLE_SECONDS = 2.0  # longer than any driver takes from seeing no lock to having written its own
READERS = 32  # requests at a time

Answer = TypeVar("Answer")


class StorageError(OSError):
    """What keeps an object store from doing what was asked, in one sentence."""

    def __init__(self, where: str, reason: str):
        super().__init__(0, reason, where)

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


@dataclass(frozen=True, order=True)
class ObjectPath:
    """An object, or all objects below it, in an object store; methods do what their namesakes of `pathlib.Path` do.

    Each raises a StorageError where the store does not answer or refuses, and FileNotFoundError where there is no such
    object.
    """

    address: str  # s3://bucket/studies/mine
    query: str  # options of the connection: endpoint_override=http://127.0.0.1:9000
    key: str = field(compare=False)  # bucket/studies/mine: the address as pyarrow wants it
    store: FileSystem = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.address}?{self.query}" if self.query else self.address

    def __truediv__(self, below: str) -> ObjectPath:
        return replace(self, address=f"{self.address}/{below}", key=f"{self.key}/{below}")

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        """The address without its last part."""
        return replace(self, address=self.address.rpartition("/")[0], key=self.key.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        """The address with another last part."""
        return self.parent / name

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: what lies in a folder needs none."""

    def rmdir(self) -> None:
        """Nothing: without content there is no folder."""

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return bool(self._info().is_file)

    def is_dir(self) -> bool:
        """Whether there are objects below it, or a marker that stands for an empty folder."""
        return bool(self._info().type.name == "Directory")

    def exists(self) -> bool:
        """Whether it is a file or a folder."""
        return bool(self._info().type.name != "NotFound")

    def modified(self) -> float:
        """When the object was last written, in seconds since 1970 by the store's clock."""
        info = self._info()
        if not info.is_file:
            raise FileNotFoundError(str(self))
        return float(info.mtime_ns) / 1e9

    def iterdir(self) -> Iterator[ObjectPath]:
        """What lies directly in the folder."""
        return (self / name for name in self._below(recursive=False))

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """The objects whose address below this one matches the whole pattern, part by part."""
        depth = len(PurePosixPath(pattern).parts)
        for below in self._below(recursive=True):
            path = PurePosixPath(below)
            if len(path.parts) == depth and path.match(pattern):
                yield self / below

    def read_bytes(self) -> bytes:
        """The object."""
        with _explained(str(self)), self.store.open_input_stream(self.key) as stream:
            return bytes(stream.readall())

    def read_text(self, encoding: str = "utf-8") -> str:
        """The object as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Put or replace the object in one step."""
        with _explained(str(self)), self.store.open_output_stream(self.key) as stream:
            stream.write(content)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            with _explained(str(self)):
                self.store.delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def replace(self, target: ObjectPath) -> ObjectPath:
        """Move the object."""
        with _explained(str(self)):
            self.store.move(self.key, target.key)
        return target

    def _info(self) -> FileInfo:
        with _explained(str(self)):
            return self.store.get_file_info(self.key)

    def _below(self, recursive: bool) -> list[str]:
        from pyarrow.fs import FileSelector

        with _explained(str(self)):
            found = self.store.get_file_info(FileSelector(self.key, allow_not_found=True, recursive=recursive))
        return [info.path.removeprefix(self.key).strip("/") for info in found]


StoragePath = Path | ObjectPath


def locate(where: str | StoragePath) -> StoragePath:
    """A path from what a user has written: a folder, or the address of one in an object store.

    Raises:
        StorageError: it is an address that cannot be used, or its store does not answer.
    """
    if not isinstance(where, str):
        return where
    scheme, found, _ = where.partition("://")
    if not found:
        try:
            return Path(where).expanduser()  # a shell does not expand it in --storage=~/studies
        except RuntimeError as error:
            raise StorageError(where, str(error)) from error
    parts = urlsplit(where)
    if scheme not in SCHEMES:
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise StorageError(where, f"must be a folder, or an address that begins with {allowed}")
    if parts.password or "secret" in parts.query or (scheme == "s3" and parts.username):
        public = f"{scheme}://{parts.netloc.rpartition('@')[2]}"  # addresses are shown and recorded
        raise StorageError(public, "credentials do not belong into an address, but into the environment or its files")
    if not parts.netloc:
        raise StorageError(where, f"names no bucket; write {scheme}://BUCKET/FOLDER")
    with _explained(where):
        store, key = _connect(where)
    return ObjectPath(where.partition("?")[0].rstrip("/"), parts.query, key.rstrip("/"), store)


def real_path(path: StoragePath) -> StoragePath:
    """The path without links and `..`. Links in a circle stay as they are; `Path.resolve` raises a RuntimeError."""
    return Path(os.path.realpath(path)) if isinstance(path, Path) else path


@cache
def _connect(address: str) -> tuple[FileSystem, str]:
    """The store of an address, and the address as it wants it; a store that does not answer shall not take minutes."""
    from pyarrow import fs

    parts = urlsplit(address)
    options: dict[str, Any] = dict(parse_qsl(parts.query))
    if parts.scheme != "s3":
        if parts.scheme == "gs" and "retry_limit_seconds" not in options:
            address += ("&" if parts.query else "?") + f"retry_limit_seconds={RETRY_SECONDS}"
        return fs.FileSystem.from_uri(address)
    if unknown := options.keys() - set(S3_OPTIONS):
        raise ValueError(f"unknown option `{min(unknown)}`; allowed are {', '.join(S3_OPTIONS)}")
    if not {"region", "endpoint_override"} & options.keys() and "AWS_ENDPOINT_URL" not in os.environ:
        options["region"] = fs.resolve_s3_region(parts.netloc)
    attempts = fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    store = fs.S3FileSystem(**options, retry_strategy=attempts, allow_delayed_open=True)  # delayed: one request a put
    return store, parts.netloc + parts.path


@contextmanager
def _explained(where: str) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, ArrowException) as error:
        raise StorageError(where, _reason(error)) from error


def _reason(error: Exception) -> str:
    """What pyarrow means: `AWS Error ACCESS_DENIED during PutObject operation: ...` is `access denied: ...`."""
    text = str(error).strip() or type(error).__name__
    if found := re.search(r"AWS Error (\w+) during \w+ operation: (.*)", text, re.DOTALL):
        detail = re.sub(r"\(Request ID.*|curlCode: \d+, |; Details:.*|No response body\.", "", found[2]).strip()
        text = ": ".join(filter(None, [found[1].lower().replace("_", " "), detail]))
    return text.splitlines()[0][:300]


def write(path: StoragePath, content: bytes) -> None:
    """Replace a file in one step: readers see the old content or the new, never a part."""
    if isinstance(path, ObjectPath):
        path.write_bytes(content)
        return
    scratch = path.with_name(f".{path.name}-{uuid4().hex}")  # tempfile's would be readable by its owner only
    try:
        with scratch.open("xb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(scratch, path)
    except OSError:  # a full disk shall not keep half a file
        with suppress(OSError):
            scratch.unlink()
        raise


def append(path: StoragePath, line: bytes) -> None:
    """Add a line to a file. On a file system a crash may leave a part of it; an object is written anew as a whole."""
    if isinstance(path, ObjectPath):
        path.write_bytes((read(path) or b"") + line)
        return
    with path.open("ab") as out:
        out.write(line)


class Appender:
    """Adds lines to a file that nobody else writes. An object is read once, and then written anew with every line: one
    request a line."""

    def __init__(self, path: StoragePath):
        self._path = path
        self._content: bytes | None = None

    def append(self, line: bytes) -> None:
        """Add a line; when this returns it is there."""
        if not isinstance(self._path, ObjectPath):
            append(self._path, line)
            return
        before = (read(self._path) or b"") if self._content is None else self._content
        self._path.write_bytes(before + line)
        self._content = before + line


def read(path: StoragePath) -> bytes | None:
    """A file's content; None if there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def read_all(paths: Iterable[StoragePath]) -> Iterator[bytes]:
    """The contents of many files in their order; objects are fetched many at a time."""
    paths = list(paths)
    if not any(isinstance(path, ObjectPath) for path in paths):
        yield from (path.read_bytes() for path in paths)
        return
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(lambda path: path.read_bytes(), paths)


def create(path: StoragePath, content: bytes) -> bool:
    """Make a file that must not be there yet; False if it is.

    On a file system, of several that try at once exactly one succeeds. pyarrow offers no such operation on an object
    store: there the object is written if none is seen, and belongs to whoever reads its own content back after
    `SETTLE_SECONDS`. That may go wrong if a process stands still for as long between seeing none and writing.
    """
    if isinstance(path, ObjectPath):
        if path.is_file():
            return False
        path.write_bytes(content)
        time.sleep(SETTLE_SECONDS)
        return read(path) == content
    try:
        out = path.open("xb")
    except FileExistsError:
        return False
    try:
        with out:
            out.write(content)
    except OSError:  # the disk is full
        path.unlink()
        raise
    return True


def make_folder(folder: StoragePath) -> list[StoragePath]:
    """Make a folder and those above it; returns the ones that were missing, innermost first."""
    if isinstance(folder, ObjectPath):
        return []
    made: list[StoragePath] = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def touch(path: StoragePath) -> None:
    """Make a file the youngest; its content stays."""
    if isinstance(path, ObjectPath):
        path.write_bytes(path.read_bytes())
        return
    before = stamp(path)
    with suppress(OSError):
        os.utime(path)
    if stamp(path) == before:  # a file system that refuses that, or forgets it
        path.write_bytes(path.read_bytes())


def stamp(path: StoragePath) -> object:
    """What changes whenever a file is written or touched; None where there is none. No clock is looked at."""
    try:
        if isinstance(path, ObjectPath):
            return path.modified()
        with path.open("rb") as opened:  # a file server's client asks anew when a file is opened
            return os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def age(path: StoragePath) -> float:
    """Seconds since a file was last written or touched; that of an object by the store's own clock."""
    if not isinstance(path, ObjectPath):
        return time.time() - path.stat().st_mtime
    return _with_probe(path.parent, ObjectPath.modified) - path.modified()


def require_writable(folder: StoragePath) -> None:
    """Do in the folder, or in the next above that exists, what a study does: make a file, replace it, add to it, read
    it and remove it.

    Raises:
        OSError: that fails.
    """
    if not isinstance(folder, ObjectPath):
        above = next(path for path in (folder, *folder.parents) if path.exists())
        probe = above / f".probe-{uuid4().hex}"
        try:
            for _ in range(2):
                write(probe, b"lb")
            append(probe, b"study")
            found = read(probe)
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
        if found != b"lbstudy":
            raise StorageError(str(folder), "what was written reads back differently")
    elif _with_probe(folder, ObjectPath.read_bytes) != b"lbstudy":
        raise StorageError(str(folder), "what was written reads back differently")


def _with_probe(folder: ObjectPath, ask: Callable[[ObjectPath], Answer]) -> Answer:
    """What `ask` says of an object that is there for this question only."""
    probe = folder / f".probe-{uuid4().hex}"
    probe.write_bytes(b"lbstudy")
    try:
        return ask(probe)
    finally:
        probe.unlink(missing_ok=True)


def free_bytes(folder: StoragePath) -> int | None:
    """Room on the file system of a folder, which need not exist; None where there is no limit to ask for."""
    if isinstance(folder, ObjectPath):
        return None
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


@contextmanager
def local_file(path: StoragePath) -> Iterator[Path]:
    """A new file on this machine for a library that writes no other: `path` itself, or what becomes it in the end."""
    if not isinstance(path, ObjectPath):
        path.unlink(missing_ok=True)
        yield path
        return
    with scratch_folder("upload") as scratch:
        local = scratch / path.name
        try:
            yield local
        finally:
            if local.exists():
                path.write_bytes(local.read_bytes())
