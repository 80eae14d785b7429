"""Stage 5: reranked runs, kills, several processes, interpolation."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, SUBJECTS, error_line, kill_after, ok, rows, run, save_t5, write_rows
from training_helpers import QUICK, dev, dev_but, train

from inpars_lib.cli import InputError
from inpars_lib.files import exclusive
from inpars_lib.formats.collection import write_texts
from inpars_lib.formats.records import Topic
from inpars_lib.formats.runs import read_run
from inpars_lib.rerankers.load import load_reranker
from inpars_lib.resume import ResumeLog


@pytest.fixture(scope="module")
def trained(separable: Path, tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "model"
    args = ["--max_steps", 60, "--learning_rate", 5e-3, "--gradient_accumulation_steps", 2]
    ok(train(separable, tiny_t5, output, *args))
    return output


def test_reranking_puts_positives_first(trained: Path, separable: Path, tmp_path: Path) -> None:
    output = tmp_path / "run.txt"
    done = ok(
        run(
            *("rerank.py", "--model", trained, *dev(separable), "--output", output, "--top_k", 12, "--max_length", 64),
            *("--plot", tmp_path / "gains.png"),
        )
    )
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")
    ranked: dict[str, list[str]] = {}
    scores: dict[str, list[float]] = {}
    for line in output.read_text().splitlines():
        query_id, q0, doc_id, rank, score, tag = line.split()
        ranked.setdefault(query_id, []).append(doc_id)
        scores.setdefault(query_id, []).append(float(score))
        assert (q0, int(rank), tag) == ("Q0", len(ranked[query_id]), "inpars")
    assert list(ranked) == [str(i) for i in range(len(SUBJECTS))]
    for query_id, doc_ids in ranked.items():
        assert sorted(doc_id[0] for doc_id in doc_ids[:12]) == ["n"] * 6 + ["p"] * 6
        assert [doc_id[0] for doc_id in doc_ids[:6]] == ["p"] * 6
        # Hits below the first --top_k keep their order, below the reranked ones.
        assert doc_ids[12:] == [f"{kind}{query_id}-{j}" for j in range(6, 10) for kind in "np"]
        assert scores[query_id] == sorted(scores[query_id], reverse=True)
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if "@" in line or "MAP" in line}
    assert set(table) == {"nDCG@10", "nDCG@20", "MRR@10", "MAP", "P@20", "R@1000"}
    first, reranked, change, p, won, tied, lost = map(float, table["MRR@10"])
    assert (first, reranked, change, won, tied, lost) == (0.5, 1.0, 0.5, 10, 0, 0)
    assert p < 0.05
    assert list(map(float, table["R@1000"])) == [1, 1, 0, 1, 0, 10, 0]


def test_other_measures(trained: Path, separable: Path, tmp_path: Path) -> None:
    args = ["rerank.py", "--model", trained, "--output", tmp_path / "run.txt", "--max_length", 64]
    measures = ["--measures", "P(rel=2,judged_only=True)@5 RR@1 Judged@10", "--plot", tmp_path / "gains.png"]
    said = ok(run(*args, *dev(separable), *measures)).stdout
    header, *lines = said.split("\n\n")[1].splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["P(rel=2,judged_only=True)@5", "0.4000"],
        ["RR@1", "0.0000"],
        ["Judged@10", "0.5000"],
    ]
    assert len({len(line) for line in (header, *lines)}) == 1  # columns are aligned
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")
    unjudged = [word for word in dev(separable) if word not in ("--qrels", separable / "qrels.txt")]
    assert "--measures need --qrels" in error_line(run(*args, *unjudged, "--measures", "RR@1"), 2)


def test_the_table_agrees_with_ir_measures(trained: Path, separable: Path, tmp_path: Path) -> None:
    import ir_measures
    from ir_measures import AP, RR, nDCG

    output = tmp_path / "run.txt"
    args = ["--model", trained, *dev(separable), "--output", output, "--relevance_threshold", 2, "--max_length", 64]
    said = ok(run("rerank.py", *args)).stdout
    table = {line.split()[0]: line.split()[2] for line in said.splitlines() if "@" in line or "MAP" in line}
    # ir-measures computes RR@10 with another order of ties, and RR with trec_eval. All first hits are in the top 10.
    qrels = list(ir_measures.read_trec_qrels(str(separable / "qrels.txt")))
    measures = {"nDCG@10": nDCG @ 10, "MRR@10": RR(rel=2), "MAP": AP(rel=2)}
    values = ir_measures.calc_aggregate(list(measures.values()), qrels, ir_measures.read_trec_run(str(output)))
    for name, measure in measures.items():
        assert float(table[name]) == pytest.approx(values[measure], abs=1e-4)


@pytest.fixture(scope="module")
def long_run(separable: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Write 300 queries with 20 hits each: 24 blocks of at most 260 pairs. Return the flags."""
    folder = tmp_path_factory.mktemp("long")
    topics = [line.split("\t") for line in (separable / "topics.tsv").read_text().splitlines()]
    hits = [line.split() for line in (separable / "run.txt").read_text().splitlines()]
    with (folder / "topics.tsv").open("w") as file:
        file.writelines(f"{q}-{i}\t{text} {i}\n" for i in range(30) for q, text in topics)
    with (folder / "run.txt").open("w") as file:
        file.writelines(" ".join([f"{hit[0]}-{i}", *hit[1:]]) + "\n" for i in range(30) for hit in hits)
    files = ["--queries", folder / "topics.tsv", "--run", folder / "run.txt"]
    return [*files, "--corpus", separable / "collection.tsv", "--max_length", 64]


