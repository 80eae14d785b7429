"""Settings of BM25, their flags, and what an index stores of them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from inpars_lib.cli import InputError, at_least, between
from inpars_lib.resume import FORMAT_VERSION, read_state

if TYPE_CHECKING:
    import argparse

SETTINGS_FILE = "inpars.json"  # beside Lucene's files in an index of ours


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


class IndexSettings(msgspec.Struct, frozen=True):
    """What an index stores: the settings of its searches."""

    language: str = "en"
    k1: Annotated[float, msgspec.Meta(ge=0)] = 0.9
    b: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.4
    format_version: int = FORMAT_VERSION

    def chosen(self, config: BM25Config) -> "IndexSettings":
        """Return these settings, each replaced by that of `config` if given."""
        given = {name: getattr(config, name) for name in ("language", "k1", "b")}
        return msgspec.structs.replace(self, **{name: value for name, value in given.items() if value is not None})


def read_index_settings(index: str, config: BM25Config) -> IndexSettings | None:
    """Return the settings that an index stores, None of an index that another tool built.

    Raises:
        InputError: The file is damaged, or `config` asks for another language.
    """
    path = Path(index, SETTINGS_FILE)
    if not path.exists():
        return None
    settings = read_state(str(path), IndexSettings, "Delete the index and build it again.")
    if config.language not in (None, settings.language):
        problem = f"indexed with --language {settings.language}"
        raise InputError(f"{index}: {problem}. Omit --language, or build another index.")
    return settings


def add_search_flags(parser: "argparse.ArgumentParser") -> None:
    """Add the flags of a command that searches: the fields of `BM25Config`."""
    add = parser.add_argument
    add("--k1", type=at_least(0, float), help="BM25's k1 (default: stored in the index, or 0.9)")
    add("--b", type=between(0, 1), help="BM25's b, from 0 to 1 (default: stored in the index, or 0.4)")
    add("--language", help="Lucene's analyzer: en, de, zh, ... (default: the language stored in the index, or en)")
    add("--threads", type=at_least(1), default=os.cpu_count(), help="threads of BM25 (default: one per core)")
