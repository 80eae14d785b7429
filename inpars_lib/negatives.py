"""Hard negatives: sample documents from the first-stage hits of each synthetic query, with a log to resume from."""

import hashlib
import math
import os
import random
from collections.abc import Sequence
from typing import NamedTuple

from inpars_lib.bm25.search import BM25Searcher
from inpars_lib.files import ResumeLog
from inpars_lib.first_stage import QueryRun
from inpars_lib.formats.records import ScoredDoc, SyntheticQuery

TIE = 1e-4  # Anserini rounds scores to this, and lowers tied scores by a few millionths to keep their order
SPARE_SAMPLES = 50  # further hits to try before a hit with the source document's score becomes a negative
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


def sample_negatives(
    queries: Sequence[SyntheticQuery],
    first_stage: BM25Searcher | QueryRun,
    log_path: str,
    *,
    max_hits: int = 1000,
    min_rank: int = 1,
    n_samples: int = 1,
    seed: int = 1,
    resume: bool = True,
) -> list[SampledHits]:
    """Sample negatives for each query from its first-stage hits.

    The sample depends on the seed and on the query's line only, not on the number of threads or on a kill.

    Args:
        queries: Synthetic queries.
        first_stage: What retrieves the hits.
        log_path: Log of finished queries. The caller deletes the log when the output is complete.
        max_hits: Hits per query, and so the last rank to sample from.
        min_rank: First rank to sample from.
        n_samples: Negatives per query.
        seed: Seed of the sampling.
        resume: Take over the finished queries of a log with the same settings.
    """
    from tqdm import tqdm

    digest = hashlib.sha256()
    for query in queries:
        digest.update(f"{query.line}\t{query.doc_id}\t{query.question}\n".encode(errors="replace"))
    settings: dict[str, object] = {"max_hits": max_hits, "min_rank": min_rank, "n_samples": n_samples, "seed": seed}
    settings |= {"first_stage": first_stage.fingerprint(), "queries": digest.hexdigest()}
    log = ResumeLog(log_path, settings)
    if not resume and os.path.exists(log_path):
        os.remove(log_path)
    sampled = {row.pop("line"): SampledHits(**row) for row in log.open()}
    rest = {str(query.line): query for query in queries if query.line not in sampled}
    questions = {number: query.question for number, query in rest.items()}
    found = first_stage.search(questions, max_hits, bar=False)
    for number, hits in tqdm(found, "Retrieving", total=len(queries), initial=len(sampled), unit=" queries"):
        query = rest[number]
        sampled[query.line] = sample_hits(hits, query.doc_id, n_samples, f"{seed} {query.line}", min_rank)
        log.write({"line": query.line, **sampled[query.line]._asdict()})
    log.close()
    return [sampled[query.line] for query in queries]


def sample_hits(hits: Sequence[ScoredDoc], source: str, n: int, seed: str, min_rank: int = 1) -> SampledHits:
    """Sample `n` hits of a query, without the source document.

    Hits with the source document's score, duplicates of its text for example, are a last resort.

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
