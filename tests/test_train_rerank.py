"""Stages 4 and 5: a tiny T5 and a tiny encoder learn a set that can be learned, and rerank it."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SUBJECTS, ok, run, sentence

DEV_FILES = {"--queries": "topics.tsv", "--qrels": "qrels.txt", "--run": "run.txt", "--corpus": "collection.tsv"}


def dev(separable: Path) -> list[object]:
    return [word for flag, name in DEV_FILES.items() for word in (flag, separable / name)]


def train(separable: Path, base: Path, output: Path, *args: object, **environment: str) -> subprocess.CompletedProcess:
    required = ["--base_model", base, "--triples_train", separable / "triples.tsv", "--output_dir", output]
    return run("train_t5.py", *required, "--max_length", 64, *args, **environment)


@pytest.fixture(scope="module", params=["t5", "encoder"])
def trained(request, separable: Path, tiny_t5: Path, tiny_encoder: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp(request.param) / "model"
    base = tiny_t5 if request.param == "t5" else tiny_encoder
    args = ["--max_steps", 60, "--learning_rate", 5e-3, "--gradient_accumulation_steps", 2, "--eval_steps", 20]
    args += ["--save_every_n_steps", 40, "--logging_steps", 5, "--relevance_threshold", 2]
    ok(train(separable, base, output, *dev(separable), *args))
    return output


def test_it_learns(trained: Path) -> None:
    with (trained / "results.csv").open() as file:
        results = list(csv.DictReader(file))
    assert [int(row["step"]) for row in results] == [20, 40, 60]
    assert list(results[0]) == ["step", "epoch", "loss", "nDCG@10", "nDCG@20", "MRR@10", "MAP", "P@20", "R@1000"]
    state = json.loads((trained / "checkpoint-60/trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert float(results[-1]["nDCG@10"]) > 0.8  # 0.5 as it came; the grades 1 and 2 look alike
    assert float(results[-1]["P@20"]) == pytest.approx(0.25)  # 5 of the first 20 have grade 2
    assert (trained / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not (trained / "unfinished").exists()


def test_reranking_puts_positives_first(trained: Path, separable: Path, tmp_path: Path) -> None:
    output = tmp_path / "run.txt"
    done = ok(
        run("rerank.py", "--model", trained, *dev(separable), "--output", output, "--top_k", 12, "--max_length", 64)
    )
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
        # Those beyond --top_k keep their order below.
        assert doc_ids[12:] == [f"{kind}{query_id}-{j}" for j in range(6, 10) for kind in "np"]
        assert scores[query_id] == sorted(scores[query_id], reverse=True)
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if "@" in line or "MAP" in line}
    assert set(table) == {"nDCG@10", "nDCG@20", "MRR@10", "MAP", "P@20", "R@1000"}
    first, reranked, change, p, won, tied, lost = map(float, table["MRR@10"])
    assert (first, reranked, change, won, tied, lost) == (0.5, 1.0, 0.5, 10, 0, 0)
    assert p < 0.05
    assert list(map(float, table["R@1000"])) == [1, 1, 0, 1, 0, 10, 0]


def test_the_table_agrees_with_ir_measures(trained: Path, separable: Path, tmp_path: Path) -> None:
    import ir_measures
    from ir_measures import AP, RR, nDCG

    output = tmp_path / "run.txt"
    args = ["--model", trained, *dev(separable), "--output", output, "--relevance_threshold", 2, "--max_length", 64]
    said = ok(run("rerank.py", *args)).stdout
    table = {line.split()[0]: line.split()[2] for line in said.splitlines() if "@" in line or "MAP" in line}
    qrels = list(ir_measures.read_trec_qrels(str(separable / "qrels.txt")))
    measures = {"nDCG@10": nDCG @ 10, "MRR@10": RR(rel=2) @ 10, "MAP": AP(rel=2)}
    values = ir_measures.calc_aggregate(list(measures.values()), qrels, ir_measures.read_trec_run(str(output)))
    for name, measure in measures.items():
        assert float(table[name]) == pytest.approx(values[measure], abs=1e-4)


def test_a_kill_and_going_on(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """Killed in the middle, then gone on with: the same weights as a run that nothing happened to."""
    import torch
    from safetensors.torch import load_file

    args = ["--max_steps", 12, "--gradient_accumulation_steps", 1, "--save_every_n_steps", 4, "--logging_steps", 1]
    ok(train(separable, tiny_t5, tmp_path / "whole", *args))
    command = [sys.executable, ROOT / "train_t5.py", "--triples_train", separable / "triples.tsv", *args]
    command += ["--base_model", tiny_t5, "--max_length", 64, "--output_dir", tmp_path / "killed"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "killed/checkpoint-4/trainer_state.json"
    while not (state.exists() and state.read_text().endswith("}\n")):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    # What a kill in the middle of saving leaves: no trainer_state.json yet.
    torn = tmp_path / "killed" / "checkpoint-999"
    shutil.copytree(tmp_path / "killed/checkpoint-4", torn)
    (torn / "trainer_state.json").unlink()
    assert "has checkpoints of an earlier run" in sentence(train(separable, tiny_t5, tmp_path / "killed", *args))
    said = ok(train(separable, tiny_t5, tmp_path / "killed", *args, "--resume_from_checkpoint")).stderr
    assert "going on from" in said
    assert "checkpoint-999" not in said
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_train_as_one_does(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """torchrun: the accumulation is shared, so that a step has the same examples; the run to rerank is shared too."""
    import torch
    from safetensors.torch import load_file

    args = ["--base_model", tiny_t5, "--triples_train", separable / "triples.tsv", "--max_length", 64, "--max_steps", 4]
    args += ["--gradient_accumulation_steps", 4, "--eval_steps", 4, "--logging_steps", 1, *dev(separable)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    command = [*torchrun, ROOT / "train_t5.py", *args, "--output_dir", tmp_path / "two"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ok(run("train_t5.py", *args, "--output_dir", tmp_path / "one"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    before = load_file(tiny_t5 / "model.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=0)
    assert any((one[name] - before[name]).abs().max() > 1e-3 for name in one)
    with (tmp_path / "two" / "results.csv").open() as file:
        [row] = csv.DictReader(file)
    assert float(row["R@1000"]) == 1.0  # every query was scored by one of the two
    command[command.index("--gradient_accumulation_steps") + 1] = 3
    command[-1] = tmp_path / "three"
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    assert "cannot be shared among 2 processes" in done.stderr


# ------------------------------------------------------------------------------------------------ one sentence each


def change(separable: Path, tmp_path: Path, name: str, text: str) -> list[object]:
    """The development set with one of its files replaced."""
    (tmp_path / name).write_text(text)
    return [tmp_path / name if isinstance(word, Path) and word.name == name else word for word in dev(separable)]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.txt", "q1 Q0 a 1 1.0 x\n", "has hits for"),  # other queries
        (
            "run.txt",
            "1 Q0 ug7v899j 1 1.0 x\n1 Q0 p1-1 2 0.5 x\n",
            "1 of the 2 documents",
        ),  # the ids of queries meet by chance
        ("run.txt", "1\ta\n", "not one usable line"),
        ("qrels.txt", "q1 0 a 1\n", "judges no query of"),
        ("topics.tsv", "1\tone\n1\ttwo\n", "the query id 1 was there before"),
        ("collection.tsv", "x\tother\n", "are not in"),
    ],
)
@pytest.mark.parametrize("script", ["train_t5.py", "rerank.py"])
def test_files_that_do_not_belong_together(
    separable: Path, tiny_t5: Path, tmp_path: Path, script: str, name: str, text: str, words: str
) -> None:
    files = change(separable, tmp_path, name, text)
    if script == "train_t5.py":
        done = train(separable, tiny_t5, tmp_path / "model", *files)
    else:
        done = run(script, "--model", tiny_t5, *files, "--output", tmp_path / "out.txt")
    assert words in sentence(done)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "out.txt").exists()


def test_usage_errors(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    needs_all = train(separable, tiny_t5, output, "--qrels", separable / "qrels.txt")
    assert "evaluation needs all of" in sentence(needs_all, 2)
    odd = train(separable, tiny_t5, output, "--per_device_train_batch_size", 3)
    assert "is even" in sentence(odd, 2)
    no_checkpoint = train(separable, tiny_t5, output, "--resume_from_checkpoint", tmp_path)
    assert "is no whole checkpoint" in sentence(no_checkpoint)
    (tmp_path / "t.tsv").write_text("only one column\n")
    no_triples = run("train_t5.py", "--triples_train", tmp_path / "t.tsv", "--output_dir", output)
    assert "t.tsv: not one usable line" in sentence(no_triples)
    args = ["--queries", separable / "topics.tsv", "--corpus", separable / "collection.tsv", "--output", tmp_path / "o"]
    assert "one of the arguments --run --index" in sentence(run("rerank.py", "--model", tiny_t5, *args), 2)
    no_model = run("rerank.py", "--model", tmp_path / "absent", *args, "--run", separable / "run.txt")
    assert "cannot load the model" in sentence(no_model)
