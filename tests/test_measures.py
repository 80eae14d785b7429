"""Measures against trec_eval, their names, thresholds, and tables of runs."""

import csv
import io
import math
import random
import re
from pathlib import Path

import numpy
import pytest
from conftest import ROOT, error_line, ok, run, run_process

from inpars_lib import evaluation, tables
from inpars_lib.cli import InputError
from inpars_lib.formats.records import Qrel, ScoredDoc


def test_measures() -> None:
    qrels = [Qrel("1", "a", 1), Qrel("1", "b", 2), Qrel("2", "a", 2), Qrel("3", "a", 1)]
    run = {"1": [ScoredDoc("1", "a", 3.0), ScoredDoc("1", "b", 2.0)]}
    run["2"] = [ScoredDoc("2", "x", 1.0), ScoredDoc("2", "a", 0.5)]
    one, two = (evaluation.evaluate_per_query(qrels, run, level) for level in (1, 2))
    assert one["MRR@10"] == {"1": 1.0, "2": 0.5, "3": 0.0}  # 3 has no hits, and counts
    assert two["MRR@10"] == {"1": 0.5, "2": 0.5, "3": 0.0}
    assert one["P@20"]["1"] == pytest.approx(0.1)
    assert two["P@20"]["1"] == pytest.approx(0.05)
    assert one["nDCG@10"] == two["nDCG@10"]
    gain = (1 + 2 / numpy.log2(3)) / (2 + 1 / numpy.log2(3))
    assert one["nDCG@10"]["1"] == pytest.approx(gain)
    assert evaluation.mean_values(one)["MRR@10"] == pytest.approx(0.5)
    assert list(one) == ["nDCG@10", "nDCG@20", "MRR@10", "MAP", "P@20", "R@1000"]


def test_ties_are_broken_like_trec_eval_in_every_measure() -> None:
    run = {"1": [ScoredDoc("1", "a", 1.0), ScoredDoc("1", "b", 1.0)]}
    values = evaluation.evaluate_per_query([Qrel("1", "a", 1)], run, 1)
    assert values["MRR@10"]["1"] == values["MAP"]["1"] == 0.5  # b precedes a


def test_one_query_has_no_p() -> None:
    table = evaluation.comparison_table({"AP": {"1": 0.5}}, {"AP": {"1": 0.25}})
    assert table.splitlines()[1].split() == ["AP", "0.5000", "0.2500", "-0.2500", "n/a", "0", "0", "1"]


def test_a_threshold_that_no_judgement_reaches(capsys: pytest.CaptureFixture) -> None:
    qrels, run = [Qrel("1", "a", 1)], {"1": [ScoredDoc("1", "a", 1.0)]}
    values = evaluation.evaluate_per_query(qrels, run, 2)
    assert values["nDCG@10"]["1"] == 1.0
    table = evaluation.comparison_table(values, values)
    assert [line.split()[1] for line in table.splitlines()[1:]] == ["1.0000", "1.0000", "n/a", "n/a", "n/a", "n/a"]
    evaluation.check_threshold(qrels, 1, "qrels.txt")
    assert capsys.readouterr().err == ""
    evaluation.check_threshold(qrels, 2, "qrels.txt", "nDCG@10")
    assert "--relevance_threshold 2. The highest grade is 1." in capsys.readouterr().err
    with pytest.raises(InputError, match="select by nDCG@10"):
        evaluation.check_threshold(qrels, 2, "qrels.txt", "MRR@10")


TREC_EVAL_MEASURES = (
    "nDCG nDCG@3 nDCG(judged_only=True)@3 RR AP MAP@3 AP(rel=2) P@3 P(rel=2,judged_only=True)@3 R@3 R(rel=2)@3 "
    "Success@2 Rprec Bpref Bpref(rel=2) infAP infAP(rel=3) SetP SetR SetF SetAP SetRelP"
)


