"""Scoring of many pairs: blocks of whole queries, scores in a log to resume from."""

import array
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from inpars_lib.cli import InputError, counted, duration, warn
from inpars_lib.formats.collection import conflicting_texts, missing_documents, read_collection
from inpars_lib.formats.folders import collection_files
from inpars_lib.formats.lines import count_lines
from inpars_lib.formats.records import ScoredDoc, SyntheticQuery
from inpars_lib.formats.runs import Run
from inpars_lib.processes import ProcessGroup
from inpars_lib.resume import ResumeLog

if TYPE_CHECKING:
    import numpy
    from tqdm import tqdm

    from inpars_lib.rerankers.base import Reranker

BLOCK_PAIRS = 256  # pairs scored at a time, of whole queries: enough to batch pairs of similar length
TOKENIZER_BATCH = 1024  # documents tokenized at a time


@dataclass(frozen=True)
class PairBlock:
    """Whole queries with their hits, whose pairs are scored together.

    Attributes:
        topics: Query text by query id.
        run: Hits to score by query id, best first.
    """

    topics: dict[str, str]
    run: dict[str, Sequence[ScoredDoc]]

    def hits(self) -> list[ScoredDoc]:
        """Return the hits of all queries."""
        return [hit for hits in self.run.values() for hit in hits]

    def size(self) -> int:
        """Return the number of pairs."""
        return sum(map(len, self.run.values()))

    def fingerprint(self) -> str:
        """Return a hash of the queries and of the documents to score."""
        digest = hashlib.sha256()
        for query_id, hits in self.run.items():
            ids = " ".join(hit.doc_id for hit in hits)
            digest.update(f"{self.topics[query_id]}\t{query_id}\t{ids}\n".encode(errors="replace"))
        return digest.hexdigest()


def make_blocks(topics: Mapping[str, str], run: Run, top_k: int) -> list[PairBlock]:
    """Return the pairs to score in blocks of at least BLOCK_PAIRS pairs, except for the last.

    Blocks do not depend on the number of processes or on where a run was killed. So neither do batches and scores.

    Args:
        topics: Query text by query id.
        run: Hits by query id, best first.
        top_k: Hits per query to score.
    """
    blocks: list[PairBlock] = []
    for query_id, hits in run.items():
        if not blocks or blocks[-1].size() >= BLOCK_PAIRS:
            blocks.append(PairBlock({}, {}))
        blocks[-1].topics[query_id] = topics[query_id]
        blocks[-1].run[query_id] = hits[:top_k]
    return blocks


def files_fingerprint(model: str, corpus: str | None = None) -> str:
    """Return a hash of the names, sizes and modification times of a model's and a collection's files."""
    listed = collection_files(corpus) if corpus and not corpus.startswith("ir_datasets:") else []
    files = [Path(path) for path in listed]
    if os.path.isdir(model):
        files += sorted(path for path in Path(model).iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


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


class ScoredBlock(msgspec.Struct):
    """A block of pairs whose scores are in a log.

    Attributes:
        pairs: Hash of the queries and their documents.
        scores: Their scores.
    """

    pairs: str
    scores: list[float]


class SavedScores:
    """Scores of finished blocks by the hash of their pairs, from a log.

    Args:
        log: Log of finished blocks, of all ranks.
    """

    def __init__(self, log: ResumeLog[ScoredBlock]) -> None:
        self._path = log.path
        self._scores = {row.pairs: array.array("f", row.scores) for row in log.rows()}

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, pairs: str, size: int) -> "array.array[float] | None":
        """Return the scores of a block of `size` pairs, None if the block is not finished.

        Raises:
            InputError: The block has another number of scores.
        """
        scores = self._scores.get(pairs)
        if scores is not None and len(scores) != size:
            raise InputError(
                f"{self._path}: damaged, a block of {size} pairs has {len(scores)} scores. Add --restart to throw the "
                "earlier work away."
            )
        return scores


def scores_by_query(run: Run, scores: Iterable[float]) -> "dict[str, array.array[float]]":
    """Return the scores of each query's hits, float32, from the scores of all hits of a run."""
    remaining = iter(scores)
    return {query_id: array.array("f", islice(remaining, len(hits))) for query_id, hits in run.items()}


def score_blocks(
    reranker: "Reranker", blocks: Sequence[PairBlock], corpus: str, log: ResumeLog[ScoredBlock], group: ProcessGroup
) -> None:
    """Score this process's share of the blocks that are not in the log yet, with a progress bar.

    Args:
        reranker: The reranker.
        blocks: The pairs to score.
        corpus: The collection.
        log: Log of finished blocks.
        group: The processes that share the work. All of them must call this function.
    """
    from tqdm import tqdm

    saved = SavedScores(log)
    group.barrier()  # every rank has read the log before any rank adds a block
    mine = blocks[group.rank :: group.size]
    todo = [block for block in mine if saved.get(block.fingerprint(), block.size()) is None]
    folder = os.path.dirname(log.path or "") or "."
    documents = tokenize_documents(reranker, corpus, _doc_ids(todo), folder)
    total = sum(block.size() for block in mine)
    left = sum(block.size() for block in todo)
    with tqdm(desc="Reranking", total=total, initial=total - left, unit=" pairs", disable=group.rank > 0) as bar:
        for block in todo:
            queries = dict(zip(block.topics, reranker.tokenize_queries(list(block.topics.values())), strict=True))
            scores = reranker.score_tokens([(queries[hit.query_id], documents[hit.doc_id]) for hit in block.hits()])
            log.write(ScoredBlock(block.fingerprint(), scores.tolist()))
            bar.update(block.size())
    group.barrier()


