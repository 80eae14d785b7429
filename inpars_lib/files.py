"""Files on disk: atomic writes, locks, append-only logs that survive a kill."""

import bz2
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any

from inpars_lib.cli import InputError, warn

FORMAT_VERSION = 1  # of the resume and meta files; docs/files.md lists them


def is_special(path: str) -> bool:
    """Return whether the path exists and is neither a regular file nor a folder: a device or a pipe."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


@contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends without an error.

    Until then an existing file stays as it is. Parent folders are created. Symbolic links are followed. `-` (standard
    output) and paths that are no regular file, a pipe for example, are written in place. A suffix such as .gz
    compresses the file.

    Args:
        path: The file to create or replace.
        mode: `w` for UTF-8 text, `wb` for bytes.

    Yields:
        The open file, which is `PATH.unfinished` on disk.
    """
    if path == "-" or is_special(path):
        with open_output(path, path, mode) as file:
            yield file
        return
    target = os.path.realpath(path)
    unfinished = f"{target}.unfinished"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        with open_output(unfinished, path, mode) as file:
            yield file
        os.replace(unfinished, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(unfinished)
        raise


def lock(file: IO[Any], path: str) -> None:
    """Lock an open output file for this process, until the file is closed.

    Raises:
        InputError: Another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another process is writing to this file. Wait for it or stop it.") from None


@contextmanager
def exclusive(path: str) -> Iterator[None]:
    """Let one process at a time write the output `path`, with a lock on PATH.lock.

    Raises:
        InputError: Another process holds the lock, or the output is `-`.
    """
    if path == "-":
        raise InputError("-: this output needs a lock or a resume log beside it. Name a file.")
    if is_special(path):
        yield
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    lock_path = f"{path}.lock"
    while True:
        file = open(lock_path, "ab")
        lock(file, path)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock_path)):
                break
        file.close()  # the process that held the lock has just deleted this file
    try:
        yield
    finally:
        os.remove(lock_path)
        file.close()


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSONL, newline included."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def repair_last_line(path: str) -> None:
    """Truncate an append-only JSONL file to its last complete row, which a kill during a write may have torn."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read(1) in (b"", b"\n"):
            return
        file.seek(0)
        complete, line = 0, b"\n"
        for line in file:
            complete += len(line) if line.endswith(b"\n") else 0
        try:
            json.loads(line)
            file.write(b"\n")  # the row is complete, only its newline is missing
        except ValueError:
            file.truncate(complete)


class ResumeLog:
    """Append-only JSONL log of finished work. Line 1 holds the settings.

    A log with other settings is discarded with a warning when the log is opened. A torn last line is skipped.
    """

    def __init__(self, path: str, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps({"format_version": FORMAT_VERSION, **settings}))
        self._file: IO[bytes] | None = None

    def open(self) -> list[dict[str, Any]]:
        """Open the log for appending. Return the rows that an earlier run with the same settings finished."""
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        self._file = open(self.path, "ab+")
        repair_last_line(self.path)
        self._file.seek(0)
        with suppress(ValueError):
            if json.loads(self._file.readline() or b"null") == self.settings:
                return list(map(json.loads, self._file))
        if self._file.seek(0, os.SEEK_END):
            warn(f"{self.path}: its finished work has other settings or another input. This run starts over.")
            self._file.truncate(0)
        self.write(self.settings)
        return []

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row and hand it to the operating system."""
        assert self._file is not None, "open() comes first"
        self._file.write(json_line(row).encode(errors="replace"))
        self._file.flush()

    def close(self) -> None:
        """Close the log."""
        if self._file:
            self._file.close()


def _zstd(raw: Any, mode: Any) -> Any:
    from backports.zstd import CompressionParameter, DecompressionParameter, ZstdFile

    reading: Any = {DecompressionParameter.window_log_max: 31}  # for files of `zstd --long=31`
    return ZstdFile(raw, mode, options=reading if mode == "rb" else {CompressionParameter.checksum_flag: 1})


# Name, suffix, first bytes, function of an open file and a mode. Because a TSV file may begin with BZh, the first bytes
# of bzip2 include those of a block. pzstd writes a skippable frame first. gzip's header gets no name and no time.
FORMATS = (
    ("gzip", ".gz", rb"\x1f\x8b", lambda raw, mode: gzip.GzipFile("", mode, 6, raw, 0)),
    ("bzip2", ".bz2", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2File),
    ("xz", ".xz", rb"\xfd7zXZ\0", lzma.LZMAFile),
    ("Zstandard", ".zst", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", _zstd),
)
SUFFIX = re.compile(r"\.(gz|bz2|xz|zst)$")


@contextmanager
def decompressed(raw: Any, path: str) -> Iterator[IO[bytes]]:
    """Open the content of a file for reading. `raw` is the open file. Damaged data raises `InputError`."""
    head = raw.peek(10)
    name, wrap = next(((name, wrap) for name, _, start, wrap in FORMATS if re.match(start, head)), (None, None))
    try:
        yield io.BufferedReader(wrap(raw, "rb"), 1 << 20) if wrap else raw
    except Exception as error:  # each format has exceptions of its own
        if not wrap or isinstance(error, InputError) or getattr(error, "errno", None) is not None:
            raise
        raise InputError(f"{path}: damaged {name} data ({error}). Download the file again.") from None


@contextmanager
def open_output(target: str, path: str, mode: str) -> Iterator[IO[Any]]:
    """Open `target` for writing, or standard output if `path` is `-`. The suffix of `path` compresses reproducibly."""
    with ExitStack() as stack:
        file: Any = stack.enter_context(open(1 if path == "-" else target, "wb", closefd=path != "-"))
        for _, suffix, _, wrap in FORMATS:
            if path.endswith(suffix):
                file = stack.enter_context(wrap(file, "wb"))
        if "b" not in mode:
            file = stack.enter_context(io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="\n"))
        yield file