def test_every_measure_is_trec_evals_whatever_ties_and_grades() -> None:
    import ir_measures

    names = evaluation.parse_measures(TREC_EVAL_MEASURES)
    assert names == tuple(TREC_EVAL_MEASURES.split())
    chance, docs = random.Random(3), [f"d{i}" for i in range(14)]
    for _ in range(60):
        grades = [-2, -1, 0, 0, 1, 2, 3]
        qrels = [Qrel("1", doc_id, chance.choice(grades)) for doc_id in chance.sample(docs, 8)] + [Qrel("1", "x", 3)]
        hits = [ScoredDoc("1", doc_id, chance.choice([0.0, 0.5, 1.0])) for doc_id in chance.sample(docs, 9)]
        values = evaluation.evaluate_per_query(qrels, {"1": hits}, 1, [*names, "MRR@2", "Judged@2", "Compat"])
        for name in names:  # trec_eval itself breaks the ties
            [metric] = ir_measures.pytrec_eval.iter_calc([ir_measures.parse_measure(name)], qrels, hits)
            assert values[name] == {"1": pytest.approx(metric.value)}, name
        grade = {qrel.doc_id: qrel.relevance for qrel in qrels}
        top = sorted(hits, key=lambda hit: (hit.score, hit.doc_id), reverse=True)[:2]
        assert values["Judged@2"]["1"] == sum(hit.doc_id in grade for hit in top) / 2
        assert values["MRR@2"]["1"] == max(1 / (i + 1) * (grade.get(hit.doc_id, 0) > 0) for i, hit in enumerate(top))
    ties = {"1": [ScoredDoc("1", doc_id, 0.0) for doc_id in "bca"]}  # the ideal ranking prefers c, which is retrieved
    compat = evaluation.evaluate_per_query([Qrel("1", "c", 1), Qrel("1", "x", 1)], ties, 1, ["Compat"])["Compat"]["1"]
    best, found = (sum(0.95**i * n / (i + 1) for i, n in enumerate(overlap)) for overlap in ([1, 2, 2], [1, 1, 1]))
    assert compat == pytest.approx(found / best)


def test_negative_grades_alone() -> None:
    qrels, run = [Qrel("1", "a", -2), Qrel("2", "b", 1)], {"1": [ScoredDoc("1", "a", 1.0)]}  # once a crash in C
    values = evaluation.evaluate_per_query(qrels, run, 1, ["nDCG@10", "AP", "Bpref", "Judged@1"])
    assert {name: value["1"] for name, value in values.items()} == {"nDCG@10": 0, "AP": 0, "Bpref": 0, "Judged@1": 1}


def test_rel_of_a_measure_replaces_the_threshold(capsys: pytest.CaptureFixture) -> None:
    qrels = [Qrel("1", "a", 1), Qrel("1", "b", 2)]
    run = {"1": [ScoredDoc("1", "a", 2.0), ScoredDoc("1", "b", 1.0)]}
    measures = ["RR@10", "RR(rel=1)@10", "RR(rel=2)@10", "SetRelP", "AP(rel=3)"]
    values = evaluation.evaluate_per_query(qrels, run, 2, measures)
    assert [values[name]["1"] for name in measures[:4]] == [0.5, 1.0, 0.5, 1.0]
    assert numpy.isnan(values["AP(rel=3)"]["1"])
    evaluation.check_threshold(qrels, 2, "qrels.txt", None, measures)
    assert "`rel` of AP(rel=3). The highest grade is 2. AP(rel=3) is not available" in capsys.readouterr().err
    for select_by, chosen in (("AP(rel=3)", measures), (None, ["AP(rel=3)"])):
        with pytest.raises(InputError, match=r"no judgement reaches `rel` of AP\(rel=3\)"):
            evaluation.check_threshold(qrels, 2, "qrels.txt", select_by, chosen)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ("nDCG@10 ndcg_cut.10", "'ndcg_cut.10' is not a supported measure. Supported: nDCG, "),
        ("recall_100", "'recall_100' is not a supported measure"),
        ("ERR@10", "'ERR@10' is not a supported measure"),
        ("RBP(rel=1)", "Supported: nDCG, RR (MRR), "),
        ("NumRet", "Supported: nDCG, RR (MRR), "),
        ("nDCG@10,RR@10", "such as nDCG@10"),
        ("P", "which P, R and Success need"),
        ("P@0", "'P@0'"),
        ("P@True", "'P@True'"),
        ("P@-1", "'P@-1'"),
        ("P@2.5", "'P@2.5'"),
        ("R@1000000", "'R@1000000'"),
        ("Judged@0", "'Judged@0'"),
        ("IPrec@0.1", "'IPrec@0.1'"),
        ("AP(rel=9223372036854775808)", "'AP(rel=9223372036854775808)'"),
        ("AP(rel=0)", "'AP(rel=0)'"),
        ("AP(rel=1,rel=2)", "'AP(rel=1,rel=2)'"),
        ("RR(judged_only=True)@10", "'RR(judged_only=True)@10'"),
        ("nDCG(gains={1:9})@10", "'nDCG(gains={1:9})@10'"),
        ("wörter", "'wörter' is not a supported measure"),
        (" ", "'' is not a supported measure"),
        ("MRR@10 RR@10", "MRR@10 and RR@10 are the same measure"),
    ],
)
def test_refused_measures(names: str, problem: str) -> None:
    assert problem in error_line(run("inpars_lib.evaluation", "--qrels", "q", "r", "--measures", names), 2)


