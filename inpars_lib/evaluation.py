"""Measures, significance, interpolation of scores, tables and plots.

The measures are those of the paper's script, computed by ir-measures: https://ir-measur.es
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, pstdev

from inpars_lib.cli import InputError, warn
from inpars_lib.formats import RUN_SCORE
from inpars_lib.records import Qrel, ScoredDoc
from inpars_lib.storage import atomic_write

MEASURES = ("nDCG@10", "nDCG@20", "MRR@10", "MAP", "P@20", "R@1000")
BINARY_MEASURES = MEASURES[2:]  # those that depend on the relevance threshold
INTERPOLATION_WEIGHTS = [i / 10 for i in range(11)]  # the grid that `auto` searches

Run = Mapping[str, Sequence[ScoredDoc]]
MeasureValues = dict[str, dict[str, float]]  # {measure: {query id: value}}


# --------------------------------------------------------------------------------------------------------- measures


def trec_order(hit: ScoredDoc) -> tuple[float, str]:
    """Return trec_eval's sort key of a hit, for descending order: the score, then the doc_id."""
    return hit.score, hit.doc_id


def rerank_hits(hits: Sequence[ScoredDoc], scores: Mapping[str, float]) -> list[ScoredDoc]:
    """Return the hits of a query in the order of their new scores, hits without one below in their old order.

    Scores are rounded to the digits that a run holds, and ties are broken by descending doc_id as in trec_eval, so that
    every reader of the run sees the same order.

    Args:
        hits: First-stage hits, best first.
        scores: New score by doc_id.
    """
    reranked = [
        hit._replace(score=float(format(scores[hit.doc_id], RUN_SCORE))) for hit in hits if hit.doc_id in scores
    ]
    reranked.sort(key=trec_order, reverse=True)
    rest = [hit for hit in hits if hit.doc_id not in scores]
    return reranked + [hit._replace(score=reranked[-1].score - 1 - i) for i, hit in enumerate(rest)]


def evaluate_per_query(qrels: Iterable[Qrel], run: Run, relevance_threshold: int) -> MeasureValues:
    """Return each measure's value for each judged query, 0 for a query without hits.

    Ties are broken as in trec_eval. If no judgement reaches the threshold, the measures that depend on the threshold
    are NaN.

    Args:
        qrels: Judgements.
        run: Hits by query id.
        relevance_threshold: Lowest grade that counts as relevant in MRR@10, MAP, P@20 and R@1000, as with trec_eval's
            `-l`. nDCG uses the grades as they are.
    """
    from ir_measures import AP, RR, P, R, iter_calc, nDCG

    level = relevance_threshold
    measures = nDCG @ 10, nDCG @ 20, RR(rel=level) @ 10, AP(rel=level), P(rel=level) @ 20, R(rel=level) @ 1000
    named = dict(zip(measures, MEASURES, strict=True))
    judged: dict[str, list[Qrel]] = {}
    for qrel in qrels:
        judged.setdefault(qrel.query_id, []).append(qrel)
    values = {name: dict.fromkeys(judged, 0.0) for name in named.values()}
    for query_id in judged.keys() & run.keys():  # one query at a time keeps memory flat
        # The providers of ir-measures break ties differently, so the run gets scores without ties.
        hits = sorted(run[query_id], key=trec_order, reverse=True)
        hits = [hit._replace(score=float(-rank)) for rank, hit in enumerate(hits)]
        for metric in iter_calc(list(named), judged[query_id], hits):
            values[named[metric.measure]][query_id] = metric.value
    if highest_grade(judged.values()) < level:
        for name in BINARY_MEASURES:
            values[name] = dict.fromkeys(judged, math.nan)
    return values


def highest_grade(judged: Iterable[Iterable[Qrel]]) -> int:
    """Return the highest relevance grade, 0 without judgements."""
    return max((qrel.relevance for qrels in judged for qrel in qrels), default=0)


def check_threshold(qrels: Sequence[Qrel], relevance_threshold: int, source: str, select_by: str | None = None) -> None:
    """Warn if no judgement reaches the relevance threshold.

    Raises:
        InputError: `select_by` is a measure that depends on the threshold.
    """
    highest = highest_grade([qrels])
    if highest >= relevance_threshold:
        return
    problem = (
        f"{source}: no judgement reaches --relevance_threshold {relevance_threshold}. The highest grade is {highest}."
    )
    if select_by in BINARY_MEASURES:
        raise InputError(f"{problem} Lower the threshold, or select by nDCG@10.")
    warn(f"{problem} {', '.join(BINARY_MEASURES)} are not available.")


