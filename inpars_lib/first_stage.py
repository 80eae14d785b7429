"""What a first stage is, and the runs of other systems: SPLADE, dense retrieval or anything else instead of BM25."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from inpars_lib.cli import InputError, report
from inpars_lib.files import file_sha256
from inpars_lib.formats.collection import read_collection
from inpars_lib.formats.lines import count_lines, require_file
from inpars_lib.formats.records import ScoredDoc, SyntheticQuery
from inpars_lib.formats.runs import RankedList, Run, read_run

OWN_RANKS = 10  # a document with the text of the query is among the first hits of any first stage
BLOCK = 1024  # synthetic queries that a first stage takes at a time


class FirstStage(Protocol):
    """What retrieves the hits of queries: a BM25 index, or the run of another system."""

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the hits, as JSON values for a resume log."""

    def search(self, queries: Mapping[str, str], k: int, bar: bool = True) -> Iterator[tuple[str, Sequence[ScoredDoc]]]:
        """Yield (query id, first `k` hits, best first) in the order of `queries`.

        Args:
            queries: Query text by id.
            k: Hits per query.
            bar: Show a progress bar.
        """


def add_remove_query_flag(add: Callable[..., Any]) -> None:
    """Add --remove_query with the `add_argument` of a parser or of a group."""
    text = "drop hits whose document id is the query id, for collections whose documents are the queries, as BEIR "
    add("--remove_query", action="store_true", help=text + "does for ArguAna and Quora")


def advise_remove_query(run: Run, topics: Mapping[str, str], corpus: str) -> None:
    """Print advice if a first hit has the id and the text of its query.

    Args:
        run: Hits by query id.
        topics: Query text by query id.
        corpus: The collection. It is read only if some hit has the id of its query.
    """
    own = {query_id for query_id, hits in run.items() for hit in hits[:OWN_RANKS] if hit.doc_id == query_id}
    if not own:
        return
    documents = read_collection(corpus, own)
    same = [doc.doc_id for doc in documents if doc.text.endswith(topics[doc.doc_id])]  # behind a title perhaps
    if same:
        problem = f"for {len(same):,} of {len(run):,} queries a hit has the query's id and text, {same[0]} for example"
        report(f"{corpus}: {problem}. --remove_query drops these hits.")


def search_in_blocks(
    first_stage: FirstStage, queries: Iterable[SyntheticQuery], k: int
) -> Iterator[tuple[SyntheticQuery, Sequence[ScoredDoc]]]:
    """Yield each synthetic query with its first `k` hits. Few queries are in memory at a time."""
    remaining = iter(queries)
    while block := list(islice(remaining, BLOCK)):
        questions = {str(query.line): query.question for query in block}
        found = first_stage.search(questions, k, bar=False)
        for query, (_, hits) in zip(block, found, strict=True):
            yield query, hits


def source_rank(query: SyntheticQuery, hits: Sequence[ScoredDoc]) -> int | None:
    """Return the rank of the source document among the hits, from 1, or None if it is not there."""
    return next((rank for rank, hit in enumerate(hits, 1) if hit.doc_id == query.doc_id), None)


class QueryRun:
    """First-stage run of synthetic queries, searched like an index. Its query ids are lines of their file, from 0.

    Args:
        path: The run.
        source: The file of the queries.

    Raises:
        InputError: The run is of other queries, or is standard input.
    """

    def __init__(self, path: str, source: str) -> None:
        for file in (path, source):
            require_file(file, "synthetic queries and their run are read twice")
        lines = count_lines(source)
        self.path, self.hits = path, read_run(path, desc="Reading the run")
        for query_id in self.hits:
            if not re.fullmatch("0|[1-9][0-9]{,17}", query_id) or int(query_id) >= lines:
                raise InputError(
                    f"{path}: the query id {query_id} is no line of {source}, whose lines count from 0 to {lines - 1}. "
                    "Pass the run of these queries; docs/first-stage.md shows how to make one."
                )
        self.depth = max(map(len, self.hits.values()))  # largest number of hits of a query

    def settings(self) -> dict[str, Any]:
        """Return the hash of the run."""
        return {"run": file_sha256(self.path)}

    def search(self, queries: Mapping[str, str], k: int, bar: bool = True) -> Iterator[tuple[str, RankedList]]:
        """Yield (query id, first `k` hits, best first) in the order of `queries`, whose ids are lines."""
        for query_id in queries:
            hits = self.hits.get(query_id, ())[:k]
            yield query_id, RankedList(query_id, [hit.doc_id for hit in hits], (hit.score for hit in hits))
