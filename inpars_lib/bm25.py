"""BM25 with Lucene: index a collection, open an index, retrieve the first-stage run of topics.

    python -m inpars_lib.bm25 index --corpus collection.jsonl --index index --language de
    python -m inpars_lib.bm25 search --index index --topics topics.tsv --output run.bm25.txt

`index` reads a collection and writes a folder. `search` reads topics and writes a TREC run. An index stores its
language, k1 and b. No Java has to be installed.
"""

import array
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inpars_lib.cli import InputError, at_least, between, run_script, script_parser, warn
from inpars_lib.formats import read_collection, read_topics, tsv_line, write_run
from inpars_lib.lucene import quiet_lucene, start_lucene
from inpars_lib.records import RankedList, ScoredDoc
from inpars_lib.storage import FORMAT_VERSION, exclusive, json_line

if TYPE_CHECKING:
    import argparse

INDEX_BATCH = 5_000  # documents handed to Lucene at a time
LONGEST_JSON_TEXT = 10_000_000  # characters; Anserini's JSON parser refuses texts of 20 million
BLOCK = 256  # queries that Lucene answers at a time, which is one step of the progress bar
CONTROL_CHARACTERS = "".join(map(chr, range(33)))
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


# ------------------------------------------------------------------------------------------------------------ index


def _check_unique_ids(hashes: "array.array[int]", corpus: str) -> None:
    import numpy

    in_order = numpy.sort(numpy.frombuffer(hashes, dtype=numpy.int64))
    repeated = set(in_order[1:][in_order[1:] == in_order[:-1]].tolist())
    seen: set[str] = set()
    for doc in read_collection(corpus) if repeated else ():
        if doc.doc_id in seen:
            raise InputError(f"{corpus}: the id {doc.doc_id} is on two lines. An index needs each id once.")
        if hash(doc.doc_id) in repeated:
            seen.add(doc.doc_id)


def _check_language(language: str) -> None:
    from jnius import autoclass

    known = autoclass("io.anserini.analysis.AnalyzerMap").analyzerMap.keySet().toString().strip("[]").split(", ")
    if language not in ("en", *known):
        listed = ", ".join(sorted(["en", *known]))
        raise InputError(f"--language {language}: Lucene has no analyzer of this name. Choose one of {listed}.")


def build_index(corpus: str, index: str, config: BM25Config) -> None:
    """Index a collection. The folder appears under its name only when the index is complete.

    Args:
        corpus: The collection.
        index: The folder to create.
        config: Threads and language of the indexing; k1 and b that the index stores.

    Raises:
        InputError: The folder exists, no line is usable, an id is on two lines, or the language is unknown.
    """
    index = index.rstrip("/")
    with exclusive(index):
        if os.path.exists(index) and not (os.path.isdir(index) and not os.listdir(index)):
            raise InputError(f"{index}: the index exists. Delete the folder to rebuild it, or name another path.")
        start_lucene()
        _check_language(config.language or "en")
        _build_index(corpus, index, config)


def _build_index(corpus: str, index: str, config: BM25Config) -> None:
    from jnius import autoclass

    print(f"Indexing {corpus} into {index} ...", file=sys.stderr)
    docs = read_collection(corpus, desc="Indexing")
    hashes = array.array("q")  # 8 bytes a document, where a set of ids would take 100
    empty = 0  # documents without a text, which Anserini skips
    stored = {name: default if getattr(config, name) is None else getattr(config, name)
              for name, default in DEFAULTS.items()}  # fmt: skip
    unfinished = f"{index}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    try:
        # The JVM resolves relative paths against the working directory at its start.
        words = ["-input", "", "-collection", "JsonCollection", "-index", os.path.abspath(unfinished)]
        words += ["-language", stored["language"], "-threads", str(config.threads)]
        with quiet_lucene():
            indexer = autoclass("io.anserini.index.SimpleIndexer")(words)
            document = autoclass("io.anserini.collection.JsonCollection$Document")
        while batch := list(islice(docs, INDEX_BATCH)):
            hashes.extend(hash(doc.doc_id) for doc in batch)
            empty += sum(not doc.text for doc in batch)
            with quiet_lucene():
                rows = [{"id": doc.doc_id, "contents": doc.text} for doc in batch]
                indexer.addRawDocuments([json_line(row) for row in rows if len(row["contents"]) < LONGEST_JSON_TEXT])
                for row in rows:
                    if len(row["contents"]) >= LONGEST_JSON_TEXT:
                        indexer.addJsonDocument(document.fromFields(row["id"], row["contents"]))
        with quiet_lucene():
            indexer.close()
        _check_unique_ids(hashes, corpus)
        if empty == len(hashes):
            raise InputError(f"{corpus}: no document has a text. Check the format of the collection.")
        # Anserini only logs errors of writing, such as a full disk, so the documents in the index are counted.
        indexed = 0
        with suppress(InputError):
            indexed = count_documents(unfinished)
        if indexed != len(hashes) - empty:
            raise InputError(
                f"{index}: {indexed:,} of {len(hashes) - empty:,} documents were indexed. Check the free disk space."
            )
        if empty:
            warn(f"{corpus}: {empty:,} documents without a text are not in the index.")
        Path(unfinished, SETTINGS_FILE).write_text(json_line({"format_version": FORMAT_VERSION, **stored}))
        os.replace(unfinished, index)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


