"""Training triples on disk: TSV `query<TAB>positive<TAB>negative`, read at random."""

import array
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from inpars_lib.cli import InputError
from inpars_lib.records import Triple
from inpars_lib.text_lines import read_records


class TripleFile(Sequence[Triple]):
    """Training triples that stay on disk. Takes 16 bytes of memory a triple, whatever its length.

    Raises:
        InputError: No line is usable.
    """

    def __init__(self, path: str) -> None:
        with suppress(OSError), open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise InputError(f"{path}: compressed triples cannot be read at random. Run gunzip {path}.")
        numbers = [number for number, _ in read_records([path], self._parse, "`query<TAB>positive<TAB>negative`", path)]
        self._file = open(path, "rb")
        ends = array.array("q", [0])
        for line in self._file:
            ends.append(ends[-1] + len(line))
        self._spans = array.array("q", (ends[i] for number in numbers for i in (number - 1, number)))

    @staticmethod
    def _parse(line: str) -> Triple:
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) != 3 or not all(columns):
            raise ValueError("expected three texts separated by tabs")
        return Triple(*columns)

    def __len__(self) -> int:
        return len(self._spans) // 2

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, end = self._spans[2 * i : 2 * i + 2]
        return self._parse(os.pread(self._file.fileno(), end - start, start).decode().removeprefix("\ufeff"))
