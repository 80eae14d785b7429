"""Queries and texts in temporary files, so that memory does not grow with them.

The files have no name, and disappear with the process, also after a kill.
"""

import tempfile
from collections.abc import Iterator

import msgspec

from inpars_lib.files import named_errors
from inpars_lib.formats.records import SyntheticQuery


class SpooledQueries:
    """Synthetic queries in a temporary file in `folder`, to be read several times, by one loop at a time."""

    def __init__(self, folder: str) -> None:
        self._folder, self._count = folder, 0
        self._file = tempfile.TemporaryFile(dir=folder)

    def append(self, query: SyntheticQuery) -> None:
        """Store a query."""
        with named_errors(self._folder):
            self._file.write(msgspec.json.encode(query) + b"\n")
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[SyntheticQuery]:
        self._file.seek(0)
        return map(msgspec.json.Decoder(SyntheticQuery).decode, self._file)


class SpooledTexts:
    """Texts of documents in a temporary file in `folder`. Only ids and positions are in memory."""

    def __init__(self, folder: str) -> None:
        self._folder, self._size = folder, 0
        self._file = tempfile.TemporaryFile(dir=folder)
        self._start: dict[str, int] = {}

    def add(self, doc_id: str, text: str) -> None:
        """Store a text of one line. An empty text counts as none."""
        if text:
            self._start[doc_id] = self._size
            with named_errors(self._folder):
                self._size += self._file.write(text.encode() + b"\n")

    def __contains__(self, doc_id: object) -> bool:
        return doc_id in self._start

    def text(self, doc_id: str) -> str:
        """Return the text of a document, empty if there is none."""
        if doc_id not in self._start:
            return ""
        self._file.seek(self._start[doc_id])
        return self._file.readline().decode().rstrip("\n")
