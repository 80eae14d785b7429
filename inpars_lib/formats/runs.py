"""Runs: TREC, six columns; MS MARCO, `query_id<TAB>doc_id<TAB>rank`; ColBERT, the same and the score."""

import array
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import isfinite
from typing import NamedTuple, overload

from inpars_lib.cli import InputError
from inpars_lib.files import atomic_write
from inpars_lib.formats.fields import QUERY_ID, is_header, parse_number, split_columns
from inpars_lib.formats.lines import Block, Form, LineError, read_blocks, read_records
from inpars_lib.formats.records import ScoredDoc
from inpars_lib.formats.roles import check_role

FORM = "TREC's `query_id Q0 doc_id rank score tag`, `query_id doc_id rank score` or `query_id doc_id rank`"
REFUSED = ("qrels", "topics", "texts", "queries")
WIDTHS = 3, 4, 6  # columns of MS MARCO, ColBERT and TREC
LARGEST_RANK = 10**9
RUN_SCORE = ".9g"  # of the scores in a run: enough digits for every float32
TO_TREC = "Convert the run to TREC format."


class _Hit(NamedTuple):
    query_id: str
    doc_id: str
    rank: float
    score: float
    width: int  # columns of the line


class _Hits:
    """The hits of one query in the order of the file. Takes 24 bytes a hit beside the ids."""

    def __init__(self) -> None:
        self.doc_ids: list[str] = []
        self.ranks, self.scores = array.array("d"), array.array("d")

    def is_ranked(self) -> bool:
        """Return whether the ranks are distinct and start at 0 or 1."""
        return min(self.ranks) in (0, 1) and len(set(self.ranks)) == len(self.ranks)

    def scores_fall(self) -> bool:
        """Return whether no hit has a higher score than a hit of a better rank."""
        by_rank = [score for _, score in sorted(zip(self.ranks, self.scores, strict=True))]
        return by_rank == sorted(self.scores, reverse=True)

    def best_first(self, query_id: str) -> "RankedList":
        """Return the hits by descending score, ties by rank, then by the order of the file."""
        order = sorted(range(len(self.doc_ids)), key=lambda i: (-self.scores[i], self.ranks[i]))
        return RankedList(query_id, [self.doc_ids[i] for i in order], (self.scores[i] for i in order))


def _number(word: str, name: str) -> float:
    """Return a score or a rank. To skip the line of an odd number would change the measures."""
    try:
        return parse_number(word, float)
    except ValueError as error:
        raise LineError(f"the {name} {error}. {TO_TREC.rstrip('.')}") from None


def _rank(word: str) -> float:
    rank = _number(word, "rank")
    if not rank.is_integer() or abs(rank) > LARGEST_RANK:
        raise LineError(f"{word!r} is not a rank. {TO_TREC.rstrip('.')}")
    return rank


def _parse(line: str, width: int) -> _Hit:
    """Return a hit. TREC's rank only breaks ties, so it may be anything: trec_eval ignores it."""
    columns = line.split()
    if len(columns) != width:
        columns = split_columns(line, (width,))
    if width == 6:
        try:
            rank = float(columns[3])
        except ValueError:
            rank = 0.0
        score = _number(columns[4], "score")
        return _Hit(columns[0], columns[2], rank if isfinite(rank) else 0.0, score, width)
    rank = _rank(columns[2])
    return _Hit(columns[0], columns[1], rank, -rank if width == 3 else _number(columns[3], "score"), width)


def _width(lines: Iterable[str]) -> int:
    """Return the number of columns of the first line that can be of a run."""
    return next((len(line.split()) for line in lines if len(line.split()) in WIDTHS and line[0] != "#"), WIDTHS[-1])


def _judge(block: Block) -> Form[_Hit]:
    """Return how to read a run, whose lines have as many columns as the first one."""
    lines = block.head()
    check_role(block.path, lines, REFUSED)
    header = bool(lines) and is_header(lines[0].split(), QUERY_ID)
    return Form(partial(_parse, width=_width(lines[header:])), int(header))


def _check_third_column(path: str, width: int, query_id: str, hits: _Hits) -> None:
    """Check that the third column of three or four is the rank."""
    if width == 4 and not (hits.is_ranked() and hits.scores_fall()):
        four = "are not clearly `query_id doc_id rank score`"
        raise InputError(f"{path}: the four columns of query {query_id} {four}. {TO_TREC}")
    falls = len(hits.ranks) > 1 and list(hits.ranks) == sorted(hits.ranks, reverse=True)
    if width == 3 and (min(hits.ranks) < 1 or len(set(hits.ranks)) < len(hits.ranks) or falls):
        # Tevatron writes scores there, which fall or repeat.
        raise InputError(f"{path}: the third column of query {query_id} is not a rank. {TO_TREC}")


