"""--remove_query, on a collection whose documents are the queries, as in ArguAna."""

import re
from pathlib import Path

import pytest
from conftest import error_line, ok, run, write_rows

from inpars_lib import bm25
from inpars_lib.formats.runs import read_run

SUBJECTS = ["tides", "bread", "violins", "glaciers"]


@pytest.fixture
def arguments(tmp_path: Path) -> Path:
    """Write arguments and counterarguments. The query of an argument has its id and its text, without the title."""
    texts = {f"{name}-pro": f"all {name} are good because people like {name}" for name in SUBJECTS}
    against = {f"{name}-con": f"no {name} are good because people fear {name}" for name in SUBJECTS}
    docs = [{"_id": doc_id, "title": "society", "text": text} for doc_id, text in {**texts, **against}.items()]
    write_rows(tmp_path / "corpus.jsonl", docs)
    write_rows(tmp_path / "queries.jsonl", [{"_id": query_id, "text": text} for query_id, text in texts.items()])
    judged = [f"{name}-pro 0 {name}-con 1\n" for name in SUBJECTS]
    (tmp_path / "qrels.txt").write_text("".join(judged))
    own_first = [
        f"{name}-pro Q0 {name}-{side} {rank} {9 - rank} x\n"
        for name in SUBJECTS
        for rank, side in enumerate(("pro", "con"), 1)
    ]
    (tmp_path / "run.txt").write_text("".join(own_first))
    (tmp_path / "triples.tsv").write_text("all tides\tno tides\tall bread\n" * 8)
    return tmp_path


def own_hits(path: Path) -> list[str]:
    return [query_id for query_id, hits in read_run(str(path)).items() for hit in hits if hit.doc_id == query_id]


def test_bm25_retrieves_one_more(arguments: Path) -> None:
    index, output = arguments / "index", arguments / "out.txt"
    bm25.build_index(str(arguments / "corpus.jsonl"), str(index), bm25.BM25Config(threads=1))
    words = ["search", "--index", index, "--topics", arguments / "queries.jsonl", "--hits", 3, "--output", output]
    ok(run("inpars_lib.bm25", *words))
    assert len(own_hits(output)) == 4
    ok(run("inpars_lib.bm25", *words, "--remove_query"))
    assert own_hits(output) == []
    assert [len(hits) for hits in read_run(str(output)).values()] == [3] * 4


@pytest.mark.parametrize("columns", [6, 4, 3])
def test_measures_without_the_query(arguments: Path, columns: int) -> None:
    """The counterargument is second in the run, whatever the run's format."""
    path = arguments / "run.txt"
    rows = [line.split() for line in path.read_text().splitlines()]
    if columns < 6:
        path.write_text("".join("\t".join([row[0], *row[2:]][:columns]) + "\n" for row in rows))
    found = []
    for more in ([], ["--remove_query"]):
        done = ok(run("inpars_lib.evaluation", path, "--qrels", arguments / "qrels.txt", "--measures", "MRR@10", *more))
        found += re.findall(r"MRR@10 +\S+ +([0-9.]+)", done.stdout)
    assert found == ["0.5000", "1.0000"]


def rerank_args(folder: Path, model: Path, *args: object) -> list[object]:
    files = ["--queries", folder / "queries.jsonl", "--corpus", folder / "corpus.jsonl", "--output", folder / "out.txt"]
    return ["rerank.py", "--model", model, *files, "--qrels", folder / "qrels.txt", "--max_length", 64, *args]


def test_a_reranked_run_without_the_query(arguments: Path, tiny_t5: Path) -> None:
    for args in (["--run", arguments / "run.txt"], ["--index", arguments / "index", "--top_k", 3]):
        done = ok(run(*rerank_args(arguments, tiny_t5, *args)))
        advice = "for 4 of 4 queries a hit has the query's id and text, tides-pro for example. --remove_query drops"
        assert f"corpus.jsonl: {advice} these hits." in done.stderr
        assert len(own_hits(arguments / "out.txt")) == 4
        done = ok(run(*rerank_args(arguments, tiny_t5, *args, "--remove_query")))
        assert "--remove_query drops" not in done.stderr
        assert own_hits(arguments / "out.txt") == []
    assert own_hits(arguments / "out.txt.bm25.txt") == []
    assert [len(hits) for hits in read_run(str(arguments / "out.txt.bm25.txt")).values()] == [7] * 4


def test_equal_ids_of_other_texts_are_no_reason_for_advice(arguments: Path, tiny_t5: Path) -> None:
    """In Cranfield, for example, topics and documents are numbered from 1."""
    write_rows(arguments / "queries.jsonl", [{"_id": f"{name}-pro", "text": f"are {name} good"} for name in SUBJECTS])
    done = ok(run(*rerank_args(arguments, tiny_t5, "--run", arguments / "run.txt")))
    assert "--remove_query" not in done.stderr
    assert len(own_hits(arguments / "out.txt")) == 4


def test_evaluations_of_a_training_without_the_query(arguments: Path, tiny_t5: Path) -> None:
    words = ["train_t5.py", "--base_model", tiny_t5, "--triples_train", arguments / "triples.tsv", "--max_steps", 1]
    words += ["--corpus", arguments / "corpus.jsonl", "--run", arguments / "run.txt", "--measures", "MRR@10"]
    words += ["--queries", arguments / "queries.jsonl", "--qrels", arguments / "qrels.txt", "--max_length", 64]
    done = ok(run(*words, "--output_dir", arguments / "with"))
    assert "first stage: MRR@10 0.5000" in done.stderr
    assert "--remove_query drops these hits." in done.stderr
    done = ok(run(*words, "--output_dir", arguments / "without", "--remove_query"))
    assert "first stage: MRR@10 1.0000" in done.stderr
    refused = run(*words[:5], "--output_dir", arguments / "x", "--remove_query")
    assert "--remove_query needs --queries" in error_line(refused, 2)
