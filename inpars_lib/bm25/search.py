"""Open an index and retrieve the hits of queries."""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from inpars_lib.bm25.config import DEFAULTS, SETTINGS_FILE, BM25Config
from inpars_lib.bm25.index import build_index, check_language, count_documents
from inpars_lib.bm25.lucene import quiet_lucene, start_lucene
from inpars_lib.cli import InputError
from inpars_lib.formats.lines import tsv_line
from inpars_lib.formats.records import ScoredDoc
from inpars_lib.formats.runs import RankedList, read_anserini_run

BLOCK = 256  # queries that Lucene answers at a time, which is one step of the progress bar
CONTROL_CHARACTERS = "".join(map(chr, range(33)))


class BM25Searcher:
    """An open index. Anserini's SearchCollection answers blocks of queries and writes a run for each block.

    Reading a run is faster than handing each hit from Java to Python.

    Args:
        index: Folder of the index.
        settings: The index's stored k1, b and language, each replaced by that of `config` if given.
        config: How to search.
    """

    def __init__(self, index: str, settings: Mapping[str, Any], config: BM25Config) -> None:
        self._index, self._parameters = os.path.abspath(index), {}
        for name in DEFAULTS:
            chosen = getattr(config, name)
            self._parameters[name] = settings[name] if chosen is None else chosen
        words = ["-index", self._index, "-language", self._parameters["language"], "-threads", config.threads]
        words += ["-bm25", "-bm25.k1", self._parameters["k1"], "-bm25.b", self._parameters["b"]]
        words += ["-topicReader", "TsvString", "-runtag", "bm25"]
        self._words = list(map(str, words))

    def settings(self) -> dict[str, Any]:
        """Return the index, a hash of its state, and k1, b and language."""
        segments = [(path.name, path.stat().st_mtime_ns) for path in sorted(Path(self._index).glob("segments_*"))]
        state = hashlib.sha256(repr(segments).encode()).hexdigest()
        return {"index": self._index, "state of the index": state, **self._parameters}

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
        with quiet_lucene():
            args = autoclass(f"{anserini}$Args")()
            parser = autoclass("org.kohsuke.args4j.CmdLineParser")(args)
            words = *self._words, "-topics", topics, "-output", run, "-hits", str(k)
            parser.parseArgument(autoclass("java.util.Arrays").asList(*words))
            autoclass(anserini)(args).run()
        try:
            return read_anserini_run(run)
        finally:
            with suppress(FileNotFoundError):
                os.remove(run)  # never read for another block


def _prebuilt_index(name: str) -> str | None:
    """Return the folder of a prebuilt index of Pyserini, downloaded if not cached, or None if there is none."""
    with quiet_lucene():
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


def open_index(index: str, corpus: str | None, config: BM25Config) -> BM25Searcher:
    """Open an index: a folder, a prebuilt index of Pyserini, or a new path at which `corpus` is indexed first.

    Raises:
        InputError: The folder has no index, the prebuilt index cannot be downloaded, or there is nothing to index.
    """
    start_lucene()
    if os.path.isdir(index) and os.listdir(index):
        if not any(Path(index).glob("segments_*")):
            raise InputError(f"{index}: no Lucene index in this folder. Name a path that does not exist yet.")
    elif os.path.isfile(index):
        raise InputError(f"{index}: this is a file. Set --index to a folder or to a prebuilt index of Pyserini.")
    elif not os.path.isdir(index) and (folder := _prebuilt_index(index)):
        index = folder
    elif corpus is None:
        raise InputError(f"{index}: no such folder, and no prebuilt index of this name. Name the folder of an index.")
    else:
        build_index(corpus, index, config)
    settings, stored = Path(index, SETTINGS_FILE), dict(DEFAULTS)
    if settings.exists():
        stored |= json.loads(settings.read_text())
        if config.language not in (None, stored["language"]):
            language = stored["language"]
            raise InputError(f"{index}: indexed with --language {language}. Omit --language, or build another index.")
    check_language(config.language or stored["language"])
    try:
        count_documents(index)
    except InputError as error:
        raise InputError(
            f"{index}: the index is damaged or from another version of Lucene ({error}). Set --index to a path that "
            "does not exist yet to index the collection again."
        ) from None
    return BM25Searcher(index, stored, config)
