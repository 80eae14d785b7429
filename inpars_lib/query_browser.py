"""What to look at after the filter: a self-contained HTML page with a sample of rows."""

import json
import random
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO, Any

from inpars_lib.formats.records import SyntheticQuery

PAGE = Path(__file__).with_suffix(".html")
SAMPLE_SIZE = 500  # rows on the page
SHOWN_CHARS = 2000  # of a document
COPIED_WORDS = 6  # consecutive words of its document, or the whole query, make a query copied


def _words(text: str) -> str:
    """Return the lowercase words of a text, each between spaces."""
    words = re.findall(r"[^_\W]+", text.lower())
    return f" {' '.join(words)} "


def prompt_lines(paths: Iterable[str]) -> set[str]:
    """Return the words of each line of prompt files, without the line's label. The example queries are among them."""
    texts = [Path(path).read_text(encoding="utf-8-sig", errors="replace") for path in paths]
    return {_words(line.rpartition(": ")[2]) for text in texts for line in text.splitlines()}


def flaw_of(query: SyntheticQuery, examples: Collection[str]) -> str:
    """Return why log-probability overrates a query: copied from the prompt or the document, or it repeats itself."""
    question, document = _words(query.question), _words(query.doc_text)
    words = question.split()
    if question in examples:
        return "copied from the prompt"
    if len(words) > 2 * len(set(words)):
        return "repeats itself"
    length = min(len(words), COPIED_WORDS)
    runs = [" ".join(words[start : start + length]) for start in range(len(words) - length + 1)]
    if length and any(f" {run} " in document for run in runs):
        return "copied from the document"
    return ""


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

    def write(self, file: IO[str], kept: Collection[int], summary: str, examples: Collection[str] = ()) -> None:
        """Write the page.

        Args:
            file: Where to write HTML.
            kept: Lines of the input that were kept.
            summary: Sentence at the top of the page.
            examples: Lines of the prompt, whose copies are marked.
        """
        rows: list[dict[str, Any]] = [
            {
                "question": query.question,
                "score": score,
                "status": reason or ("kept" if query.line in kept else "below the cutoff"),
                "flaw": flaw_of(query, examples),
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
