"""Index a collection with Lucene."""

import array
import os
import shutil
import sys
from contextlib import suppress
from itertools import islice
from pathlib import Path

import msgspec

from inpars_lib.bm25.config import SETTINGS_FILE, BM25Config, IndexSettings
from inpars_lib.bm25.lucene import analyzer_languages, lucene_errors, start_lucene
from inpars_lib.cli import InputError, counted, warn
from inpars_lib.files import exclusive, json_line, unfinished_name
from inpars_lib.formats.collection import read_collection

INDEX_BATCH = 5_000  # documents handed to Lucene at a time
LONGEST_JSON_TEXT = 10_000_000  # characters; Anserini's JSON parser refuses texts of 20 million


def _check_unique_ids(hashes: "array.array[int]", corpus: str) -> None:
    import numpy

    in_order = numpy.sort(numpy.frombuffer(hashes, dtype=numpy.int64))
    repeated = set(in_order[1:][in_order[1:] == in_order[:-1]].tolist())
    if not repeated:
        return
    seen: set[str] = set()
    for doc in read_collection(corpus):
        if doc.doc_id in seen:
            raise InputError(f"{corpus}: the id {doc.doc_id} is on two lines. An index needs each id once.")
        if hash(doc.doc_id) in repeated:
            seen.add(doc.doc_id)


def check_language(language: str) -> None:
    """Raise InputError if Lucene has no analyzer for this language."""
    known = analyzer_languages()
    if language not in known:
        raise InputError(
            f"--language {language}: Lucene has no analyzer of this name. Choose one of {', '.join(known)}."
        )


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
        settings = IndexSettings().chosen(config)
        check_language(settings.language)
        print(f"Indexing {corpus} into {index} ...", file=sys.stderr)
        unfinished = unfinished_name(index)
        shutil.rmtree(unfinished, ignore_errors=True)
        os.makedirs(unfinished)
        try:
            _index_documents(corpus, unfinished, settings.language, config.threads)
            Path(unfinished, SETTINGS_FILE).write_bytes(msgspec.json.encode(settings))
            os.replace(unfinished, index)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _index_documents(corpus: str, folder: str, language: str, threads: int) -> None:
    """Write Lucene's files of a collection into an empty folder and check that they are complete."""
    from jnius import autoclass

    hashes = array.array("q")  # 8 bytes a document, where a set of ids would take 100
    empty = 0  # documents without a text, which Anserini skips
    # The JVM resolves relative paths against the working directory at its start.
    words = ["-input", "", "-collection", "JsonCollection", "-index", os.path.abspath(folder)]
    words += ["-language", language, "-threads", str(threads)]
    with lucene_errors():
        indexer = autoclass("io.anserini.index.SimpleIndexer")(words)
        document = autoclass("io.anserini.collection.JsonCollection$Document")
    docs = read_collection(corpus, desc="Indexing")
    while batch := list(islice(docs, INDEX_BATCH)):
        hashes.extend(hash(doc.doc_id) for doc in batch)
        empty += sum(not doc.text for doc in batch)
        long = [doc for doc in batch if len(doc.text) >= LONGEST_JSON_TEXT]
        rows = [{"id": doc.doc_id, "contents": doc.text} for doc in batch if len(doc.text) < LONGEST_JSON_TEXT]
        with lucene_errors():
            indexer.addRawDocuments([json_line(row) for row in rows])
            for doc in long:
                indexer.addJsonDocument(document.fromFields(doc.doc_id, doc.text))
    with lucene_errors():
        indexer.close()
    _check_unique_ids(hashes, corpus)
    expected = len(hashes) - empty
    if not expected:
        raise InputError(f"{corpus}: no document has a text. Check the format of the collection.")
    # Anserini only logs errors of writing, such as a full disk, so the documents in the index are counted.
    indexed = 0
    with suppress(InputError):
        indexed = count_documents(folder)
    if indexed != expected:
        raise InputError(f"{corpus}: {indexed:,} of {expected:,} documents were indexed. Check the free disk space.")
    if empty:
        warn(f"{corpus}: skipped {counted(empty, 'document')} without a text.")


def count_documents(index: str) -> int:
    """Return the number of documents in an index.

    Raises:
        InputError: Lucene cannot open the index.
    """
    from jnius import autoclass

    with lucene_errors():
        searcher = autoclass("io.anserini.search.SimpleSearcher")(os.path.abspath(index))
        count: int = searcher.get_total_num_docs()
        searcher.close()
    return count
