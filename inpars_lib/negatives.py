"""Hard negatives: sample documents from the first-stage hits of each synthetic query, with a log to resume from."""

import hashlib
import math
import random
from collections.abc import Sequence

import msgspec

from inpars_lib.first_stage import FirstStage
from inpars_lib.formats.records import ScoredDoc, SyntheticQuery
from inpars_lib.resume import ResumeLog

TIE = 1e-4  # Anserini rounds scores to this, and lowers tied scores by a few millionths to keep their order
SPARE_SAMPLES = 50  # further hits to try before a hit with the source document's score becomes a negative
SOURCE_DEPTH = 10  # the source document's rank is recorded down to this depth, for MRR@10


class SampledHits(msgspec.Struct, frozen=True):
    """What was sampled from the hits of one synthetic query.

    Attributes:
        line: Line of the query in its file, from 0.
        doc_ids: The negatives.
        source_rank: Rank of the source document among the first 10 hits, from 1; None below.
        source_found: Whether the source document is among all hits.
    """

    line: int
    doc_ids: list[str]
    source_rank: int | None
    source_found: bool


def sample_negatives(
    queries: Sequence[SyntheticQuery],
    first_stage: FirstStage,
    log_path: str,
    *,
    max_hits: int = 1000,
    min_rank: int = 1,
    n_samples: int = 1,
    seed: int = 1,
    restart: bool = False,
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
        restart: Discard the finished queries of the log.
    """
    from tqdm import tqdm

    digest = hashlib.sha256()
    for query in queries:
        digest.update(f"{query.line}\t{query.doc_id}\t{query.question}\n".encode(errors="replace"))
    settings: dict[str, object] = {"max_hits": max_hits, "min_rank": min_rank, "n_samples": n_samples, "seed": seed}
    settings |= {**first_stage.settings(), "queries": digest.hexdigest()}
    log = ResumeLog(log_path, settings, SampledHits)
    log.prepare(restart)
    sampled = {row.line: row for row in log.rows()}
    rest = {str(query.line): query for query in queries if query.line not in sampled}
    questions = {number: query.question for number, query in rest.items()}
    found = first_stage.search(questions, max_hits, bar=False)
    for number, hits in tqdm(found, "Retrieving", total=len(queries), initial=len(sampled), unit=" queries"):
        query = rest[number]
        sampled[query.line] = sample_hits(hits, query, n_samples, seed, min_rank)
        log.write(sampled[query.line])
    return [sampled[query.line] for query in queries]


def sample_hits(hits: Sequence[ScoredDoc], query: SyntheticQuery, n: int, seed: int, min_rank: int = 1) -> SampledHits:
    """Sample `n` hits of a query, without its source document.

    Hits with the source document's score, duplicates of its text for example, are a last resort.

    Args:
        hits: Hits of the query, best first.
        query: The query.
        n: Documents to sample.
        seed: Seed of the sample, which also depends on the query's line.
        min_rank: First rank to sample from. The source document has a rank too.
    """
    rank = next((rank for rank, hit in enumerate(hits) if hit.doc_id == query.doc_id), None)
    source_score = math.inf if rank is None else hits[rank].score
    generator, left = random.Random(f"{seed} {query.line}"), list(range(min_rank - 1, len(hits)))
    fewest = len(left) - n - SPARE_SAMPLES
    others: list[str] = []
    ties: list[str] = []
    while left and len(others) < n and len(left) > fewest:
        hit = hits[left.pop(generator.randrange(len(left)))]
        if abs(hit.score - source_score) > TIE:
            others.append(hit.doc_id)
        elif hit.doc_id != query.doc_id:
            ties.append(hit.doc_id)
    source_rank = None if rank is None or rank >= SOURCE_DEPTH else rank + 1
    return SampledHits(query.line, [*others, *ties][:n], source_rank, rank is not None)