def format_value(value: float) -> str:
    """Return a measure's value with four decimals, or `n/a` for NaN."""
    return "n/a" if math.isnan(value) else f"{value:.4f}"


def mean_values(values: MeasureValues) -> dict[str, float]:
    """Return each measure's mean over the queries."""
    return {name: sum(per_query.values()) / len(per_query) for name, per_query in values.items()}


def comparison_table(first_stage: MeasureValues, reranked: MeasureValues) -> str:
    """Return a text table of both rankings: means, paired t-test over the queries, queries won, tied and lost."""
    from scipy.stats import ttest_rel

    lines = [f"{'':10}{'first stage':>12}{'reranked':>10}{'change':>9}{'p':>8}{'won':>6}{'tied':>6}{'lost':>6}"]
    for name, old in mean_values(first_stage).items():
        pairs = [(value, reranked[name][query_id]) for query_id, value in first_stage[name].items()]
        new = sum(b for _, b in pairs) / len(pairs)
        won, lost = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
        if math.isnan(old):
            lines.append(f"{name:10}{'n/a':>12}{'n/a':>10}")
            continue
        p = ttest_rel(*zip(*pairs, strict=True)).pvalue if won + lost and len(pairs) > 1 else 1.0
        lines.append(
            f"{name:10}{old:12.4f}{new:10.4f}{new - old:+9.4f}{p:8.4f}{won:6}{len(pairs) - won - lost:6}{lost:6}"
        )
    return "\n".join(lines)


def plot_gains(path: str, before: Mapping[str, float], after: Mapping[str, float], measure: str) -> None:
    """Plot each query's gain over the first stage, in descending order, as PNG.

    Args:
        path: File to write.
        before: First-stage value by query id.
        after: Reranked value by query id.
        measure: Name of the measure.
    """
    from matplotlib.figure import Figure

    gains = sorted((after[query_id] - value for query_id, value in before.items()), reverse=True)
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(gains)), gains, width=1.0, color=["tab:green" if gain > 0 else "tab:red" for gain in gains])
    axes.axhline(0, color="0.3", linewidth=0.8)
    mean = sum(gains) / len(gains)
    axes.axhline(mean, color="tab:blue", linestyle=":", label=f"mean {mean:+.4f}")
    axes.set(xlabel=f"queries: {won:,} won, {len(gains) - won - lost:,} tied, {lost:,} lost")
    axes.set(ylabel=f"gain in {measure} over the first stage", ylim=(-1.05, 1.05))
    axes.legend()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150)


# ---------------------------------------------------------------------------------------------------- interpolation


def z_normalize(values: Sequence[float]) -> list[float]:
    """Return the values scaled to mean 0 and standard deviation 1, or zeros if all values are equal."""
    mean, deviation = fmean(values), pstdev(values)
    return [(value - mean) / deviation if deviation else 0.0 for value in values]


def interpolate(hits: Sequence[ScoredDoc], scores: Mapping[str, float], weight: float) -> dict[str, float]:
    """Return the linear interpolation of reranker and first-stage scores of a query, by doc_id.

    Both are z-normalized over the reranked documents of the query. A weight of 1 returns the reranker's scores as
    they are.

    Args:
        hits: First-stage hits.
        scores: Reranker score by doc_id.
        weight: Weight of the reranker, 0 to 1.
    """
    if weight == 1.0:
        return dict(scores)
    both = [hit for hit in hits if hit.doc_id in scores]
    new, old = z_normalize([scores[hit.doc_id] for hit in both]), z_normalize([hit.score for hit in both])
    return {hit.doc_id: weight * a + (1 - weight) * b for hit, a, b in zip(both, new, old, strict=True)}


def interpolation_curve(
    run: Run, scores: Mapping[str, Mapping[str, float]], qrels: Sequence[Qrel]
) -> dict[float, float]:
    """Return nDCG@10 by interpolation weight.

    Args:
        run: First-stage hits by query id.
        scores: Reranker score by query id and doc_id.
        qrels: Judgements.
    """
    curve = {}
    for weight in INTERPOLATION_WEIGHTS:
        mixed = {q: rerank_hits(hits, interpolate(hits, scores[q], weight)) for q, hits in run.items()}
        curve[weight] = round(mean_values(evaluate_per_query(qrels, mixed, 1))["nDCG@10"], 4)
    return curve


def best_weight(curve: Mapping[float, float]) -> float:
    """Return the weight with the highest nDCG@10, the largest weight among equals; 0 if all weights are equal."""
    if len(set(curve.values())) == 1:
        return 0.0
    return max(curve, key=lambda weight: (curve[weight], weight))
