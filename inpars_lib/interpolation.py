"""Interpolation of the scores of a reranker and of the first stage."""

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from inpars_lib.evaluation import evaluate_per_query, mean_values
from inpars_lib.formats.records import Qrel, ScoredDoc
from inpars_lib.formats.runs import Run, rerank_hits

INTERPOLATION_WEIGHTS = [i / 10 for i in range(11)]  # the grid that `auto` searches


def z_normalize(values: Sequence[float]) -> list[float]:
    """Return the values scaled to mean 0 and standard deviation 1, or zeros if all values are equal."""
    mean, deviation = fmean(values), pstdev(values)
    return [(value - mean) / deviation if deviation else 0.0 for value in values]


def interpolate(hits: Sequence[ScoredDoc], scores: Sequence[float], weight: float) -> Sequence[float]:
    """Return the linear interpolation of reranker and first-stage scores of a query's reranked hits.

    Both are z-normalized over the reranked hits. A weight of 1 returns the reranker's scores as they are.

    Args:
        hits: First-stage hits, best first.
        scores: Reranker scores of the first hits.
        weight: Weight of the reranker, 0 to 1.
    """
    if weight == 1.0:
        return scores
    new, old = z_normalize(scores), z_normalize([hit.score for hit in hits[: len(scores)]])
    return [weight * a + (1 - weight) * b for a, b in zip(new, old, strict=True)]


def interpolation_curve(run: Run, scores: Mapping[str, Sequence[float]], qrels: Sequence[Qrel]) -> dict[float, float]:
    """Return nDCG@10 by interpolation weight.

    Args:
        run: First-stage hits by query id.
        scores: Reranker scores of the first hits by query id.
        qrels: Judgements.
    """
    curve = {}
    for weight in INTERPOLATION_WEIGHTS:
        mixed = {q: rerank_hits(hits, interpolate(hits, scores[q], weight)) for q, hits in run.items()}
        curve[weight] = round(mean_values(evaluate_per_query(qrels, mixed, 1))["nDCG@10"], 4)
    return curve


def best_weight(curve: Mapping[float, float]) -> float:
    """Return the weight with the highest nDCG@10, of several the largest. If no weight changes nDCG@10, return 0."""
    return max(curve, key=lambda weight: (curve[weight], weight)) if len(set(curve.values())) > 1 else 0.0
