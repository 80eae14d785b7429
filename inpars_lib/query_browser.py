"""What to look at after the filter: a self-contained HTML page with a sample of rows."""

import json
import random
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

from inpars_lib.formats.records import SyntheticQuery

PAGE = Path(__file__).with_suffix(".html")
SAMPLE_SIZE = 500  # rows on the page
SHOWN_CHARS = 2000  # of a document


class QuerySample:
    """Uniform random sample of rows, of which only `size` are in memory (Vitter's algorithm R, 1985)."""

    def __init__(self, size: int = SAMPLE_SIZE) -> None:
        self.size, self.seen = size, 0
        self.rows: list[tuple[SyntheticQuery, float | None, str | None]] = []
        self._random = random.Random(0)

    def add(self, query: SyntheticQuery, score: float | None, drop_reason: str | None) -> None:
        """Offer a row to the sample.

        Args:
            query: The row.
            score: Its score, None if it was dropped before scoring.
            drop_reason: Why it was dropped, None if it has a score.
        """
        self.seen += 1
        at = len(self.rows) if len(self.rows) < self.size else self._random.randrange(self.seen)
        if at < self.size:
            self.rows[at : at + 1] = [(query, score, drop_reason)]

    def write(self, file: IO[str], kept: Collection[int], summary: str) -> None:
        """Write the page.

        Args:
            file: Where to write HTML.
            kept: Lines of the input that were kept.
            summary: Sentence at the top of the page.
        """
        rows: list[dict[str, Any]] = [
            {
                "question": query.question,
                "score": score,
                "status": reason or ("kept" if query.line in kept else "below the cutoff"),
                "document": query.doc_text[:SHOWN_CHARS],
                "doc_id": query.doc_id,
            }
            for query, score, reason in self.rows
        ]
        sampled = "" if len(rows) == self.seen else ", sampled at random"
        summary += f" The page shows {len(rows):,} of {self.seen:,} rows{sampled}."
        data = json.dumps({"about": summary, "rows": rows})  # ASCII, so that no character can end the script element
        for character in "<>&":
            data = data.replace(character, f"\\u{ord(character):04x}")
        file.write(PAGE.read_text(encoding="utf-8").replace("DATA", data))
