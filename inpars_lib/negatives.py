"""Hard negatives: sample documents from the first-stage hits of each synthetic query, with a log to resume from."""

import hashlib
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from inpars_lib.bm25 import BM25Config, index_fingerprint, open_index
from inpars_lib.first_stage import QueryRun
from inpars_lib.records import ScoredDoc, SyntheticQuery
from inpars_lib.storage import ResumeLog, file_sha256

TIE = 1e-4  # Anserini rounds scores to this, and takes some millionths from the later ones of equal scores
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
        max_hits: Hits per query, and so the last rank to sample from.
        n_samples: Negatives per query.
        seed: Seed of the sampling.
        bm25: How to search.
        min_rank: First rank to sample from.
        run: Run of the queries to sample from, or None to search `index`.
    """

    index: str
    corpus: str
    max_hits: int = 1000
    n_samples: int = 1
    seed: int = 1
    bm25: BM25Config = field(default_factory=BM25Config)
    min_rank: int = 1
    run: QueryRun | None = None


def sample_negatives(
    queries: Sequence[SyntheticQuery], config: NegativesConfig, log_path: str, resume: bool = True
) -> list[SampledHits]:
    """Sample negatives for each query from its first-stage hits.

    The sample depends on the seed and on the query's line only, not on the number of threads or on a kill.

    Args:
        queries: Synthetic queries.
        config: How to sample.
        log_path: Log of finished queries. The caller deletes the log when the output is complete.
        resume: Take over the finished queries of a log with the same settings.
    """
    from tqdm import tqdm

    searcher = config.run or open_index(config.index, config.corpus, config.bm25)
    fingerprint = hashlib.sha256(index_fingerprint(config.index).encode())
    for query in queries:
        fingerprint.update(f"{query.line}\t{query.doc_id}\t{query.question}\n".encode(errors="replace"))
    settings = {name: getattr(config, name) for name in ("index", "max_hits", "min_rank", "n_samples", "seed")}
    settings |= {name: getattr(config.bm25, name) for name in ("k1", "b", "language")}
    settings["run"] = file_sha256(config.run.path) if config.run else None
    log = ResumeLog(log_path, {**settings, "queries": fingerprint.hexdigest()})
    if not resume and os.path.exists(log_path):
        os.remove(log_path)
    sampled = {row.pop("line"): SampledHits(**row) for row in log.open()}
    rest = {str(query.line): query for query in queries if query.line not in sampled}
    questions = {number: query.question for number, query in rest.items()}
    found = searcher.search(questions, config.max_hits, bar=False)
    for number, hits in tqdm(
        found, desc="Hits" if config.run else "BM25", total=len(queries), initial=len(sampled), unit=" queries"
    ):
        query = rest[number]
        seed = f"{config.seed} {query.line}"
        sampled[query.line] = sample_hits(hits, query.doc_id, config.n_samples, seed, config.min_rank)
        log.write({"line": query.line, **sampled[query.line]._asdict()})
    log.close()
    return [sampled[query.line] for query in queries]


def sample_hits(hits: Sequence[ScoredDoc], source: str, n: int, seed: str, min_rank: int = 1) -> SampledHits:
    """Sample `n` hits of a query, without the source document.

    Hits with the source document's score, duplicates of its text for example, are used only if there are no others.

    Args:
        hits: Hits of the query, best first.
        source: Id of the source document.
        n: Documents to sample.
        seed: Seed of the sample.
        min_rank: First rank to sample from. The source document has a rank too.
    """
    rank = next((rank for rank, hit in enumerate(hits) if hit.doc_id == source), None)
    source_score = math.inf if rank is None else hits[rank].score
    generator, left = random.Random(seed), list(range(min_rank - 1, len(hits)))
    fewest = len(left) - n - SPARE_SAMPLES
    others: list[str] = []
    ties: list[str] = []
    while left and len(others) < n and len(left) > fewest:
        hit = hits[left.pop(generator.randrange(len(left)))]
        if abs(hit.score - source_score) > TIE:
            others.append(hit.doc_id)
        elif hit.doc_id != source:
            ties.append(hit.doc_id)
    source_rank = None if rank is None or rank >= SOURCE_DEPTH else rank + 1
    return SampledHits([*others, *ties][:n], source_rank, rank is not None)
