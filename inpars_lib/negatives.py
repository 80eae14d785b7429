"""Hard negatives: sample documents from the BM25 hits of each synthetic query, with a log to resume from."""

import hashlib
import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import isclose
from typing import TYPE_CHECKING, Any, NamedTuple

from inpars_lib.bm25 import QUERIES_PER_THREAD, BM25Config, index_fingerprint, open_index
from inpars_lib.lucene import quiet_lucene
from inpars_lib.records import SyntheticQuery
from inpars_lib.storage import ResumeLog

if TYPE_CHECKING:
    from pyserini.search.lucene import LuceneSearcher

SPARE_SAMPLES = 50  # hits with the source document's score that are passed over before they are used
SOURCE_DEPTH = 10  # the source document's rank is recorded down to this depth, for MRR@10


class SampledHits(NamedTuple):
    """What was sampled from the hits of one synthetic query.

    Attributes:
        doc_ids: The negatives.
        source_rank: Rank of the source document among the first 10 hits, from 1; None below.
        source_found: Whether the source document is among all hits.
    """

    doc_ids: list[str]
    source_rank: int | None
    source_found: bool


@dataclass(frozen=True)
class NegativesConfig:
    """How to sample negatives.

    Attributes:
        index: Folder of an index, a prebuilt index of Pyserini, or a new path.
        corpus: The collection, indexed first if `index` is a new path.
        max_hits: BM25 hits per query to sample from.
        n_samples: Negatives per query.
        seed: Seed of the sampling.
        bm25: How to search.
    """

    index: str
    corpus: str
    max_hits: int = 1000
    n_samples: int = 1
    seed: int = 1
    bm25: BM25Config = field(default_factory=BM25Config)


def sample_negatives(
    queries: Sequence[SyntheticQuery], config: NegativesConfig, log_path: str, resume: bool = True
) -> list[SampledHits]:
    """Sample negatives for each query from its BM25 hits.

    The sample depends on the seed and on the query's line only, not on the number of threads or on a kill.

    Args:
        queries: Synthetic queries.
        config: How to sample.
        log_path: Log of finished queries. The caller deletes the log when the output is complete.
        resume: Take over the finished queries of a log with the same settings.
    """
    from tqdm import tqdm

    searcher = open_index(config.index, config.corpus, config.bm25)
    fingerprint = hashlib.sha256(index_fingerprint(config.index).encode())
    for query in queries:
        fingerprint.update(f"{query.line}\t{query.doc_id}\t{query.question}\n".encode(errors="replace"))
    settings = {name: getattr(config, name) for name in ("index", "max_hits", "n_samples", "seed")}
    settings |= {name: getattr(config.bm25, name) for name in ("k1", "b", "language")}
    log = ResumeLog(log_path, {**settings, "queries": fingerprint.hexdigest()})
    if not resume and os.path.exists(log_path):
        os.remove(log_path)
    sampled = {row.pop("line"): SampledHits(**row) for row in log.rows() if "line" in row}
    log.open()
    if rest := [query for query in queries if query.line not in sampled]:

        def random_ranks(number: int, hits: int) -> Iterator[int]:
            generator, left = random.Random(f"{config.seed} {rest[number].line}"), list(range(hits))
            while left:
                yield left.pop(generator.randrange(len(left)))

        pairs = [(query.question, query.doc_id) for query in rest]
        found = sample_hits(searcher, pairs, config.max_hits, config.n_samples, random_ranks, config.bm25.threads)
        bar = tqdm(found, desc="BM25", total=len(queries), initial=len(sampled), unit=" queries")
        for query, hits in zip(rest, bar, strict=True):
            sampled[query.line] = hits
            log.write({"line": query.line, **hits._asdict()})
    log.close()
    return [sampled[query.line] for query in queries]


