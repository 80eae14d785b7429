"""Index a collection with Lucene."""

import array
import os
import shutil
import sys
from contextlib import suppress
from itertools import islice
from pathlib import Path

from inpars_lib.bm25.config import DEFAULTS, SETTINGS_FILE, BM25Config
from inpars_lib.bm25.lucene import quiet_lucene, start_lucene
from inpars_lib.cli import InputError, warn
from inpars_lib.files import exclusive, json_line
from inpars_lib.formats.collection import read_collection
from inpars_lib.resume import FORMAT_VERSION

INDEX_BATCH = 5_000  # documents handed to Lucene at a time
LONGEST_JSON_TEXT = 10_000_000  # characters; Anserini's JSON parser refuses texts of 20 million


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


def check_language(language: str) -> None:
    """Raise InputError if Lucene has no analyzer for this language."""
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
        check_language(config.language or "en")
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
