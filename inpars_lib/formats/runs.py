"""Runs: TREC, six columns; MS MARCO, `query_id<TAB>doc_id<TAB>rank`; ColBERT, the same and the score."""

import array
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import overload

from inpars_lib.cli import InputError
from inpars_lib.files import atomic_write
from inpars_lib.formats.fields import parse_number, split_columns
from inpars_lib.formats.lines import read_blocks, read_records
from inpars_lib.formats.records import ScoredDoc

RUN_SCORE = ".9g"  # of the scores in a run: enough digits for every float32


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
    widths: tuple[int, ...] = 3, 4, 6  # columns that a line may have: as many as the first

    def parse(line: str) -> tuple[str, str, float, int]:
        nonlocal widths
        columns = split_columns(line, widths)
        after_q0 = len(columns) == 6  # TREC's Q0 shifts the other columns by one
        rank = parse_number(columns[2 + after_q0], int)
        score = -float(rank) if len(columns) == 3 else parse_number(columns[3 + after_q0], float)
        widths = (len(columns),)
        return columns[0], columns[1 + after_q0], score, rank

    found: dict[str, tuple[list[str], array.array[float], array.array[int]]] = {}
    interned: dict[str, str] = {}  # one string object per document, however many queries retrieve the document
    form = "TREC's `query_id Q0 doc_id rank score tag`, `query_id doc_id rank score` or `query_id doc_id rank`"
    for _, (query_id, doc_id, score, rank) in read_records(read_blocks([path], desc), parse, form, path):
        if query_ids is None or query_id in query_ids:
            if query_id not in found:
                found[query_id] = [], array.array("d"), array.array("q")
            doc_ids, scores, ranks = found[query_id]
            doc_ids.append(interned.setdefault(doc_id, doc_id))
            scores.append(score)
            ranks.append(rank)
    run: dict[str, Sequence[ScoredDoc]] = {}
    for query_id in list(found):
        doc_ids, scores, ranks = found.pop(query_id)
        if widths == (4,):
            falling = [score for _, score in sorted(zip(ranks, scores, strict=True))] == sorted(scores, reverse=True)
            ambiguous = interned.keys() <= {"0", "Q0"} or (len(scores) > 1 and _could_be_ranks(scores))
            if ambiguous or not (falling and _could_be_ranks(ranks)):
                raise InputError(
                    f"{path}: the four columns of query {query_id} are not clearly `query_id doc_id rank score`. "
                    "Convert the run to TREC format."
                )
        elif all(score == -rank for score, rank in zip(scores, ranks, strict=True)) and (
            min(ranks) < 1 or len(set(ranks)) < len(ranks) or (len(ranks) > 1 and list(ranks) == sorted(ranks)[::-1])
        ):
            # A third column that falls or repeats holds scores, as Tevatron writes them.
            raise InputError(
                f"{path}: the third column of query {query_id} is not a rank. Convert the run to TREC format."
            )
        if len(set(doc_ids)) < len(doc_ids):
            raise InputError(f"{path}: query {query_id} lists a document twice. Keep one line per query and document.")
        order = sorted(range(len(doc_ids)), key=lambda i: (-scores[i], ranks[i]))
        hits: Sequence[ScoredDoc] = RankedList(query_id, [doc_ids[i] for i in order], (scores[i] for i in order))
        if remove_query:
            hits = without_query(query_id, hits)
        if hits:
            run[query_id] = hits
    return run


def _could_be_ranks(values: Sequence[float]) -> bool:
    """Return whether the values are distinct whole numbers from 0 or 1 on."""
    return min(values) in (0, 1) and len(set(values)) == len(values) and all(value % 1 == 0 for value in values)


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
