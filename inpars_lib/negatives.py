"""Hard negatives: sample documents from the first-stage hits of each synthetic query, with a log to resume from."""

import hashlib
import math
import random
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import msgspec

from inpars_lib.cli import InputError
from inpars_lib.first_stage import FirstStage, search_in_blocks, source_rank
from inpars_lib.formats.records import ScoredDoc, SyntheticQuery
from inpars_lib.resume import ResumeLog
from inpars_lib.spool import SpooledQueries

TIE = 1e-4  # Anserini rounds scores to this, and lowers tied scores by a few millionths to keep their order
SPARE_SAMPLES = 50  # hits to look at beyond the wanted number before ties with the source document are accepted


class SampledHits(msgspec.Struct, frozen=True):
    """What was sampled from the hits of one synthetic query.

    Attributes:
        line: Line of the query in its file, from 0.
        doc_ids: The negatives.
        source_rank: Rank of the source document among the hits, from 1; None if it is not there.
    """

    line: int
    doc_ids: list[str]
    source_rank: int | None


class Sampling(NamedTuple):
    """How negatives are sampled.

    Attributes:
        max_hits: Hits to retrieve per query. The last of them is the last that can be sampled.
        min_rank: Rank of the first hit that can be sampled. The source document counts as a hit.
        n_samples: Negatives per query.
        seed: Seed of the samples, each of which also depends on the query's line.
    """

    max_hits: int
    min_rank: int
    n_samples: int
    seed: int


def sample_negatives(
    queries: SpooledQueries,
    first_stage: FirstStage,
    sampling: Sampling,
    log_path: str,
    restart: bool = False,
) -> ResumeLog[SampledHits]:
    """Sample negatives for each query from its first-stage hits.

    The samples do not depend on the number of threads or on a kill.

    Args:
        queries: Synthetic queries.
        first_stage: What retrieves the hits.
        sampling: How to sample.
        log_path: Log of finished queries.
        restart: Discard the finished queries of the log.

    Returns:
        The log, with a row for each query, in the order of `queries`. The caller deletes the log.

    Raises:
        InputError: The log has other settings or is damaged.
    """
    from tqdm import tqdm

    digest = hashlib.sha256()
    for query in queries:
        digest.update(f"{query.line}\t{query.doc_id}\t{query.question}\n".encode())
    settings = {**sampling._asdict(), **first_stage.settings(), "queries": digest.hexdigest()}
    log = ResumeLog(log_path, settings, SampledHits)
    log.prepare(restart)
    lines, finished = (query.line for query in queries), 0
    for row in log.rows():
        if row.line != next(lines, None):
            problem = f"a row of query {row.line} is out of order"
            raise InputError(f"{log_path}: {problem}. Add --restart to throw the earlier work away.")
        finished += 1
    found = search_in_blocks(first_stage, islice(queries, finished, None), sampling.max_hits)
    for query, hits in tqdm(found, "Retrieving", total=len(queries), initial=finished, unit=" queries"):
        log.write(sample_hits(hits, query, sampling))
    return log


def sample_hits(hits: Sequence[ScoredDoc], query: SyntheticQuery, sampling: Sampling) -> SampledHits:
    """Sample hits of a query, best first, without its source document.

    A hit with the source document's score may have the same text, so such ties are accepted only if there are too few
    other hits.
    """
    rank = source_rank(query, hits)
    source_score = hits[rank - 1].score if rank else math.inf
    generator = random.Random(f"{sampling.seed} {query.line}")
    left, n = list(range(sampling.min_rank - 1, len(hits))), sampling.n_samples
    others: list[str] = []
    ties: list[str] = []
    for _ in range(n + SPARE_SAMPLES):
        if not left or len(others) == n:
            break
        hit = hits[left.pop(generator.randrange(len(left)))]
        if abs(hit.score - source_score) > TIE:
            others.append(hit.doc_id)
        elif hit.doc_id != query.doc_id:
            ties.append(hit.doc_id)
    return SampledHits(query.line, [*others, *ties][:n], rank)
