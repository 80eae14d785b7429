"""Open an index and retrieve the hits of queries."""

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from inpars_lib.bm25.config import BM25Config, IndexSettings, read_index_settings
from inpars_lib.bm25.index import build_index, check_language, count_documents
from inpars_lib.bm25.lucene import analyzer_languages, lucene_errors, start_lucene
from inpars_lib.cli import InputError, report
from inpars_lib.formats.fields import tsv_line
from inpars_lib.formats.records import ScoredDoc
from inpars_lib.formats.runs import RankedList, read_anserini_run, without_query

BLOCK = 256  # queries that Lucene answers at a time, which is one step of the progress bar
# The language in the name of a prebuilt index; `-en`: documents that were translated into English
NAMED_LANGUAGE = re.compile(r"(?:(?:miracl|mrtydi|hc4)-v\d\.\d|neuclir22)-(?:[a-z]+-(?=en\b))?([a-z]+)")
MRTYDI_LANGUAGES = {"arabic": "ar", "bengali": "bn", "english": "en", "finnish": "fi", "indonesian": "id",
                    "japanese": "ja", "korean": "ko", "russian": "ru", "telugu": "te", "thai": "th"}  # fmt: skip
CONTROL_CHARACTERS = "".join(map(chr, range(33)))


class BM25Searcher:
    """An open index. Anserini's SearchCollection answers blocks of queries and writes a run for each block.

    Reading a run is faster than handing each hit from Java to Python.

    Args:
        index: Folder of the index.
        settings: Language, k1 and b of the search.
        threads: Threads of the search.
    """

    def __init__(self, index: str, settings: IndexSettings, threads: int) -> None:
        self._index, self._settings = os.path.abspath(index), settings
        words = ["-index", self._index, "-language", settings.language, "-threads", threads]
        words += ["-bm25", "-bm25.k1", settings.k1, "-bm25.b", settings.b]
        words += ["-topicReader", "TsvString", "-runtag", "bm25"]
        self._words = list(map(str, words))

    def settings(self) -> dict[str, Any]:
        """Return the index, a hash of its state, and k1, b and language."""
        segments = [(path.name, path.stat().st_mtime_ns) for path in sorted(Path(self._index).glob("segments_*"))]
        state = hashlib.sha256(repr(segments).encode()).hexdigest()
        parameters = {"language": self._settings.language, "k1": self._settings.k1, "b": self._settings.b}
        return {"index": self._index, "state of the index": state, **parameters}

    def search(self, queries: Mapping[str, str], k: int, bar: bool = True) -> Iterator[tuple[str, Sequence[ScoredDoc]]]:
        """Yield (query id, first `k` hits, best first) in the order of `queries`.

        Args:
            queries: Query text by id.
            k: Hits per query.
            bar: Show a progress bar.
        """
        from tqdm import tqdm

        remaining = iter(queries.items())
        with (
            tqdm(desc="BM25", total=len(queries), unit=" queries", disable=not bar) as progress,
            tempfile.TemporaryDirectory(prefix="inpars-") as folder,
        ):
            while block := list(islice(remaining, BLOCK)):
                found = self._search_block([text for _, text in block], k, folder)
                for number, (query_id, _) in enumerate(block):
                    yield query_id, RankedList(query_id, *found.get(str(number), ([], [])))
                progress.update(len(block))

    def search_without_query(self, queries: Mapping[str, str], k: int) -> Iterator[tuple[str, Sequence[ScoredDoc]]]:
        """Yield (query id, first `k` hits, best first), without documents that have the id of their query."""
        for query_id, hits in self.search(queries, k + 1):
            yield query_id, without_query(query_id, hits)[:k]

    def _search_block(self, texts: list[str], k: int, folder: str) -> dict[str, tuple[list[str], list[float]]]:
        """Return ids and scores of the hits by number of the query. Queries without a hit are absent."""
        from jnius import autoclass

        topics, run = os.path.join(folder, "topics.tsv"), os.path.join(folder, "run.txt")
        with open(topics, "w", encoding="utf-8", errors="replace") as file:
            # Anserini's reader strips all control characters, and cannot read a topic without a text.
            file.writelines(tsv_line(str(i), text) for i, text in enumerate(texts) if text.strip(CONTROL_CHARACTERS))
        if not os.path.getsize(topics):
            return {}
        anserini = "io.anserini.search.SearchCollection"
        with lucene_errors():
            args = autoclass(f"{anserini}$Args")()
            parser = autoclass("org.kohsuke.args4j.CmdLineParser")(args)
            words = *self._words, "-topics", topics, "-output", run, "-hits", str(k)
            parser.parseArgument(autoclass("java.util.Arrays").asList(*words))
            autoclass(anserini)(args).run()
        try:
            return read_anserini_run(run, self._index)
        finally:
            with suppress(FileNotFoundError):
                os.remove(run)  # never read for another block