def blocks(output: Path) -> int:
    """Return the number of finished blocks of a run."""
    logs = output.parent.glob(f"{output.name}.scores.jsonl*")
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in logs)


@pytest.mark.slow
def test_kills_do_not_change_a_run(long_run: list[object], tiny_t5: Path, tmp_path: Path) -> None:
    """SIGKILL after one block more of 25, several times. `KILLS=20 bash run_tests.sh -k kills` kills most often."""
    ok(run("rerank.py", "--model", tiny_t5, *long_run, "--output", tmp_path / "whole.txt"))
    output = tmp_path / "run.txt"
    args = ["--model", tiny_t5, *long_run, "--output", tmp_path / "run.txt"]
    for _ in range(min(20, int(os.environ.get("KILLS", 2)))):
        kill_after("rerank.py", *args, count=lambda: blocks(output))
        assert not (tmp_path / "run.txt").exists()
    finished = blocks(output)
    done = ok(run("rerank.py", *args))
    assert (tmp_path / "run.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.txt", "whole.txt"]
    percent = int(re.search(r"Reranking: +([0-9]+)%", done.stderr)[1])  # where the bar began
    assert percent >= int(100 * finished / 25) > 0


def leave_scores(args: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rerank until all scores are saved, and no further."""
    with monkeypatch.context() as patch:
        patch.setattr("rerank.write_outputs", Mock(side_effect=InputError("stopped")))
        assert error_line(run("rerank.py", *args)) == "error: stopped"


def test_other_settings_are_refused(
    separable: Path, long_run: list[object], tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, log = tmp_path / "run.txt", tmp_path / "run.txt.scores.jsonl"
    args = ["--model", tiny_t5, *long_run, "--output", output]
    leave_scores(args, monkeypatch)
    saved = log.read_bytes()
    other = save_t5(tmp_path / "other", (separable / "triples.tsv").read_text().splitlines()[:50])
    for flags, difference in (
        (["--max_length", 63], "max_length 64, now 63"),
        (["--batch_tokens", 999], "batch_tokens null, now 999"),
        (["--token_true", "tides", "--token_false", "bees"], 'token_true null, now "tides"'),
        (["--top_k", 3], "the set of queries and hits differs"),
        (["--model", other], "the state of the files of model and collection differs"),
    ):
        refused = error_line(run("rerank.py", *args, *flags))
        assert "run.txt.scores.jsonl: made with other settings" in refused
        assert difference in refused
        assert log.read_bytes() == saved
    ok(run("rerank.py", "--model", other, *long_run, "--output", output, "--restart"))
    assert not log.exists()
    ok(run("rerank.py", "--model", other, *long_run, "--output", tmp_path / "two.txt"))
    assert output.read_bytes() == (tmp_path / "two.txt").read_bytes()


def test_what_decides_no_score_may_change_on_resume(
    separable: Path, tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are saved for another interpolation weight, other judgements and other measures too."""
    output = tmp_path / "run.txt"
    args = ["--model", tiny_t5, *dev(separable), "--max_length", 64, "--output"]
    leave_scores([*args, output], monkeypatch)
    few = tmp_path / "few.txt"
    few.write_text((separable / "qrels.txt").read_text()[:200])
    held = [{"doc_id": f"p{i}-0", "doc_text": "x", "question": "what are tides", "log_probs": [-1]} for i in range(2)]
    (tmp_path / "held.run").write_text("0 Q0 p0-0 1 1.0 x\n1 Q0 p1-0 1 1.0 x\n1 Q0 n1-0 2 0.5 x\n")
    auto = ["--interpolation_weight", "auto", "--holdout_run", tmp_path / "held.run"]
    auto += ["--holdout", write_rows(tmp_path / "held.jsonl", held)]
    for flags in (["--interpolation_weight", 0.5], ["--qrels", few, "--measures", "AP"], auto):
        log = (tmp_path / "run.txt.scores.jsonl").read_bytes()
        done = ok(run("rerank.py", *args, output, *flags))
        assert re.search(r"Reranking: +(100%|9[0-9]%)", done.stderr)
        ok(run("rerank.py", *args, tmp_path / "whole.txt", *flags))
        assert output.read_bytes() == (tmp_path / "whole.txt").read_bytes()
        (tmp_path / "run.txt.scores.jsonl").write_bytes(log)


def test_an_incomplete_set_of_scores_is_refused(
    long_run: list[object], tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank may have died."""
    written: list[object] = []
    write = ResumeLog.write

    def write_all_but_one(log: ResumeLog, row: object) -> None:
        written.append(row)
        if len(written) != 4:
            write(log, row)

    monkeypatch.setattr(ResumeLog, "write", write_all_but_one)
    args = ["--model", tiny_t5, *long_run, "--output", tmp_path / "run.txt"]
    assert "run.txt.scores.jsonl: 1 of 24 blocks are missing" in error_line(run("rerank.py", *args))
    assert not (tmp_path / "run.txt").exists()
    assert blocks(tmp_path / "run.txt") == 23
    monkeypatch.undo()
    assert "Reranking:  9" in ok(run("rerank.py", *args)).stderr  # it resumes at 96 %
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.txt"]


def test_a_block_with_too_few_scores_is_refused(
    long_run: list[object], tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--model", tiny_t5, *long_run, "--output", tmp_path / "run.txt"]
    leave_scores(args, monkeypatch)
    log = tmp_path / "run.txt.scores.jsonl"
    settings, first, *others = log.read_text().splitlines()
    short = {**json.loads(first), "scores": json.loads(first)["scores"][:-1]}
    log.write_text("\n".join([settings, json.dumps(short), *others, ""]))
    assert "damaged, a block of 260 pairs has 259 scores. Add --restart" in error_line(run("rerank.py", *args))
    ok(run("rerank.py", *args, "--restart"))


def test_outputs_appear_together(
    separable: Path, demo_data: Path, demo_index: Path, tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails leaves the old run, first stage and plot, and its scores for the next one."""
    files = ["--queries", demo_data / "topics.tsv", "--corpus", demo_data / "collection.tsv", "--index", demo_index]
    plot = ["--qrels", demo_data / "qrels.txt", "--plot", tmp_path / "gains.png"]
    args = ["--model", tiny_t5, *files, *plot, "--max_length", 64, "--top_k", 5, "--output", tmp_path / "run.txt"]
    args += ["--per_query", tmp_path / "values.csv", "--run_tag", "mine", "--format", "csv"]
    old = {name: f"old {name}".encode() for name in ("run.txt", "run.txt.bm25.txt", "gains.png", "values.csv")}
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr("rerank.plot_gains", Mock(side_effect=InputError("no plot")))
        assert error_line(run("rerank.py", *args)) == "error: no plot"
    assert {name: (tmp_path / name).read_bytes() for name in old} == old
    with monkeypatch.context() as patch:
        patch.setattr("rerank.comparison_table", Mock(side_effect=InputError("no table")))
        assert error_line(run("rerank.py", *args)) == "error: no table"
    done = ok(run("rerank.py", *args))
    assert "Reranking: 100%" in done.stderr
    measure, *_ = csv.DictReader(done.stdout.splitlines())
    values = list(csv.DictReader((tmp_path / "values.csv").open()))
    for name in ("first stage", "reranked"):
        of_run = [float(row["nDCG@10"]) for row in values if row["run"] == name]
        assert measure[name] == f"{sum(of_run) / len(of_run):.4f}"
    assert {line.split()[5] for line in (tmp_path / "run.txt").read_text().splitlines()} == {"mine"}
    assert "expected one word, found 'a b'" in error_line(run("rerank.py", *args, "--run_tag", "a b"), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(old)
    assert len(read_run(str(tmp_path / "run.txt.bm25.txt"))) == len(read_run(str(tmp_path / "run.txt")))


def test_a_model_is_checked_before_the_search(separable: Path, tmp_path: Path) -> None:
    files = ["--queries", separable / "topics.tsv", "--corpus", separable / "collection.tsv"]
    index, output = tmp_path / "index", tmp_path / "out.txt"
    (tmp_path / "model").mkdir()
    said = error_line(run("rerank.py", "--model", tmp_path / "model", *files, "--index", index, "--output", output))
    assert "cannot load this model" in said or "config.json" in said
    assert not index.exists()


def test_outputs_that_are_inputs_are_refused(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    for name in ("run.txt", "topics.tsv", "qrels.txt", "collection.tsv"):
        (tmp_path / name).write_bytes((separable / name).read_bytes())
    (tmp_path / "link").symlink_to("run.txt")
    files = ["--queries", "topics.tsv", "--run", "run.txt", "--corpus", "collection.tsv", "--qrels", "qrels.txt"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for outputs, words in (
        (["--output", "topics.tsv"], "--output and --queries"),
        (["--output", "link"], "--output and --run"),
        (["--output", "out", "--plot", "out"], "--plot and --output"),
        (["--output", "out", "--plot", "collection.tsv"], "--plot and --corpus"),
    ):
        refused = run("rerank.py", "--model", tiny_t5, *files, *outputs, cwd=tmp_path)
        assert words in error_line(refused)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_causal_reranker_with_an_instruction(
    separable: Path, tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--model", tiny_qwen3, *dev(separable), "--top_k", 4, "--max_length", 250]
    claim = ["--instruction", "Given a claim, retrieve documents that refute it"]
    output = tmp_path / "run.txt"
    leave_scores([*args, *claim, "--output", output], monkeypatch)
    assert 'instruction "Given a claim' in error_line(run("rerank.py", *args, "--output", output))
    done = ok(run("rerank.py", *args, "--output", output, "--restart"))
    assert "scored with the prompt of qwen3-reranker, logit of 'yes' minus logit of 'no'" in done.stderr
    ok(run("rerank.py", *args, *claim, "--output", tmp_path / "claim.txt"))
    assert read_run(str(output))["0"] != read_run(str(tmp_path / "claim.txt"))["0"]


def test_two_runs_on_one_output_are_refused(long_run: list[object], tiny_t5: Path, tmp_path: Path) -> None:
    with exclusive(str(tmp_path / "run.txt")):
        second = run("rerank.py", "--model", tiny_t5, *long_run, "--output", tmp_path / "run.txt")
        assert "run.txt: another process is writing" in error_line(second)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_write_the_run_of_one(long_run: list[object], tiny_t5: Path, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    args = ["--model", tiny_t5, *long_run]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ok(run("rerank.py", *args, "--output", tmp_path / "one.txt"))
    torch.set_num_threads(threads)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    two = [*torchrun, ROOT / "rerank.py", *args, "--output", tmp_path / "two.txt"]
    done = subprocess.run([*map(str, two)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.txt").read_bytes() == (tmp_path / "two.txt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.txt", "two.txt"]


def test_a_dry_run_counts_and_writes_nothing(long_run: list[object], tiny_t5: Path, tmp_path: Path) -> None:
    done = ok(run("rerank.py", "--model", tiny_t5, *long_run, "--output", tmp_path / "run.txt", "--dry_run"))
    assert not list(tmp_path.iterdir())
    files = {flag: path for flag, path in zip(long_run[::2], long_run[1::2], strict=True)}
    topics = dict(line.split("\t") for line in files["--queries"].read_text().splitlines())
    texts = dict(line.split("\t") for line in files["--corpus"].read_text().splitlines())
    model = load_reranker(str(tiny_t5), max_length=64)
    hits = [line.split() for line in files["--run"].read_text().splitlines()]
    tokens = sum(len(model.encode(topics[hit[0]], texts[hit[2]])[0]) for hit in hits)
    assert f"300 queries, 6,000 pairs, {tokens:,} tokens" in done.stdout


def test_auto_interpolation_uses_the_queries_held_out(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    collection = separable / "collection.tsv"
    texts = dict(line.split("\t") for line in collection.read_text().splitlines())
    data = [
        {"doc_id": i, "doc_text": text, "question": " ".join(text.split()[2:6]), "log_probs": [-1.0]}
        for i, text in list(texts.items())[::5]
    ]
    queries = write_rows(tmp_path / "queries.jsonl", data)
    mining = ["--input", queries, "--output", tmp_path / "t.tsv", "--output_ids", tmp_path / "ids.tsv"]
    index = ["--corpus", collection, "--index", tmp_path / "index"]
    assert "warning" not in ok(run("generate_triples_train.py", *mining, *index, "--holdout", 10)).stderr
    held = rows(tmp_path / "t.tsv.holdout.jsonl")
    assert len(held) == 10
    lines = {int(line.split("\t")[0]) for line in (tmp_path / "ids.tsv").read_text().splitlines()}
    assert lines == set(range(len(data))) - {data.index(row) for row in held}  # no triple has a held-out query
    too_many = run("generate_triples_train.py", *mining, *index, "--holdout", len(data))
    assert "leaves none" in error_line(too_many)

    files = ["--model", tiny_t5, "--queries", separable / "topics.tsv", *index, "--qrels", separable / "qrels.txt"]
    mixing = ["--interpolation_weight", "auto", "--holdout", tmp_path / "t.tsv.holdout.jsonl", "--top_k", 20]
    done = ok(run("rerank.py", *files, *mixing, "--output", tmp_path / "auto.txt", "--max_length", 64))
    assert "nDCG@10 on 10 held-out synthetic queries by interpolation weight: 0: " in done.stderr
    weight = re.search(r"weight ([0-9.]+) \(first stage", done.stdout)[1]
    fixed = ["--interpolation_weight", weight, "--top_k", 20, "--output", tmp_path / "fixed.txt", "--max_length", 64]
    ok(run("rerank.py", *files, *fixed))
    assert (tmp_path / "auto.txt").read_bytes() == (tmp_path / "fixed.txt").read_bytes()
    first = (tmp_path / "fixed.txt.bm25.txt").read_text().splitlines()
    assert first[0].split()[5] == "bm25"

    # The same queries choose a checkpoint.
    # The grade of a source document is 1, whatever the threshold.
    selecting = ["--holdout", tmp_path / "t.tsv.holdout.jsonl", *index, "--select_by", "nDCG@10", "--eval_steps", 1]
    selecting += ["--relevance_threshold", 2]
    quick = ["--max_steps", 3, "--gradient_accumulation_steps", 1, "--learning_rate", 1e-2]
    said = ok(train(separable, tiny_t5, tmp_path / "model", *selecting, *quick)).stderr
    first_stage = re.search(r"by interpolation weight: 0: ([0-9.]+)", done.stderr)[1]  # BM25 alone on these queries
    assert f"first stage: nDCG@10 {first_stage}" in said
    with (tmp_path / "model/results.csv").open() as file:
        results = list(csv.DictReader(file))
    values = [float(row["nDCG@10"]) for row in results]
    assert all(float(row["MRR@10"]) > 0 for row in results)
    assert len(values) == 3
    assert f"model: model of step {1 + values.index(max(values))}" in said
    card = (tmp_path / "model/README.md").read_text()
    assert "Evaluated on t.tsv.holdout.jsonl (synthetic queries held out from training" in card

    # A run of the held-out queries serves like the index.
    first = [["--holdout", tmp_path / "t.tsv.holdout.jsonl"], ["--output", tmp_path / "held.txt", "--hits", 100]]
    write_texts(str(tmp_path / "held.tsv"), [Topic(str(i), row["question"]) for i, row in enumerate(held)])
    ok(run("inpars_lib.bm25", "search", *index[2:], "--topics", tmp_path / "held.tsv", *first[1]))
    with_run = [*mixing, "--holdout_run", tmp_path / "held.txt", "--run", tmp_path / "fixed.txt.bm25.txt"]
    again = ok(run("rerank.py", *files[:4], *index[:2], *with_run, "--output", tmp_path / "x", "--max_length", 64))
    assert re.findall("by interpolation weight.*", again.stderr) == re.findall("by interpolation weight.*", done.stderr)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "auto.txt").read_bytes()
    with_run = [*first[0], "--run", tmp_path / "held.txt", *index[:2], "--select_by", "nDCG@10", "--eval_steps", 1]
    assert (
        f"first stage: nDCG@10 {first_stage}"
        in ok(train(separable, tiny_t5, tmp_path / "run", *with_run, *quick)).stderr
    )
    assert (tmp_path / "run/results.csv").read_bytes() == (tmp_path / "model/results.csv").read_bytes()

    assert "needs --holdout" in error_line(run("rerank.py", *files, *mixing[:2], "--output", tmp_path / "x"), 2)
    assert "from 0 to 1" in error_line(run("rerank.py", *files, *mixing[:1], "2", "--output", tmp_path / "x"), 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2 Q0 p0-0 1 1.0 x\n", "run.txt: the query id 2 is no line of"),
        ("0 Q0 n1-1 1 1.0 x\n", "run.txt: no source document of"),
        ("", "run.txt: no usable line found"),
        ("0 Q0 p0-0 1 1.0 x\n", "1 of 2 queries have no hits. Their measures count as 0."),
    ],
)
@pytest.mark.parametrize("script", ["train_t5.py", "rerank.py"])
def test_runs_of_held_out_queries(
    separable: Path, tiny_t5: Path, tmp_path: Path, script: str, text: str, words: str
) -> None:
    (tmp_path / "run.txt").write_text(text)
    held = [{"doc_id": f"p{i}-0", "doc_text": "x", "question": "what are tides", "log_probs": [-1]} for i in range(2)]
    corpus = ["--corpus", separable / "collection.tsv", "--holdout", write_rows(tmp_path / "held.jsonl", held)]
    if script == "train_t5.py":
        done = train(separable, tiny_t5, tmp_path / "model", *corpus, "--run", tmp_path / "run.txt", *QUICK)
    else:
        args = ["--holdout_run", tmp_path / "run.txt", "--max_length", 64, *dev(separable)[:-2], *corpus]
        auto = ["--interpolation_weight", "auto"]
        done = run(script, "--model", tiny_t5, *args, *auto, "--output", tmp_path / "out.txt")
        refused = run(script, "--model", tiny_t5, *args, "--output", tmp_path / "out.txt")
        assert "--holdout_run needs --interpolation_weight auto" in error_line(refused, 2)
    assert words in done.stderr
    assert (done.returncode == 0) == ("count as 0" in words)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.txt", "q1 Q0 a 1 1.0 x\n", "no hits for any"),  # other query ids
        (
            "run.txt",
            "1 Q0 ug7v899j 1 1.0 x\n1 Q0 p1-1 2 0.5 x\n",
            "1 of the 2 documents",
        ),  # the query ids are equal by chance
        ("run.txt", "1\ta\n", "run.txt: this file seems to hold lines `id<TAB>text`"),
        ("qrels.txt", "q1 0 a 1\n", "is judged here"),
        ("topics.tsv", "1\tone\n1\ttwo\n", "query id 1"),
        ("collection.tsv", "x\tother\n", "are not in this collection"),
    ],
)
@pytest.mark.parametrize("script", ["train_t5.py", "rerank.py"])
def test_files_that_do_not_belong_together(
    separable: Path, tiny_t5: Path, tmp_path: Path, script: str, name: str, text: str, words: str
) -> None:
    files = dev_but(separable, tmp_path, name, text)
    if script == "train_t5.py":
        done = train(separable, tiny_t5, tmp_path / "model", *files)
    else:
        done = run(script, "--model", tiny_t5, *files, "--output", tmp_path / "out.txt")
    assert words in error_line(done)
    assert not list(tmp_path.glob("model/*"))
    assert not (tmp_path / "out.txt").exists()


def test_usage_errors(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    args = ["--queries", separable / "topics.tsv", "--corpus", separable / "collection.tsv", "--output", tmp_path / "o"]
    assert "--run or --index is required" in error_line(run("rerank.py", "--model", tiny_t5, *args), 2)
    no_model = run("rerank.py", "--model", tmp_path / "absent", *args, "--run", separable / "run.txt")
    assert f"{tmp_path / 'absent'}" in error_line(no_model)


def test_only_judged_queries(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    few = "".join(line for line in (separable / "qrels.txt").open() if line[0] in "34")
    args = ["--model", tiny_t5, *dev_but(separable, tmp_path, "qrels.txt", few), "--max_length", 64]
    done = ok(run("rerank.py", *args, "--output", tmp_path / "all.txt"))
    assert "qrels.txt: 2 of 10 queries are judged; --judged_only reranks only these" in done.stderr
    ok(run("rerank.py", *args, "--output", tmp_path / "judged.txt", "--judged_only"))
    # Other batches round differently, so the scores are equal up to the last digits only.
    everything, judged = (read_run(str(tmp_path / name)) for name in ("all.txt", "judged.txt"))
    assert judged.keys() == {"3", "4"}
    for query_id, hits in judged.items():
        scores = {hit.doc_id: hit.score for hit in everything[query_id]}
        assert {hit.doc_id: hit.score for hit in hits} == pytest.approx(scores, abs=1e-4)
