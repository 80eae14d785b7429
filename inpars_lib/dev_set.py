"""Dev sets for training: judged topics with a run, or synthetic queries held out from training."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from inpars_lib.bm25 import BM25Config, open_index
from inpars_lib.cli import InputError, warn
from inpars_lib.first_stage import QueryRun
from inpars_lib.formats import (
    missing_documents,
    read_qrels,
    read_run,
    read_synthetic_queries,
    read_texts,
    read_topics,
)
from inpars_lib.records import Qrel, ScoredDoc


class HeldOutQueries(NamedTuple):
    """Held-out queries with their first-stage hits and judgements.

    Attributes:
        topics: Query text by query id.
        run: Hits by query id, best first; only queries that have any.
        qrels: One judgement per query: its source document has grade 1.
    """

    topics: dict[str, str]
    run: dict[str, Sequence[ScoredDoc]]
    qrels: list[Qrel]


def read_held_out_queries(
    path: str, index: str | None, corpus: str | None, config: BM25Config, k: int, run: str | None = None
) -> HeldOutQueries:
    """Read held-out queries and the first `k` hits of each, from a run or from BM25.

    Args:
        path: Synthetic queries from `generate_triples_train.py --holdout`.
        index: Folder of an index, a prebuilt index of Pyserini, or a new path at which `corpus` is indexed.
        corpus: The collection, or None if the index exists.
        config: How to search.
        k: Hits per query.
        run: Run of these queries instead of an index. Its query ids are the lines of `path`, from 0.

    Raises:
        InputError: No query has a hit, or the run is of other queries.
    """
    rows = {f"holdout {row.line}": row for row in read_synthetic_queries(path) if row.question}
    lines = max((row.line for row in rows.values()), default=0) + 1
    searcher = QueryRun(run, path, lines) if run else open_index(index or "", corpus, config)
    topics = {query_id: row.question for query_id, row in rows.items()}  # ids of topics never contain a space
    found: dict[str, Sequence[ScoredDoc]] = {query_id: hits for query_id, hits in searcher.search(topics, k) if hits}
    if run and not any(hit.doc_id == rows[query_id].doc_id for query_id in found for hit in found[query_id]):
        raise InputError(
            f"{run}: no source document of {path} is among the first {k} hits of its query. Pass the run of these "
            "queries, retrieved from their own collection."
        )
    if not found:
        raise InputError(
            f"{path}: none of the {len(topics):,} queries has a hit in {index}. Use the index of the same collection."
        )
    if len(found) < len(topics):
        warn(
            f"{path}: {len(topics) - len(found):,} of {len(topics):,} queries have no hits. Their measures count as 0."
        )
    return HeldOutQueries(topics, found, [Qrel(query_id, row.doc_id, 1) for query_id, row in rows.items()])


class DevSet(NamedTuple):
    """Judged queries, the hits to rerank and the texts of these hits, all in memory.

    Attributes:
        topics: Query text by query id.
        qrels: Judgements of these queries.
        run: Hits by query id, best first.
        texts: Document text by doc_id.
    """

    topics: dict[str, str]
    qrels: list[Qrel]
    run: dict[str, Sequence[ScoredDoc]]
    texts: dict[str, str]


def _texts_of(run: Mapping[str, Sequence[ScoredDoc]], corpus: str) -> dict[str, str]:
    wanted = {hit.doc_id for hits in run.values() for hit in hits}
    texts = read_texts(corpus, wanted, desc="Reading texts")
    if absent := wanted - texts.keys():
        raise missing_documents(corpus, len(absent), len(wanted), min(absent))
    return texts


def read_dev_set(queries: str, qrels: str, run: str, corpus: str, max_queries: int, max_docs: int) -> DevSet:
    """Read judged topics and the hits of a run.

    Args:
        queries: Topics.
        qrels: Judgements.
        run: First-stage run.
        corpus: Collection of the run.
        max_queries: Use the first judged queries only; a negative number for all.
        max_docs: Hits per query.

    Raises:
        InputError: The files do not belong together.
    """
    topics = read_topics(queries)
    judged = list(read_qrels(qrels))
    judged_ids = {qrel.query_id for qrel in judged}
    chosen = [query_id for query_id in topics if query_id in judged_ids]
    if not chosen:
        raise InputError(f"{qrels}: no query of {queries} is judged here. Use topics and qrels of one collection.")
    if max_queries >= 0:
        chosen = chosen[:max_queries]
    topics = {query_id: topics[query_id] for query_id in chosen}
    hits = {query_id: found[:max_docs] for query_id, found in read_run(run, topics).items()}
    if not hits:
        raise InputError(
            f"{run}: no hits for any of the {len(topics):,} judged queries of {queries}. This run belongs to other "
            "topics: pass the run of these topics with --run (for MS MARCO dev, run.bm25.dev.small.tsv)."
        )
    texts = _texts_of(hits, corpus)
    if len(hits) < len(topics):
        missing = len(topics) - len(hits)
        warn(f"{run}: {missing:,} of {len(topics):,} queries have no hits. Their measures count as 0.")
    return DevSet(topics, [qrel for qrel in judged if qrel.query_id in topics], hits, texts)


def read_held_out_dev_set(
    path: str, index: str | None, corpus: str, max_queries: int, max_docs: int, run_path: str | None = None
) -> DevSet:
    """Read held-out queries, their hits in a run or from BM25, and the texts of the hits.

    Args:
        path: Synthetic queries from `generate_triples_train.py --holdout`.
        index: Folder of an index, or a prebuilt index of Pyserini.
        corpus: The collection.
        max_queries: Use the first queries only; a negative number for all.
        max_docs: Hits per query.
        run_path: Run of these queries instead of an index.

    Raises:
        InputError: No query has a hit, or run or index are of another collection.
    """
    topics, run, qrels = read_held_out_queries(path, index, None, BM25Config(), max_docs, run_path)
    if max_queries >= 0:
        topics = dict(islice(topics.items(), max_queries))
    run = {query_id: hits for query_id, hits in run.items() if query_id in topics}
    return DevSet(topics, [qrel for qrel in qrels if qrel.query_id in topics], run, _texts_of(run, corpus))