def _prebuilt_index(name: str) -> str | None:
    """Return the folder of a prebuilt index of Pyserini, downloaded if not cached, or None if there is none."""
    from pyserini.prebuilt_index_info import TF_INDEX_INFO

    if name not in TF_INDEX_INFO:
        return None
    size = TF_INDEX_INFO[name].get("size compressed (bytes)", 0) / 1e9
    print(f"Opening Pyserini's prebuilt index {name} ({size:.1f} GB if not cached) ...", file=sys.stderr)
    from pyserini.util import download_prebuilt_index

    try:
        folder: str = download_prebuilt_index(name, verbose=True)  # shows its own progress bar
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: this prebuilt index could not be downloaded ({error}). Set --index to a path that does not "
            "exist yet, and the corpus is indexed there."
        ) from None
    return folder


def _foreign_settings(index: str, config: BM25Config) -> IndexSettings:
    """Return the settings of an index that another tool built. The name of a prebuilt one may tell its language."""
    if named := NAMED_LANGUAGE.search(os.path.basename(index)):
        language = MRTYDI_LANGUAGES.get(named[1], named[1])
        if language in analyzer_languages():
            return IndexSettings(language=language)
    if config.language is None:
        report(f"{index}: this index stores no language. English is used; --language sets another.")
    return IndexSettings()


def open_index(
    index: str, corpus: str | None, config: BM25Config, advice: str = "Name the folder of an index."
) -> BM25Searcher:
    """Open an index: a folder, a prebuilt index of Pyserini, or a new path at which `corpus` is indexed first.

    Args:
        index: The index.
        corpus: The collection to index, None if the index exists.
        config: How to index and search.
        advice: What the user can do if there is neither an index nor a collection.

    Raises:
        InputError: The folder has no index, the prebuilt index cannot be downloaded, or there is nothing to index.
    """
    start_lucene()
    folder = index
    if os.path.isfile(index):
        raise InputError(f"{index}: this is a file. Set --index to a folder or to a prebuilt index of Pyserini.")
    if os.path.isdir(index) and os.listdir(index):
        if not any(Path(index).glob("segments_*")):
            raise InputError(f"{index}: no Lucene index in this folder. Name a path that does not exist yet.")
    elif not os.path.isdir(index) and (prebuilt := _prebuilt_index(index)):
        folder = prebuilt
    elif corpus is None:
        raise InputError(f"{index}: no such folder, and no prebuilt index of this name. {advice}")
    else:
        build_index(corpus, index, config)
    stored = read_index_settings(folder, config) or _foreign_settings(index, config)
    settings = stored.chosen(config)
    check_language(settings.language)
    try:
        count_documents(folder)
    except InputError as error:
        raise InputError(
            f"{index}: the index is damaged or from another version of Lucene ({error}). Set --index to a path that "
            "does not exist yet to index the collection again."
        ) from None
    return BM25Searcher(folder, settings, config.threads)
