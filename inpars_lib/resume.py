"""One rule for resuming: the same command goes on, other settings are refused, a flag throws the old work away."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import IO, Any, Generic, TypeVar

import msgspec

from inpars_lib.cli import InputError, shorten
from inpars_lib.files import json_line, named_errors

FORMAT_VERSION = 2  # of logs and of meta files; docs/files.md lists them
HEADER = b'{"format_version":'  # start of a log's first line
HASH = re.compile("[0-9a-f]{32,}")
DISCARD = "Repeat the earlier settings to resume, or add --restart to throw the earlier work away."

Row = TypeVar("Row")


def add_restart_flag(add: Callable[..., Any]) -> None:
    """Add --restart with the `add_argument` of a parser."""
    add("--restart", action="store_true", help="throw the unfinished work of an earlier run away and start over")


def check_settings(path: str, before: Mapping[str, Any], now: Mapping[str, Any], action: str = DISCARD) -> None:
    """Check that earlier work has the settings of this run. Settings that are None or absent are equal.

    Args:
        path: File of the earlier work, for the error.
        before: Its settings.
        now: The settings of this run, as JSON values.
        action: What the user can do.

    Raises:
        InputError: They differ. The error names each difference with both values, of hashes only the name.
    """
    differences = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if any(isinstance(value, str) and HASH.fullmatch(value) for value in (old, new)):
            differences.append(f"the {name.replace('_', ' ')} differs")
        else:
            differences.append(f"{name} {shorten(json.dumps(old))}, now {shorten(json.dumps(new))}")
    if differences:
        raise InputError(f"{path}: made with other settings ({'; '.join(differences)}). {action}")


def read_state(path: str, kind: type[Row], action: str) -> Row:
    """Return the content of a JSON file that a script of ours wrote.

    Args:
        path: The file.
        kind: Type of the content, checked by msgspec.
        action: What the user can do about a damaged file.

    Raises:
        InputError: The content is not of this type.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: damaged, or not a file of this script ({shorten(error)}). {action}") from None


def repair_last_line(path: str) -> None:
    """Truncate an append-only JSONL file to its last complete row, which a kill during a write may have torn.

    Call this for a file that is known to be ours.
    """
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
        except (ValueError, RecursionError):
            file.truncate(complete)


class ResumeLog(Generic[Row]):
    """Append-only JSONL log of finished work, deleted when the output is complete.

    The first line of each file holds the settings. Rank 0 of torchrun writes PATH, rank N writes PATH.N, and every rank
    reads all of them. A torn last line is skipped.

    Args:
        path: The log. Nothing is kept without one.
        settings: Everything that the work depends on, as JSON values.
        row: Type of a row, checked by msgspec.
        rank: This process among those of torchrun.
    """

    def __init__(self, path: str | None, settings: Mapping[str, Any], row: type[Row], rank: int = 0) -> None:
        self.path, self.rank = path, rank
        self.settings: dict[str, Any] = json.loads(json.dumps({"format_version": FORMAT_VERSION, **settings}))
        self._row = msgspec.json.Decoder(row)
        self._file: IO[bytes] | None = None

    def _paths(self) -> list[str]:
        if self.path is None or not os.path.isdir(os.path.dirname(self.path) or "."):
            return []
        folder, name = os.path.split(self.path)
        pattern = re.compile(rf"{re.escape(name)}(\.\d+)?")
        names = sorted(found for found in os.listdir(folder or ".") if pattern.fullmatch(found))
        return [os.path.join(folder, found) for found in names]

    def _read_settings(self, path: str) -> dict[str, Any] | None:
        """Return the settings of a file, None of a file that a kill left without any."""
        with open(path, "rb") as file:
            line = file.readline()
        ours = line.startswith(HEADER)
        if not line.endswith(b"\n") and (ours or HEADER.startswith(line)):
            return None
        if ours:
            with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                return msgspec.json.decode(line, type=dict[str, Any])
        raise InputError(f"{path}: not a log of this script. Move the file, or name another output.")

    def prepare(self, restart: bool = False) -> None:
        """Check the files of earlier runs, in rank 0 before any rank reads or writes.

        Args:
            restart: Delete them instead.

        Raises:
            InputError: A file has other settings, or is not a log.
        """
        for path in self._paths():
            settings = self._read_settings(path)
            if restart or settings is None:
                os.remove(path)
            else:
                check_settings(path, settings, self.settings)

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all files.

        Raises:
            InputError: A complete line is not a row.
        """
        for path in self._paths():
            with open(path, "rb") as file:
                file.readline()
                for number, line in enumerate(file, 2):
                    try:
                        yield self._row.decode(line)
                    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                        if not line.endswith(b"\n"):
                            break  # a kill tore it
                        problem = f"damaged ({shorten(error)})"
                        action = "Add --restart to throw the earlier work away."
                        raise InputError(f"{path}, line {number}: {problem}. {action}") from None

    def write(self, row: Row) -> None:
        """Append a row and hand it to the operating system."""
        if self.path is None:
            return
        if self._file is None:
            path = f"{self.path}.{self.rank}" if self.rank else self.path
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            if os.path.exists(path):
                repair_last_line(path)
            self._file = open(path, "ab")
            if not self._file.tell():
                self._file.write(json_line(self.settings).encode(errors="replace"))
        with named_errors(self.path):
            self._file.write(msgspec.json.encode(row) + b"\n")
            self._file.flush()

    def delete(self) -> None:
        """Delete all files, because the output is complete."""
        if self._file:
            self._file.close()
        for path in self._paths():
            os.remove(path)