def write_runs(folder: Path, **ranks: list[int]) -> None:
    """Write qrels with one relevant document per query, and runs that rank it so: 0 for a query without hits."""
    (folder / "qrels.txt").write_text("".join(f"{q} 0 d1 1\n" for q in range(len(next(iter(ranks.values()))))))
    for name, places in ranks.items():
        lines = [f"{q}\td{1 if i == place else i + 99}\t{i}\n" for q, place in enumerate(places) if place
                 for i in range(1, 4)]  # fmt: skip
        (folder / name).write_text("".join(lines) + "unjudged\td1\t1\n")


def table(folder: Path, *args: object) -> tuple[list[list[str]], str, str]:
    """Return the words of each row of the table, the lines above it and stderr."""
    done = ok(run("inpars_lib.evaluation", "--qrels", "qrels.txt", *args, cwd=folder))
    notes, rows = done.stdout.split("\n\n")
    return [line.split() for line in rows.splitlines()], notes, done.stderr


def test_a_table_of_any_runs(tmp_path: Path) -> None:
    from scipy.stats import ttest_rel

    ranks = {"a": [2, 2, 2, 3, 2, 0], "b": [1, 1, 2, 2, 2, 2], "c": [1, 1, 1, 1, 1, 3], "d": [2, 3, 2, 3, 2, 0]}
    write_runs(tmp_path, **ranks)
    rows, notes, said = table(tmp_path, *ranks, "--measures", "RR@10 Success@1")
    assert rows[0] == ["measure", "run", "mean", "change", "p", "won", "tied", "lost"]
    assert "Holm's correction over the 3 compared runs, for each measure separately" in notes
    assert "judged queries: 6\n" in notes
    assert "a: 1 of 6 queries are not judged and were skipped" in said
    assert "warning: a: 1 of 6 judged queries have no hits. They count as 0." in said
    assert not re.search("warning: [bc]:", said)
    values = {name: [1 / rank if rank else 0 for rank in places] for name, places in ranks.items()}
    p = {name: ttest_rel(values["a"], values[name]).pvalue for name in "bcd"}
    assert p["c"] < p["b"] < p["d"]  # Holm by hand: times 3, 2 and 1, and never below the one before
    second = max(3 * p["c"], 2 * p["b"])
    corrected = {"b": second, "c": 3 * p["c"], "d": max(second, p["d"])}
    assert rows[1] == ["RR@10", "a", f"{sum(values['a']) / 6:.4f}"]
    for name, row in zip("bcd", rows[2:5], strict=True):
        change = (sum(values[name]) - sum(values["a"])) / 6
        assert row[:4] == [name, f"{sum(values[name]) / 6:.4f}", f"{change:+.4f}", f"{corrected[name]:.4f}"]
    assert [row[4:] for row in rows[2:5]] == [["4", "2", "0"], ["6", "0", "0"], ["0", "5", "1"]]
    assert rows[5] == ["Success@1", "a", "0.0000"]
    # Without a difference p is 1. Two runs need no correction.
    rows, notes, _ = table(tmp_path, "a", "b", "--measures", "RR@10")
    assert rows[2][3] == f"{p['b']:.4f}"
    assert "Holm" not in notes
    (tmp_path / "same").write_bytes((tmp_path / "a").read_bytes())
    assert [row[-5:] for row in table(tmp_path, "a", "same")[0][2::2]] == [["+0.0000", "1.0000", "0", "6", "0"]] * 6
    rows, notes, _ = table(tmp_path, "c")
    assert rows[:2] == [["measure", "run", "mean"], ["nDCG@10", "c", "0.9167"]]
    assert notes == "judged queries: 6"


