"""Scoring of many pairs: blocks of whole queries, scores on disk to resume from."""

import array
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from inpars_lib.cli import InputError, warn
from inpars_lib.files import atomic_write
from inpars_lib.formats.collection import conflicting_texts, missing_documents, read_collection
from inpars_lib.formats.folders import collection_files
from inpars_lib.formats.lines import count_lines
from inpars_lib.formats.records import ScoredDoc, SyntheticQuery
from inpars_lib.resume import FORMAT_VERSION, ResumeLog

if TYPE_CHECKING:
    import numpy

    from inpars_lib.rerankers.base import Reranker
from inpars_lib.processes import ProcessGroup

BLOCK_QUERIES = 1024  # synthetic queries scored at a time
BLOCK_PAIRS = 256  # pairs scored at a time, of whole queries: enough to batch pairs of similar length
TOKENIZER_BATCH = 1024  # documents tokenized at a time


class PairBlocks:
    """The pairs to score, in blocks of whole queries with at least BLOCK_PAIRS pairs, except for the last.

    Blocks do not depend on the number of processes or on where a run was killed. So neither do batches and scores.

    Args:
        topics: Query text by query id.
        run: Hits by query id, best first.
        top_k: Hits per query to score.
    """

    def __init__(self, topics: Mapping[str, str], run: Mapping[str, Sequence[ScoredDoc]], top_k: int) -> None:
        self.topics = topics
        self.run = {query_id: hits[:top_k] for query_id, hits in run.items()}
        self.query_ids: list[list[str]] = []  # by block
        self.sizes: list[int] = []  # pairs by block
        for query_id, hits in self.run.items():
            if not self.sizes or self.sizes[-1] >= BLOCK_PAIRS:
                self.query_ids.append([])
                self.sizes.append(0)
            self.query_ids[-1].append(query_id)
            self.sizes[-1] += len(hits)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> list[ScoredDoc]:
        return [hit for query_id in self.query_ids[i] for hit in self.run[query_id]]

    def doc_ids(self, blocks: Iterable[int]) -> Iterator[str]:
        """Yield the document ids of some blocks, repeated where blocks share documents."""
        return (hit.doc_id for i in blocks for hit in self[i])

    def fingerprint(self) -> str:
        """Return a hash of all queries and of the documents to score."""
        digest = hashlib.sha256()
        for query_id, hits in self.run.items():
            ids = " ".join(hit.doc_id for hit in hits)
            digest.update(f"{self.topics[query_id]}\t{query_id}\t{ids}\n".encode(errors="replace"))
        return digest.hexdigest()


