"""Queries and texts in temporary files, so that memory does not grow with them.

The files have no name, and disappear with the process, also after a kill.
"""

import tempfile
from collections.abc import Iterable, Iterator

import msgspec

from inpars_lib.files import named_errors
from inpars_lib.formats.records import SyntheticQuery

ABSENT = -1


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
    """Texts of documents in a temporary file in `folder`. In memory are the ids and where their texts start.

    Args:
        doc_ids: Documents whose texts will be stored.
        folder: Where the temporary file is.
    """

    def __init__(self, doc_ids: Iterable[str], folder: str) -> None:
        self._folder, self._size = folder, 0
        self._file = tempfile.TemporaryFile(dir=folder)
        self.starts = dict.fromkeys(doc_ids, ABSENT)

    def add(self, doc_id: str, text: str) -> None:
        """Store a text of one line. An empty text counts as none."""
        if not text:
            return
        self.starts[doc_id] = self._size
        self._file.seek(self._size)
        with named_errors(self._folder):
            self._size += self._file.write(text.encode() + b"\n")

    def text(self, doc_id: str) -> str:
        """Return the text of a document, empty if there is none."""
        start = self.starts[doc_id]
        if start == ABSENT:
            return ""
        self._file.seek(start)
        return self._file.readline().decode().rstrip("\n")