def sample_hits(
    searcher: "LuceneSearcher",
    queries: Iterable[tuple[str, str]],
    k: int,
    n: int,
    random_ranks: Callable[[int, int], Iterable[int]],
    threads: int,
) -> Iterator[SampledHits]:
    """Sample `n` of the first `k` hits of each query, without the source document.

    Hits with the source document's score, duplicates of its text for example, are used only if there are no others.
    The hits stay in Java. Only sampled hits cross to Python, because crossing is what takes the time.

    Args:
        searcher: An open index.
        queries: Pairs of query text and source document id.
        k: Hits per query to sample from.
        n: Documents to sample per query.
        random_ranks: Function of a query's number and its number of hits. Yields ranks, from 0, in sampling order.
        threads: Threads of the search.

    Yields:
        The sampled hits in the order of `queries`.
    """
    from jnius import autoclass, cast

    lucene = "org.apache.lucene.search."
    with quiet_lucene():
        top_docs, occur = autoclass(f"{lucene}TopDocs"), autoclass(f"{lucene}BooleanClause$Occur")
        builder, term_query = autoclass(f"{lucene}BooleanQuery$Builder"), autoclass(f"{lucene}TermQuery")
        term = autoclass("org.apache.lucene.index.Term")
        generator = autoclass("io.anserini.search.query.BagOfWordsQueryGenerator")()
        anserini = searcher.object
        analyzer, order = anserini.get_analyzer(), anserini.BREAK_SCORE_TIES_BY_DOCID  # as in `bm25.search`
        index = autoclass(f"{lucene}IndexSearcher")(anserini.reader)
        index.setSimilarity(anserini.get_similarity())

        # Python's own threads crash pyjnius, which keeps the object of a call in the method. So calls of
        # IndexSearcher.search become Java Callables, with the query as their only argument, for a Java thread pool.
        named, integer = autoclass("java.lang.Class").forName, autoclass("java.lang.Integer")
        boolean, handles = autoclass("java.lang.Boolean"), autoclass("java.lang.invoke.MethodHandles")
        parameters = [named(f"{lucene}Query"), integer.TYPE, named(f"{lucene}Sort"), boolean.TYPE]
        method_type = autoclass("java.lang.invoke.MethodType").methodType
        signature = method_type(named(f"{lucene}TopFieldDocs"), parameters)
        handle = handles.publicLookup().findVirtual(named(f"{lucene}IndexSearcher"), "search", signature).bindTo(index)
        handle = handles.insertArguments(handle, 1, integer(k), order, boolean(True))
        proxies, interface = autoclass("java.lang.invoke.MethodHandleProxies"), "java.util.concurrent.Callable"
        callable_class = named(interface)
        pool = autoclass("java.util.concurrent.Executors").newFixedThreadPool(threads)

    def submit(number: int, text: str, source: str) -> tuple[int, Any, str, Any]:
        query = generator.buildQuery("contents", analyzer, text)
        call = proxies.asInterfaceInstance(callable_class, handles.insertArguments(handle, 0, query))
        return number, query, source, pool.submit(cast(interface, call))

    def sample_one(number: int, query: Any, source: str, future: Any) -> SampledHits:
        hits = future.get()
        count = min(k, hits.totalHits.value)
        if not count:
            return SampledHits([], None, False)
        fields = anserini.reader.storedFields()

        def ranked(start: int, size: int) -> list[Any]:
            return top_docs.merge(order, start, size, [hits]).scoreDocs

        source_query = builder()
        source_query.add(query, occur.MUST)
        source_query.add(term_query(term("id", source)), occur.FILTER)
        matched = index.search(source_query.build(), 1).scoreDocs
        source_score = matched[0].score if matched else -1.0
        others: list[Any] = []
        ties: list[Any] = []
        for rank in islice(random_ranks(number, count), n + SPARE_SAMPLES):
            [hit] = ranked(rank, 1)
            if not isclose(hit.score, source_score, rel_tol=1e-6):
                others.append(hit)
            elif hit.doc != matched[0].doc:
                ties.append(hit)
            if len(others) == n:
                break
        doc_ids = [fields.document(hit.doc).get("id") for hit in [*others, *ties][:n]]
        first = [hit.doc for hit in ranked(0, SOURCE_DEPTH)] if matched else []
        if matched and matched[0].doc in first:
            return SampledHits(doc_ids, first.index(matched[0].doc) + 1, True)
        if not matched or count < k:
            return SampledHits(doc_ids, None, bool(matched))
        last = ranked(count - 1, 1)[0]
        tied = source_score == last.score and source <= fields.document(last.doc).get("id")
        return SampledHits(doc_ids, None, source_score > last.score or tied)

    numbered = enumerate(queries)
    submitted: deque[tuple[int, Any, str, Any]] = deque()
    try:
        while True:
            with quiet_lucene():
                for number, query in islice(numbered, 2 * QUERIES_PER_THREAD - len(submitted)):
                    submitted.append(submit(number, *query))
                sampled = [sample_one(*submitted.popleft()) for _ in range(min(QUERIES_PER_THREAD, len(submitted)))]
            if not sampled:
                return
            yield from sampled
    finally:
        pool.shutdown()