def files_fingerprint(model: str, corpus: str | None = None) -> str:
    """Return a hash of the names, sizes and modification times of a model's and a collection's files."""
    listed = collection_files(corpus) if corpus and not corpus.startswith("ir_datasets:") else []
    files = [Path(path) for path in listed]
    if os.path.isdir(model):
        files += sorted(path for path in Path(model).iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


class ScoreStore:
    """Scores of finished blocks on disk: OUTPUT.scores/HASH/BLOCK.json, one file per block, written atomically.

    HASH stands for the settings, so scores of other settings are never mixed in or overwritten.

    Args:
        output: The run that is being made.
        settings: Everything that scores depend on.
    """

    def __init__(self, output: str, settings: Mapping[str, Any]) -> None:
        self.output, self.root = output, Path(f"{output}.scores")
        self.settings = json.dumps({"format_version": FORMAT_VERSION, **settings}, sort_keys=True, indent=2)
        self.folder = self.root / hashlib.sha256(self.settings.encode()).hexdigest()[:16]

    def open(self) -> None:
        """Create the folder. Warn if there are scores of other settings."""
        if self.root.exists() and not self.folder.exists():
            warn(f"{self.root}: has scores of other settings. Repeat the earlier flags to use them, or delete them.")
        with atomic_write(str(self.folder / "settings.json")) as file:
            file.write(self.settings + "\n")

    def finished(self) -> set[int]:
        """Return the numbers of all finished blocks."""
        return {int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdigit()}

    def write(self, block: int, scores: Sequence[float]) -> None:
        """Write the scores of a block."""
        with atomic_write(str(self.folder / f"{block}.json")) as file:
            json.dump(scores, file)

    def read(self, block: int) -> list[float]:
        """Return the scores of a finished block."""
        return json.loads((self.folder / f"{block}.json").read_text())

    def check_complete(self, blocks: int) -> None:
        """Check that all blocks are finished.

        Raises:
            InputError: Some are not, because a process failed.
        """
        if missing := blocks - len(self.finished()):
            raise InputError(f"{self.root}: {missing:,} of {blocks:,} blocks are missing. Run the same command again.")

    def delete(self) -> None:
        """Delete the scores of these settings."""
        shutil.rmtree(self.folder)
        if not any(self.root.iterdir()):  # no scores of other settings
            self.root.rmdir()


class TokenFile:
    """Token ids of documents in a temporary file. Takes 8 bytes of memory a document beside its id.

    Args:
        folder: Where to create the file.
        doc_ids: The documents that will be added.
    """

    def __init__(self, folder: str, doc_ids: Iterable[str]) -> None:
        self.file = tempfile.TemporaryFile(dir=folder if os.path.isdir(folder) else None)
        self.numbers: dict[str, int] = dict.fromkeys(doc_ids, -1)
        self._starts = array.array("q", [0])

    def add(self, doc_id: str, ids: "numpy.ndarray") -> bool:
        """Add a document's tokens. Return False if the document has different tokens already."""
        if self.numbers[doc_id] >= 0:
            return self[doc_id].tolist() == ids.tolist()
        self.numbers[doc_id] = len(self._starts) - 1
        self._starts.append(self._starts[-1] + ids.nbytes)
        self.file.write(ids.tobytes())
        return True

    def __getitem__(self, doc_id: str) -> "numpy.ndarray":
        import numpy

        start, end = self._starts[self.numbers[doc_id] : self.numbers[doc_id] + 2]
        self.file.flush()
        return numpy.frombuffer(os.pread(self.file.fileno(), end - start, start), dtype=numpy.int32)

    def length(self, doc_id: str) -> int:
        """Return the number of a document's tokens."""
        start, end = self._starts[self.numbers[doc_id] : self.numbers[doc_id] + 2]
        return (end - start) // 4


def tokenize_documents(reranker: "Reranker", corpus: str, doc_ids: Iterable[str], folder: str) -> TokenFile:
    """Tokenize documents of a collection, each once however many queries retrieve it.

    Args:
        reranker: The reranker whose tokenizer is used.
        corpus: The collection.
        doc_ids: The documents.
        folder: Folder of the temporary file.

    Raises:
        InputError: A document is not in the collection, or is there with two different texts.
    """
    tokens = TokenFile(folder, doc_ids)
    if not tokens.numbers:
        return tokens
    docs = read_collection(corpus, tokens.numbers, "Reading texts", repeats=True)
    while batch := list(islice(docs, TOKENIZER_BATCH)):
        for doc, ids in zip(batch, reranker.tokenize([doc.text for doc in batch]), strict=True):
            if not tokens.add(doc.doc_id, ids):
                raise conflicting_texts(corpus, doc.doc_id)
    if absent := [doc_id for doc_id, number in tokens.numbers.items() if number < 0]:
        raise missing_documents(corpus, len(absent), len(tokens.numbers), min(absent))
    return tokens


def score_blocks(reranker: "Reranker", blocks: PairBlocks, corpus: str, store: ScoreStore, group: ProcessGroup) -> None:
    """Score this process's share of the blocks that are not in the store yet, with a progress bar.

    Args:
        reranker: The reranker.
        blocks: The pairs to score.
        corpus: The collection.
        store: Where scores are kept.
        group: The processes that share the work. All of them must call this function.
    """
    from tqdm import tqdm

    finished = store.finished()
    group.barrier()  # every rank has listed the finished blocks before any rank finishes another one
    mine = [i for i in range(len(blocks)) if i % group.size == group.rank]
    todo = [i for i in mine if i not in finished]
    documents = tokenize_documents(reranker, corpus, blocks.doc_ids(todo), os.path.dirname(store.output) or ".")
    total, left = (sum(blocks.sizes[i] for i in chosen) for chosen in (mine, todo))
    with tqdm(desc="Reranking", total=total, initial=total - left, unit=" pairs", disable=group.rank > 0) as bar:
        for i in todo:
            ids = blocks.query_ids[i]
            texts = [blocks.topics[query_id] for query_id in ids]
            queries = dict(zip(ids, reranker.tokenize_queries(texts), strict=True))
            scores = reranker.score_tokens([(queries[hit.query_id], documents[hit.doc_id]) for hit in blocks[i]])
            store.write(i, scores.tolist())
            bar.update(blocks.sizes[i])
    group.barrier()


def scores_by_query(block: Sequence[ScoredDoc], values: Iterable[float]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield (query id, {doc_id: score}) for the hits of a block and their scores."""
    scored = zip(block, values, strict=True)
    for query_id, group in groupby(scored, key=lambda pair: pair[0].query_id):
        yield query_id, {hit.doc_id: value for hit, value in group}


class ScoredBlock(msgspec.Struct):
    """A block of synthetic queries whose scores are in a log.

    Attributes:
        pairs: Hash of the queries and their documents.
        scores: Their scores.
    """

    pairs: str
    scores: list[float]


def score_queries(
    reranker: "Reranker", queries: Iterator[SyntheticQuery], source: str, log: ResumeLog[ScoredBlock]
) -> Iterator[tuple[SyntheticQuery, float]]:
    """Yield each synthetic query with the score of its source document, with a progress bar over the input's lines.

    Scores are computed in blocks. A block of the log is used again if its queries and documents are the same.

    Args:
        reranker: The reranker.
        queries: The queries to score, in the order of the input.
        source: The input, which also has rows that are not scored.
        log: Log of finished blocks. The caller deletes the log when the output is complete.
    """
    from tqdm import tqdm

    finished = {row.pairs: row.scores for row in log.rows()}
    reused, bar, lines = 0, None, count_lines(source)
    while block := list(islice(queries, BLOCK_QUERIES)):
        pairs = [(query.question, query.doc_text) for query in block]
        fingerprint = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
        if fingerprint in finished:
            scores = finished[fingerprint]
            reused += 1
        else:
            if bar is None:  # the first block that no earlier run has finished
                bar = tqdm(desc="Scoring", total=lines, initial=block[0].line, unit=" rows")
                if reused < len(finished):
                    warn(f"{log.path}: has scores of other rows. Scoring resumes at line {block[0].line + 1:,}.")
            scores = reranker.score(pairs, bar.update).tolist()
            log.write(ScoredBlock(fingerprint, scores))
            bar.update(block[-1].line + 1 - bar.n)  # and the rows between them that are not scored
        yield from zip(block, scores, strict=True)
    if bar is not None:
        bar.update(lines - bar.n)
        bar.close()


def estimate_cost(reranker: "Reranker", blocks: PairBlocks, corpus: str) -> str:
    """Return a line with the tokens of all pairs and the projected time, from the time of three blocks."""
    import time

    queries = dict(zip(blocks.topics, reranker.tokenize_queries(list(blocks.topics.values())), strict=True))
    documents = tokenize_documents(reranker, corpus, blocks.doc_ids(range(len(blocks))), tempfile.gettempdir())

    def pairs_of(block: list[ScoredDoc]) -> list[tuple[Any, Any]]:
        return [(queries[hit.query_id], documents[hit.doc_id]) for hit in block]

    empty = (*reranker.tokenize_queries([""]), *reranker.tokenize([""]))
    added = len(reranker.build_input(*empty)[0]) - sum(map(len, empty))  # special tokens per pair

    def tokens_of(block: list[ScoredDoc]) -> int:
        lengths = (len(queries[hit.query_id]) + documents.length(hit.doc_id) for hit in block)
        return sum(min(reranker.max_length, added + length) for length in lengths)

    reranker.score_tokens(pairs_of(blocks[0][:8]))  # the first call also sets things up
    sample = [blocks[i] for i in sorted({0, len(blocks) // 2, len(blocks) - 1})]
    started = time.monotonic()
    for block in sample:
        reranker.score_tokens(pairs_of(block))
    seconds = time.monotonic() - started
    tokens, pairs = sum(tokens_of(blocks[i]) for i in range(len(blocks))), sum(blocks.sizes)
    hours = seconds * tokens / sum(map(tokens_of, sample)) / 3600
    return (
        f"{len(queries):,} queries, {pairs:,} pairs, {tokens:,} tokens ({tokens / pairs:.0f} per pair); about "
        f"{hours:.2f} hours on one {reranker.model.device.type}, {pairs / hours / 3600:,.1f} pairs/s"
    )