def read_run(
    path: str, query_ids: Collection[str] | None = None, desc: str | None = None, remove_query: bool = False
) -> dict[str, Sequence[ScoredDoc]]:
    """Return the hits of a run by query, best first: by score, ties by the rank in the file.

    The number of columns tells TREC's, ColBERT's and MS MARCO's formats apart. MS MARCO's has no scores: minus the
    rank replaces them.

    Args:
        path: The run.
        query_ids: Queries to keep, or None for all.
        desc: Label of a progress bar, or None for no bar.
        remove_query: Drop hits whose document id is the query id.

    Raises:
        InputError: No line is usable, a query lists a document twice, or the meaning of a column is ambiguous.
    """
    found: dict[str, _Hits] = {}
    interned: dict[str, str] = {}  # one string object per document, however many queries retrieve the document
    width = WIDTHS[-1]
    for _, hit in read_records(read_blocks([path], desc), _judge, FORM, path):
        query_id, doc_id, rank, score, width = hit
        if query_ids is None or query_id in query_ids:
            hits = found.get(query_id)
            if hits is None:
                hits = found[query_id] = _Hits()
            hits.doc_ids.append(interned.setdefault(doc_id, doc_id))
            hits.ranks.append(rank)
            hits.scores.append(score)
    run: dict[str, Sequence[ScoredDoc]] = {}
    for query_id in list(found):
        hits = found.pop(query_id)
        _check_third_column(path, width, query_id, hits)
        if len(set(hits.doc_ids)) < len(hits.doc_ids):
            raise InputError(f"{path}: query {query_id} lists a document twice. Keep one line per query and document.")
        ranked: Sequence[ScoredDoc] = hits.best_first(query_id)
        if remove_query:
            ranked = without_query(query_id, ranked)
        if ranked:
            run[query_id] = ranked
    return run


def run_lines(hits: Iterable[ScoredDoc], tag: str) -> Iterator[str]:
    """Yield the lines of a TREC run. The hits of a query must come best first; ranks start at 1."""
    ranks: dict[str, int] = {}
    for query_id, doc_id, score in hits:
        ranks[query_id] = ranks.get(query_id, 0) + 1
        yield f"{query_id} Q0 {doc_id} {ranks[query_id]} {score:{RUN_SCORE}} {tag}\n"


def write_run(path: str, hits: Iterable[ScoredDoc], tag: str) -> None:
    """Write a TREC run. The hits of a query must come best first."""
    with atomic_write(path) as file:
        file.writelines(run_lines(hits, tag))


class RankedList(Sequence[ScoredDoc]):
    """The hits of one query, best first. Takes 16 bytes a hit beside the ids, where named tuples would take 200."""

    def __init__(self, query_id: str, doc_ids: list[str], scores: Iterable[float]) -> None:
        self.query_id, self.doc_ids, self.scores = query_id, doc_ids, array.array("d", scores)

    def __len__(self) -> int:
        return len(self.doc_ids)

    @overload
    def __getitem__(self, at: int) -> ScoredDoc: ...
    @overload
    def __getitem__(self, at: slice) -> "RankedList": ...
    def __getitem__(self, at: int | slice) -> "ScoredDoc | RankedList":
        if isinstance(at, slice):
            return RankedList(self.query_id, self.doc_ids[at], self.scores[at])
        return ScoredDoc(self.query_id, self.doc_ids[at], self.scores[at])

    def __iter__(self) -> Iterator[ScoredDoc]:
        return (ScoredDoc(self.query_id, *hit) for hit in zip(self.doc_ids, self.scores, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


Run = Mapping[str, Sequence[ScoredDoc]]


def without_query(query_id: str, hits: Sequence[ScoredDoc]) -> Sequence[ScoredDoc]:
    """Return the hits of a query without the document that has the query's id.

    In ArguAna, for example, the queries are documents of the collection, and BEIR's evaluation drops these hits.
    """
    return with_query_id(query_id, [hit for hit in hits if hit.doc_id != query_id])


def with_query_id(query_id: str, hits: Sequence[ScoredDoc]) -> RankedList:
    """Return the hits under another query id."""
    return RankedList(query_id, [hit.doc_id for hit in hits], (hit.score for hit in hits))


def trec_order(hit: ScoredDoc) -> tuple[float, str]:
    """Return trec_eval's sort key of a hit, for descending order: the score, then the doc_id."""
    return hit.score, hit.doc_id


def rerank_hits(hits: Sequence[ScoredDoc], scores: Sequence[float]) -> RankedList:
    """Return the hits of a query in the order of their new scores, hits without one below in their old order.

    Scores are rounded to the digits that a run holds, and ties are broken by descending doc_id as in trec_eval, so that
    every reader of the run sees the same order.

    Args:
        hits: First-stage hits, best first.
        scores: New scores of the first hits, at least one.
    """
    first, rest = hits[: len(scores)], hits[len(scores) :]
    rounded = (float(format(score, RUN_SCORE)) for score in scores)
    reranked = [hit._replace(score=score) for hit, score in zip(first, rounded, strict=True)]
    reranked.sort(key=trec_order, reverse=True)
    lowest = reranked[-1].score
    below = [hit._replace(score=lowest - i) for i, hit in enumerate(rest, 1)]
    return with_query_id(first[0].query_id, reranked + below)


def read_anserini_run(run: str, index: str) -> dict[str, tuple[list[str], list[float]]]:
    """Return ids and scores by query of a run that Anserini wrote of an index.

    Faster than `read_run`, which checks every field.

    Raises:
        InputError: The run is missing or torn, for Anserini hides errors of writing, or an id has a space.
    """
    found: dict[str, tuple[list[str], list[float]]] = {}
    line = "\n"
    with suppress(FileNotFoundError), open(run, encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                break
            number, _, doc_id, *_, score, _ = line.split(" ")
            if line.count(" ") != 5:
                problem = f"a document id has a space ({doc_id} ...), which no run can hold"
                raise InputError(f"{index}: {problem}. Index the collection with other ids.")
            if number not in found:
                found[number] = [], []
            found[number][0].append(doc_id)
            found[number][1].append(float(score))
    if not line.endswith("\n") or not os.path.exists(run):
        raise InputError(f"{run}: Lucene could not write its hits. Check the free disk space.")
    return found
