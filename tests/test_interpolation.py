"""Scores interpolated with the first stage, and the ranking that they make."""

import pytest

from inpars_lib.formats.records import Qrel, ScoredDoc
from inpars_lib.formats.runs import rerank_hits
from inpars_lib.interpolation import best_weight, interpolate, interpolation_curve


def test_ties_in_a_ranking() -> None:
    hits = [ScoredDoc("q", doc_id, 10.0 - i) for i, doc_id in enumerate("abcde")]
    ranked = rerank_hits(hits, [-0.5, -0.1, -0.5000000001])
    # c and a tie in the digits of a run, and trec_eval puts the greater id first; d and e were not reranked.
    assert [(hit.doc_id, hit.score) for hit in ranked] == [
        ("b", -0.1),
        ("c", -0.5),
        ("a", -0.5),
        ("d", -1.5),
        ("e", -2.5),
    ]


def test_interpolated_scores() -> None:
    hits = [ScoredDoc("q", "a", 30.0), ScoredDoc("q", "b", 20.0), ScoredDoc("q", "c", 10.0), ScoredDoc("q", "d", 5.0)]
    scores = [-3.0, -1.0, -2.0]  # d was not reranked
    assert interpolate(hits, scores, 1.0) == scores
    step = (3 / 2) ** 0.5  # three values at equal distances, z-normalized
    assert interpolate(hits, scores, 0.0) == pytest.approx([step, 0, -step])
    assert interpolate(hits, scores, 0.5) == pytest.approx([0, step / 2, -step / 2])
    assert interpolate(hits[:1], [-3.0], 0.5) == [0.0]  # nothing to compare with


def test_the_weight_is_chosen_where_the_source_documents_come_first() -> None:
    run = {q: [ScoredDoc(q, "a", 3.0), ScoredDoc(q, "b", 2.0), ScoredDoc(q, "c", 1.0)] for q in ("1", "2")}
    against = {q: [-3.0, -2.0, -1.0] for q in run}
    source = [Qrel("1", "a", 1), Qrel("2", "a", 1)]
    assert best_weight(interpolation_curve(run, against, source)) == 0.4  # up to here the first stage's order holds
    assert best_weight(interpolation_curve(run, against, [Qrel("1", "c", 1), Qrel("2", "c", 1)])) == 1.0
    same = {q: [3.0, 2.0, 1.0] for q in run}
    assert best_weight(interpolation_curve(run, same, source)) == 0.0  # no weight matters: the first stage alone
