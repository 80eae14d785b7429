"""Files on disk: atomic writes, locks, append-only logs that survive a kill."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

from inpars_lib.cli import InputError, warn
from inpars_lib.compression import open_output

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