# ----------------------------------------------------------------------------------------------------------- search


class BM25Searcher:
    """An open index. Anserini's SearchCollection answers blocks of queries and writes a run for each block.

    Reading a run is faster than handing each hit from Java to Python.

    Args:
        index: Folder of the index.
        settings: The index's stored k1, b and language, each replaced by that of `config` if given.
        config: How to search.
    """

    def __init__(self, index: str, settings: Mapping[str, Any], config: BM25Config) -> None:
        language, k1, b = (
            settings[name] if getattr(config, name) is None else getattr(config, name) for name in DEFAULTS
        )
        self._index, self._parameters = os.path.abspath(index), (language, k1, b)
        words = ["-index", self._index, "-language", language, "-threads", config.threads, "-bm25"]
        words += ["-bm25.k1", k1, "-bm25.b", b, "-topicReader", "TsvString", "-runtag", "bm25"]
        self._words = list(map(str, words))

    def fingerprint(self) -> str:
        """Return a string that changes with the index and with k1, b and language."""
        segments = [(path.name, path.stat().st_mtime_ns) for path in sorted(Path(self._index).glob("segments_*"))]
        return str((self._index, self._parameters, segments))

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
            return _read_block(run)
        finally:
            with suppress(FileNotFoundError):
                os.remove(run)  # never read for another block


def _read_block(run: str) -> dict[str, tuple[list[str], list[float]]]:
    """Return ids and scores by query of a run that Anserini wrote. Faster than `read_run`, which checks every field.

    Raises:
        InputError: The run is missing or torn. Anserini hides errors of writing.
    """
    found: dict[str, tuple[list[str], list[float]]] = {}
    line = "\n"
    with suppress(FileNotFoundError), open(run, encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                break
            number, _, doc_id, _, score, _ = line.split(" ")
            if number not in found:
                found[number] = [], []
            found[number][0].append(doc_id)
            found[number][1].append(float(score))
    if not line.endswith("\n") or not os.path.exists(run):
        raise InputError(f"{run}: Lucene could not write its hits. Check the free disk space.")
    return found


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
    _check_language(config.language or stored["language"])
    try:
        count_documents(index)
    except InputError as error:
        raise InputError(
            f"{index}: the index is damaged or from another version of Lucene ({error}). Set --index to a path that "
            "does not exist yet to index the collection again."
        ) from None
    return BM25Searcher(index, stored, config)


def count_documents(index: str) -> int:
    """Return the number of documents in an index.

    Raises:
        InputError: Lucene cannot open the index.
    """
    from jnius import autoclass

    with quiet_lucene():
        searcher = autoclass("io.anserini.search.SimpleSearcher")(os.path.abspath(index))
        count: int = searcher.get_total_num_docs()
        searcher.close()
    return count


def add_search_flags(parser: "argparse.ArgumentParser") -> None:
    """Add the flags of a command that searches: the fields of `BM25Config`."""
    add = parser.add_argument
    add("--k1", type=at_least(0, float), help="BM25's k1 (default: stored in the index, or 0.9)")
    add("--b", type=between(0, 1), help="BM25's b, from 0 to 1 (default: stored in the index, or 0.4)")
    add("--language", help="Lucene's analyzer: en, de, zh, ... (default: the language stored in the index, or en)")
    add("--threads", type=at_least(1), default=os.cpu_count(), help="threads of BM25 (default: one per core)")


# ---------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> None:
    """Run `index` or `search`."""
    parser = script_parser(__doc__, prog="python -m inpars_lib.bm25")
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="index a collection")
    index.add_argument("--corpus", required=True, help="collection to index")
    index.add_argument("--index", required=True, help="folder to create")
    add_search_flags(index)
    retrieve = commands.add_parser("search", help="write the first-stage run of topics")
    retrieve.add_argument("--index", required=True, help="folder of an index, or a prebuilt index of Pyserini")
    retrieve.add_argument("--topics", required=True, help="topics: a file, a BEIR folder, or - for standard input")
    retrieve.add_argument("--output", required=True, help="run to write, TREC format, or - for standard output")
    retrieve.add_argument("--hits", type=at_least(1), default=1000, help="hits per query (default: %(default)s)")
    add_search_flags(retrieve)
    args = parser.parse_args(argv)
    if args.command == "index":
        build_index(args.corpus, args.index, BM25Config(args.threads, args.k1, args.b, args.language))
        print(f"{args.index}: index of {args.corpus}", file=sys.stderr)
        return
    topics = read_topics(args.topics)
    searcher = open_index(args.index, None, BM25Config(args.threads, args.k1, args.b, args.language))
    counts = array.array("q")

    def hits() -> Iterator[ScoredDoc]:
        for _, found in searcher.search(topics, args.hits):
            counts.append(len(found))
            yield from found
        if not any(counts):
            raise InputError(
                f"{args.topics}: no query has a hit in {args.index}. Pass topics and index of one collection."
            )

    with exclusive(args.output) if args.output != "-" else nullcontext():
        write_run(args.output, hits(), tag="bm25")
    empty = f"; {counts.count(0):,} queries without a hit" if counts.count(0) else ""
    print(f"{args.output}: {sum(counts):,} hits of {len(counts):,} queries{empty}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