def read_scores(blocks: Sequence[PairBlock], log: ResumeLog[ScoredBlock]) -> "dict[str, array.array[float]]":
    """Return the scores of each query's hits, in the order of the hits.

    Raises:
        InputError: Some blocks are not finished, because a process failed.
    """
    saved = SavedScores(log)
    scores: dict[str, array.array[float]] = {}
    missing = 0
    for block in blocks:
        found = saved.get(block.fingerprint(), block.size())
        if found is None:
            missing += 1
        else:
            scores |= scores_by_query(block.run, found)
    if missing:
        raise InputError(f"{log.path}: {missing:,} of {len(blocks):,} blocks are missing. Run the same command again.")
    return scores


def _doc_ids(blocks: Iterable[PairBlock]) -> Iterator[str]:
    return (hit.doc_id for block in blocks for hit in block.hits())


class QueryScorer:
    """Scores of synthetic queries for their source documents, in blocks, with a log and a progress bar.

    Args:
        reranker: The reranker.
        source: The file of the queries, which also has rows that are not scored. The bar counts its lines.
        log: Log of finished blocks. The caller deletes the log when the output is complete.
    """

    def __init__(self, reranker: "Reranker", source: str, log: ResumeLog[ScoredBlock]) -> None:
        self.reranker, self.log, self.lines = reranker, log, count_lines(source)
        self._saved = SavedScores(log)
        self._reused = 0
        self._bar: tqdm[NoReturn] | None = None

    def score(self, queries: Sequence[SyntheticQuery]) -> Sequence[float]:
        """Return the score of each query of a block, from the log if the block's queries and documents are there."""
        if not queries:
            return []
        pairs = [(query.question, query.doc_text) for query in queries]
        fingerprint = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
        saved = self._saved.get(fingerprint, len(pairs))
        if saved is not None:
            self._reused += 1
            return saved
        if self._bar is None:
            self._bar = self._start_bar(queries[0].line)
        scores = array.array("f", self.reranker.score(pairs, self._bar.update))
        self.log.write(ScoredBlock(fingerprint, scores.tolist()))
        self._bar.update(queries[-1].line + 1 - self._bar.n)  # and the rows between them that are not scored
        return scores

    def _start_bar(self, line: int) -> "tqdm[NoReturn]":
        """Return a bar that starts at the first line that no earlier run has scored."""
        from tqdm import tqdm

        if self._reused < len(self._saved):
            warn(f"{self.log.path}: has scores of other rows. Scoring resumes at line {line + 1:,}.")
        return tqdm(desc="Scoring", total=self.lines, initial=line, unit=" rows")

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.update(self.lines - self._bar.n)
            self._bar.close()


def estimate_cost(reranker: "Reranker", blocks: Sequence[PairBlock], corpus: str) -> str:
    """Return a line with the tokens of all pairs and the projected time, from the time of three blocks."""
    import time

    topics = {query_id: text for block in blocks for query_id, text in block.topics.items()}
    queries = dict(zip(topics, reranker.tokenize_queries(list(topics.values())), strict=True))
    documents = tokenize_documents(reranker, corpus, _doc_ids(blocks), tempfile.gettempdir())
    added = reranker.added_tokens()

    def pairs_of(block: PairBlock) -> list[tuple[Any, Any]]:
        return [(queries[hit.query_id], documents[hit.doc_id]) for hit in block.hits()]

    def tokens_of(block: PairBlock) -> int:
        lengths = (len(queries[hit.query_id]) + documents.length(hit.doc_id) for hit in block.hits())
        return sum(min(reranker.max_length, added + length) for length in lengths)

    reranker.score_tokens(pairs_of(blocks[0])[:8])  # the first call also sets things up
    sample = [blocks[i] for i in sorted({0, len(blocks) // 2, len(blocks) - 1})]
    started = time.monotonic()
    for block in sample:
        reranker.score_tokens(pairs_of(block))
    seconds = time.monotonic() - started
    tokens, pairs = sum(map(tokens_of, blocks)), sum(block.size() for block in blocks)
    projected = seconds * tokens / sum(map(tokens_of, sample))
    return (
        f"{counted(len(queries), 'query')}, {counted(pairs, 'pair')}, {tokens:,} tokens ({tokens / pairs:.0f} per "
        f"pair); about {duration(projected)} on one {reranker.model.device.type}, {pairs / projected:,.1f} pairs/s"
    )
