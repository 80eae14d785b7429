"""Dev sets for training and interpolation: judged topics with a run, or synthetic queries held out from training."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from inpars_lib.bm25.config import BM25Config
from inpars_lib.bm25.search import open_index
from inpars_lib.cli import InputError, warn
from inpars_lib.first_stage import FirstStage, QueryRun
from inpars_lib.formats.collection import missing_documents, read_texts
from inpars_lib.formats.qrels import read_qrels
from inpars_lib.formats.queries import read_synthetic_queries
from inpars_lib.formats.records import Qrel, ScoredDoc
from inpars_lib.formats.runs import read_run, with_query_id
from inpars_lib.formats.topics import read_topics


class DevSet(NamedTuple):
    """Judged queries and their first-stage hits.

    Attributes:
        topics: Query text by query id.
        run: Hits by query id, best first; only queries that have any.
        qrels: Judgements of these queries. A held-out query has one: its source document has grade 1.
        texts: Document text by doc_id, once `with_texts` has read them.
    """

    topics: Mapping[str, str] = {}
    run: Mapping[str, Sequence[ScoredDoc]] = {}
    qrels: Sequence[Qrel] = ()
    texts: Mapping[str, str] = {}

    def first(self, n: int) -> "DevSet":
        """Return the dev set of the first `n` queries, of all if `n` is negative."""
        ids = set(list(self.topics)[: n if n >= 0 else None])
        topics = {query_id: text for query_id, text in self.topics.items() if query_id in ids}
        run = {query_id: hits for query_id, hits in self.run.items() if query_id in ids}
        return self._replace(topics=topics, run=run, qrels=[qrel for qrel in self.qrels if qrel.query_id in ids])

    def with_texts(self, corpus: str) -> "DevSet":
        """Return the dev set with the texts of all hits.

        Raises:
            InputError: A document is not in the collection.
        """
        wanted = {hit.doc_id for hits in self.run.values() for hit in hits}
        texts = read_texts(corpus, wanted, desc="Reading texts")
        if absent := wanted - texts.keys():
            raise missing_documents(corpus, len(absent), len(wanted), min(absent))
        return self._replace(texts=texts)


def _warn_of_missing_hits(source: str, found: int, total: int) -> None:
    if found < total:
        warn(f"{source}: {total - found:,} of {total:,} queries have no hits. Their measures count as 0.")


def read_held_out_queries(
    path: str, index: str | None, corpus: str | None, config: BM25Config, k: int, run: str | None = None
) -> DevSet:
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
    rows = {str(row.line): row for row in read_synthetic_queries(path) if row.question}
    questions = {line: row.question for line, row in rows.items()}
    searcher: FirstStage = QueryRun(run, path) if run else open_index(index or "", corpus, config)
    found = {line: hits for line, hits in searcher.search(questions, k) if hits}
    if run and not any(hit.doc_id == rows[line].doc_id for line in found for hit in found[line]):
        raise InputError(
            f"{run}: no source document of {path} is among the first {k} hits of its query. Pass the run of these "
            "queries, retrieved from their own collection."
        )
    if not found:
        raise InputError(
            f"{path}: none of the {len(rows):,} queries has a hit in {index}. Use the index of the same collection."
        )
    _warn_of_missing_hits(path, len(found), len(rows))
    ids = {line: f"holdout {line}" for line in rows}  # ids of topics never contain a space
    return DevSet(
        topics={ids[line]: question for line, question in questions.items()},
        run={ids[line]: with_query_id(ids[line], hits) for line, hits in found.items()},
        qrels=[Qrel(ids[line], row.doc_id, 1) for line, row in rows.items()],
    )


def read_judged_queries(
    queries: str, qrels: str, run: str, max_queries: int, k: int, remove_query: bool = False
) -> DevSet:
    """Read judged topics and the first `k` hits of each.

    Args:
        queries: Topics.
        qrels: Judgements.
        run: First-stage run.
        max_queries: Use the first judged queries only; a negative number for all.
        k: Hits per query.
        remove_query: Drop hits whose document id is the query id.

    Raises:
        InputError: The files do not belong together.
    """
    judged = list(read_qrels(qrels))
    judged_ids = {qrel.query_id for qrel in judged}
    topics = {query_id: text for query_id, text in read_topics(queries).items() if query_id in judged_ids}
    if not topics:
        raise InputError(f"{qrels}: no query of {queries} is judged here. Use topics and qrels of one collection.")
    dev = DevSet(topics, {}, judged).first(max_queries)
    found = read_run(run, dev.topics, remove_query=remove_query)
    hits = {query_id: of_query[:k] for query_id, of_query in found.items()}
    if not hits:
        raise InputError(
            f"{run}: no hits for any of the {len(dev.topics):,} judged queries of {queries}. This run belongs to other "
            "topics: pass the run of these topics with --run (for MS MARCO dev, run.bm25.dev.small.tsv)."
        )
    _warn_of_missing_hits(run, len(hits), len(dev.topics))
    return dev._replace(run=hits)
