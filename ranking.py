"""From scores to a ranking, and what a ranking is worth: the measures of upstream's script, by ir-measures."""

from collections.abc import Iterable, Mapping, Sequence

from formats import Qrel, ScoredDoc

MEASURES = ("nDCG@10", "nDCG@20", "MRR@10", "MAP", "P@20", "R@1000")  # upstream's


def rank(hits: Sequence[ScoredDoc], scores: Mapping[str, float]) -> list[ScoredDoc]:
    """The hits of a query by their new scores, those without one below in the order they had.

    Scores are rounded as they will be written, and ties go by doc_id downwards, as trec_eval has them, so that whoever
    reads the run sees one order.
    """
    reranked = [hit._replace(score=round(scores[hit.doc_id], 6)) for hit in hits if hit.doc_id in scores]
    reranked.sort(key=lambda hit: (hit.score, hit.doc_id), reverse=True)
    rest = [hit for hit in hits if hit.doc_id not in scores]
    return reranked + [hit._replace(score=reranked[-1].score - 1 - i) for i, hit in enumerate(rest)]


def per_query(
    qrels: Iterable[Qrel], run: Mapping[str, Sequence[ScoredDoc]], relevance_threshold: int
) -> dict[str, dict[str, float]]:
    """The value of each measure for each query of `qrels`, 0 for one without hits: {measure: {query id: value}}.

    MRR@10, MAP, P@20 and R@1000 count documents of `relevance_threshold` and above as relevant; nDCG uses the grades as
    they are (trec_eval's `-l` does the same).
    """
    from ir_measures import AP, RR, P, R, iter_calc, nDCG

    level = relevance_threshold
    measures = nDCG @ 10, nDCG @ 20, RR(rel=level) @ 10, AP(rel=level), P(rel=level) @ 20, R(rel=level) @ 1000
    named = dict(zip(measures, MEASURES, strict=True))
    judged: dict[str, list[Qrel]] = {}
    for qrel in qrels:
        judged.setdefault(qrel.query_id, []).append(qrel)
    values = {name: dict.fromkeys(judged, 0.0) for name in named.values()}
    for query_id in judged.keys() & run.keys():  # one at a time, to hold one in memory
        for metric in iter_calc(list(named), judged[query_id], list(run[query_id])):
            values[named[metric.measure]][query_id] = metric.value
    return values


def means(values: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean of each measure over the queries."""
    return {name: sum(of_query.values()) / len(of_query) for name, of_query in values.items()}
