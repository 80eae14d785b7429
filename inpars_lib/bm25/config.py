"""Settings of BM25 and their flags."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inpars_lib.cli import at_least, between

if TYPE_CHECKING:
    import argparse

SETTINGS_FILE = "inpars.json"  # beside Lucene's files in an index of ours
DEFAULTS: dict[str, Any] = {"language": "en", "k1": 0.9, "b": 0.4}  # k1 and b are Pyserini's


@dataclass(frozen=True)
class BM25Config:
    """How to search. The index stores k1, b and language; None takes the stored value.

    Attributes:
        threads: Threads of the search.
        k1: BM25's term frequency saturation. Stored by default: Pyserini's 0.9.
        b: BM25's length normalization, 0 to 1. Stored by default: Pyserini's 0.4.
        language: Lucene's analyzer. None takes the language stored in the index, or English.
    """

    threads: int = os.cpu_count() or 1
    k1: float | None = None
    b: float | None = None
    language: str | None = None


def add_search_flags(parser: "argparse.ArgumentParser") -> None:
    """Add the flags of a command that searches: the fields of `BM25Config`."""
    add = parser.add_argument
    add("--k1", type=at_least(0, float), help="BM25's k1 (default: stored in the index, or 0.9)")
    add("--b", type=between(0, 1), help="BM25's b, from 0 to 1 (default: stored in the index, or 0.4)")
    add("--language", help="Lucene's analyzer: en, de, zh, ... (default: the language stored in the index, or en)")
    add("--threads", type=at_least(1), default=os.cpu_count(), help="threads of BM25 (default: one per core)")