def test_tables_for_other_programs(tmp_path: Path) -> None:
    write_runs(tmp_path, **{"a_1": [2, 2, 0], "b|2": [1, 1, 2]})
    (tmp_path / "sub").mkdir()
    (tmp_path / "a_1").rename(tmp_path / "sub" / "a_1")
    args = ["inpars_lib.evaluation", "--qrels", "qrels.txt", "sub/a_1", "b|2", "--measures", "RR@10 AP(rel=2)"]

    def printed(form: str) -> tuple[list[str], str]:
        done = ok(run(*args, "--format", form, "--per_query", "values.csv", cwd=tmp_path))
        return done.stdout.splitlines(), done.stderr

    lines, said = printed("csv")
    assert "judged queries: 3\nchange, p (paired t-test), won, tied, lost: against a_1" in said
    header, first, second, missing, _ = csv.reader(lines)
    assert header == ["measure", "run", "mean", "change", "p", "won", "tied", "lost"]
    assert first == ["RR@10", "a_1", "0.3333", "", "", "", "", ""]
    assert second[:4] == ["RR@10", "b|2", "0.8333", "+0.5000"]
    assert missing[:3] == ["AP(rel=2)", "a_1", "n/a"]
    lines, _ = printed("markdown")
    assert lines[1] == "|---|---|---:|---:|---:|---:|---:|---:|"
    assert lines[3].startswith(r"|  | b\|2 | 0.8333 | +0.5000 |")
    lines, _ = printed("latex")
    assert lines[0] == r"\begin{tabular}{llrrrrrr}"
    assert lines[4] == r"RR@10 & a\_1 & 0.3333 &  &  &  &  &  \\"
    assert lines[-1] == r"\end{tabular}"
    values = list(csv.reader((tmp_path / "values.csv").open()))
    assert values[:3] == [["run", "query_id", "RR@10", "AP(rel=2)"], ["a_1", "0", "0.5", ""], ["a_1", "1", "0.5", ""]]
    assert len(values) == 7
    before = (tmp_path / "qrels.txt").read_bytes()
    for word in ("-", "", "/dev/stdout"):
        assert "expected a file" in error_line(run(*args, "--per_query", word, cwd=tmp_path), 2)
    twice = ["inpars_lib.evaluation", "sub/a_1", tmp_path / "sub/a_1", "--qrels", "qrels.txt"]
    assert "two of the runs are the same file" in error_line(run(*twice, cwd=tmp_path), 2)
    assert "--per_query and --qrels" in error_line(run(*args, "--per_query", "qrels.txt", cwd=tmp_path))
    assert (tmp_path / "qrels.txt").read_bytes() == before


def test_names_that_would_break_a_table() -> None:
    rows = [["measure", "run"], ["AP", "a\nb|*c*\\|\x1b[2J\udcff"]]
    assert tables.format_table(rows, "text").splitlines()[1].split() == ["AP", "a", "b|*c*\\|[2J?"]
    assert tables.format_table(rows, "markdown").splitlines()[2] == r"| AP | a b\|\*c\*\\\|[2J? |"
    assert tables.format_table(rows, "csv").splitlines()[1] == "AP,a b|*c*\\|[2J?"


def test_short_names() -> None:
    assert tables.short_names(["x/y/run.txt", "/z/bm25.txt"]) == ["run.txt", "bm25.txt"]
    assert tables.short_names(["x/a/run.txt", "x/b/run.txt"]) == ["a/run.txt", "b/run.txt"]
    assert tables.short_names(["run.txt", "b/run.txt"]) == ["run.txt", "b/run.txt"]
    assert tables.short_names(["a", "./a"]) == ["a", "a"]  # one run twice


def test_values_per_query() -> None:
    file = io.StringIO()
    tables.write_per_query(file, [("one", {"AP": {"q,1": 0.1}, "RR": {"q,1": math.nan}})])
    assert file.getvalue() == 'run,query_id,AP,RR\none,"q,1",0.1,\n'


def test_holms_correction() -> None:
    assert evaluation.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evaluation.holm([0.4, 0.9, 0.6]) == [1.0, 1.0, 1.0]
    assert evaluation.holm([]) == []


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    write_runs(tmp_path, a=[1], b=[2], c=[3])
    rows, notes, _ = table(tmp_path, "a", "b", "c", "--measures", "RR@10")
    assert rows[2] == ["b", "0.5000", "-0.5000", "n/a", "0", "0", "1"]
    assert "p: n/a, because a test needs two queries" in notes
    rows, _, said = table(tmp_path, "a", "b", "--measures", "nDCG@10 AP", "--relevance_threshold", 3)
    assert rows[3:] == [["AP", "a", "n/a"], ["b", "n/a"]]
    assert "no judgement reaches --relevance_threshold 3. The highest grade is 1. AP is not available." in said
    for name, text, problem in (
        ("empty", "", "empty: no usable line found"),
        ("other", "7 Q0 d1 1 1.0 x\n", "other: none of the 1 queries is judged in qrels.txt"),
    ):
        (tmp_path / name).write_text(text)
        assert problem in error_line(run("inpars_lib.evaluation", "--qrels", "qrels.txt", "a", name, cwd=tmp_path))


@pytest.mark.slow
def test_a_name_that_standard_output_cannot_show(tmp_path: Path) -> None:
    write_runs(tmp_path, café=[1, 2])
    args = ["--qrels", "qrels.txt", "--measures", "RR@10", "café"]
    done = ok(run_process("inpars_lib.evaluation", *args, cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONPATH=str(ROOT)))
    assert r"caf\xe9" in done.stdout
