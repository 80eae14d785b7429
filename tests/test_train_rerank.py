"""Stages 4 and 5: a tiny T5 and a tiny encoder learn a set that can be learned, and rerank it."""

import base64
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SUBJECTS, QuietHandler, ok, rows, run, save_t5, sentence, serve, write_rows
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from formats import Qrel, ScoredDoc, Triples
from models import load_model
from rerank import choose_weight, interpolate
from train_t5 import Examples, StepsByLength

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


def test_the_model_has_a_card(trained: Path, separable: Path) -> None:
    card = ModelCard.load(trained / "README.md")
    assert card.data.pipeline_tag == "text-ranking"
    assert "inpars" in card.data.tags
    digest = hashlib.sha256((separable / "triples.tsv").read_bytes()).hexdigest()
    assert f"| triples_train | triples.tsv | `{digest}` |" in card.text
    assert "| learning_rate | 0.005 |" in card.text
    with (trained / "results.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert f"those of step {last['step']}, the last" in card.text
    assert f"| MRR@10 | 0.2500 | {float(last['MRR@10']):.4f} |" in card.text
    assert str(separable) not in card.content  # nobody's folders


def test_positives_against_negatives(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    args = ["--max_steps", 30, "--learning_rate", 5e-3, "--gradient_accumulation_steps", 2, "--logging_steps", 5]
    ok(train(separable, tiny_t5, tmp_path / "model", *dev(separable), *args, "--loss", "pairwise"))
    with (tmp_path / "model/results.csv").open() as file:
        [row] = csv.DictReader(file)
    assert float(row["loss"]) < 0.3  # 0.69 as it came
    assert float(row["nDCG@10"]) > 0.8
    examples = Examples(Triples(str(separable / "triples.tsv")))
    order = list(StepsByLength(examples, 16, seed=1, in_pairs=True))
    assert sorted(order) == list(range(len(examples)))
    assert all(negative == positive + 1 for positive, negative in zip(order[::2], order[1::2], strict=True))
    apart = list(StepsByLength(examples, 16, seed=1))
    assert all(sorted(order[i : i + 16]) == sorted(apart[i : i + 16]) for i in range(0, len(order), 16))


def test_the_best_checkpoint_is_kept(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """Judged by the negatives, each step of training is a loss: the first evaluation stays the best."""
    files = change(separable, tmp_path, "qrels.txt", (separable / "qrels.txt").read_text().replace(" p", " n"))
    args = ["--max_steps", 60, "--learning_rate", 5e-3, "--gradient_accumulation_steps", 2, "--eval_steps", 10]
    selecting = ["--select_by", "MRR@10", "--early_stopping_patience", 2, "--relevance_threshold", 1]
    ok(train(separable, tiny_t5, tmp_path / "model", *files, *args, *selecting))
    with (tmp_path / "model/results.csv").open() as file:
        results = [(float(row["MRR@10"]), int(row["step"])) for row in csv.DictReader(file)]
    value, best = max(results, key=lambda row: (row[0], -row[1]))
    assert best + 20 == results[-1][1] < 60  # stopped after two that were no better
    folders = ("", f"checkpoint-{best}", f"checkpoint-{best + 20}")
    kept, same, last = (load_file(tmp_path / "model" / folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(kept[name], same[name]) for name in same)
    assert not all(torch.equal(kept[name], last[name]) for name in last)
    card = (tmp_path / "model/README.md").read_text()
    assert f"those of step {best}, the best by MRR@10" in card
    assert f"| MRR@10 | 1.0000 | {value:.4f} |" in card


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
    """Killed in the middle, then gone on with: the same weights and figures as a run that nothing happened to."""
    args = ["--max_steps", 12, "--gradient_accumulation_steps", 1, "--save_every_n_steps", 4, "--logging_steps", 3]
    args += [*dev(separable), "--eval_steps", 2]
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
    for name in ("results.csv", "learning_curve.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_further_flags_are_the_trainers(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    quick = ["--max_steps", 2, "--gradient_accumulation_steps", 1]
    more = ["--optim", "adafactor", "--gradient_checkpointing", "True", "--save_total_limit=1", "--save_steps", 1]
    ok(train(separable, tiny_t5, tmp_path / "model", *quick, *more))
    [checkpoint] = (tmp_path / "model").glob("checkpoint-*")  # of two, as the flag asks
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert any("exp_avg_sq_row" in values for values in state["state"].values())  # Adafactor's alone
    unknown = train(separable, tiny_t5, tmp_path / "none", *quick, "--learning_rat", 1)
    assert "--learning_rat is neither a flag of this script nor one of" in sentence(unknown, 2)
    selecting = ["--select_by", "MAP", "--eval_steps", 2, "--save_steps", 3]
    refused = train(separable, tiny_t5, tmp_path / "none", *quick, *dev(separable), *selecting)
    assert "refuses these flags together: --load_best_model_at_end requires" in sentence(refused)


def test_the_finished_model_alone_is_pushed(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """--output_dir may be a folder of data, as in the paper's command, and a key must not end in a file."""
    pushed: dict[str, bytes] = {}
    asked: list[str] = []

    class Hub(QuietHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            status, answer = 200, {}
            if self.headers["Authorization"] != "Bearer hf_right":
                status, answer = 401, {"error": "Invalid username or password."}
            elif self.path == "/api/repos/create":
                answer = {"url": f"{url}/somebody/reranker", "name": "somebody/reranker"}
            elif self.path.endswith("/commit/main") and asked.count(self.path) == 1:
                status, answer = 403, {"error": "Your storage is full."}
            elif self.path.endswith("/preupload/main"):
                names = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
            elif self.path.endswith("/commit/main"):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        pushed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                answer = {"commitUrl": f"{url}/somebody/reranker/commit/{'0' * 40}", "commitOid": "0" * 40}
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    output = tmp_path / "model"
    output.mkdir()
    (output / "collection.tsv").write_text("1\tnobody's business\n")
    with serve(Hub) as url:
        env = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        command = ["train_t5.py", "--base_model", tiny_t5, "--triples_train", separable / "triples.tsv"]
        command += ["--output_dir", output, "--max_steps", 2, "--gradient_accumulation_steps", 1, "--max_length", 64]
        command += ["--save_every_n_steps", 1, "--push_to_hub", "True", "--hub_model_id", "somebody/reranker"]
        said = sentence(run(*command, "--hub_token", "hf_wrong", **env))
        assert "--push_to_hub: somebody/reranker cannot be made" in said
        assert "401" in said
        assert not list(output.glob("checkpoint-*"))
        said = sentence(run(*command, "--hub_token", "hf_right", **env))
        assert "could not be pushed to somebody/reranker" in said
        assert "Your storage is full." in said
        assert (output / "config.json").exists()
        pasted = "hf_right\n"
        done = ok(run(*command, "--hub_token", pasted, "--resume_from_checkpoint", **env))
    assert f"{url}/somebody/reranker/commit/" in done.stderr
    made = {path.name for path in output.iterdir() if path.is_file()}
    assert pushed.keys() == made - {"collection.tsv"} > {"README.md", "config.json", "model.safetensors"}
    assert all(content == (output / name).read_bytes() for name, content in pushed.items())
    assert sum(path.endswith("/commit/main") for path in asked) == 2  # the one that was refused, and this
    files = [path for path in output.rglob("*") if path.is_file()]
    assert not any(b"hf_right" in path.read_bytes() for path in files)
    assert "hf_right" not in done.stdout + done.stderr


def test_two_processes_train_as_one_does(separable: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """torchrun: the accumulation is shared, so that a step has the same examples; the run to rerank is shared too."""
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


def test_a_step_has_the_examples_of_its_triples_longest_first(tmp_path: Path) -> None:
    triples = [(f"q{i}", "positive " * (i % 7 + 1), "negative " * (i % 5 + 1)) for i in range(20)]
    (tmp_path / "t.tsv").write_text("".join("\t".join(triple) + "\n" for triple in triples))
    examples = Examples(Triples(str(tmp_path / "t.tsv")))
    sampler = StepsByLength(examples, examples_a_step=16, seed=1)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert order == list(sampler)  # what a run that goes on needs
        assert sorted(order) == list(range(40)) == sorted(range(len(sampler)))
        for start in (0, 16, 32):
            step = [examples[i] for i in order[start : start + 16]]
            assert sum(relevant for *_, relevant in step) == len(step) / 2
            lengths = [len(query + text) for query, text, _ in step]
            assert lengths == sorted(lengths, reverse=True)
            assert all(relevant == text.startswith("positive") for _, text, relevant in step)
        epochs.append(order)
    assert set(epochs[0][:16]) != set(epochs[1][:16])  # other steps in another epoch


# --------------------------------------------------------------------------- a run that is shared, stopped and goes on


@pytest.fixture(scope="session")
def long_run(separable: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """1,000 queries of 20 documents each: 77 blocks of 260 pairs."""
    folder = tmp_path_factory.mktemp("long")
    topics = [line.split("\t") for line in (separable / "topics.tsv").read_text().splitlines()]
    hits = [line.split() for line in (separable / "run.txt").read_text().splitlines()]
    with (folder / "topics.tsv").open("w") as file:
        file.writelines(f"{q}-{i}\t{text} {i}\n" for i in range(100) for q, text in topics)
    with (folder / "run.txt").open("w") as file:
        file.writelines(" ".join([f"{hit[0]}-{i}", *hit[1:]]) + "\n" for i in range(100) for hit in hits)
    files = ["--queries", folder / "topics.tsv", "--run", folder / "run.txt"]
    return [*files, "--corpus", separable / "collection.tsv", "--max_length", 64]


def blocks(scores: Path) -> int:
    return max(0, scores.read_bytes().count(b"\n") - 1) if scores.exists() else 0


def kill_after(command: list[object], scores: Path, finished: int) -> None:
    """Start a run and kill it when so many of its blocks are finished."""
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and blocks(scores) < finished:
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_kills_do_not_change_a_run(long_run: list[object], tiny_t5: Path, tmp_path: Path) -> None:
    """SIGKILL after some blocks, several times over. `KILLS=20 bash run_tests.sh -k kills` for more."""
    ok(run("rerank.py", "--model", tiny_t5, *long_run, "--output", tmp_path / "whole.txt"))
    scores = tmp_path / "run.txt.scores.0.jsonl"
    args = ["--model", tiny_t5, *long_run, "--output", tmp_path / "run.txt"]
    for kill in range(int(os.environ.get("KILLS", 3))):
        kill_after([sys.executable, ROOT / "rerank.py", *args], scores, blocks(scores) + 1)
        assert not (tmp_path / "run.txt").exists()
        if kill % 2:
            with scores.open("a") as file:
                file.write('{"block": 99, "scor')  # torn
    finished = blocks(scores)
    done = ok(run("rerank.py", *args))
    assert (tmp_path / "run.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()
    assert not scores.exists()
    percent = int(re.search(r"Reranking: +([0-9]+)%", done.stderr)[1])  # where it began
    assert percent >= int(100 * finished / 79) > 0


def test_scores_of_another_model_are_not_taken_over(
    separable: Path, long_run: list[object], tiny_t5: Path, tmp_path: Path
) -> None:
    other = save_t5(tmp_path / "other", (separable / "triples.tsv").read_text().splitlines()[:50])
    for model, name in ((tiny_t5, "one.txt"), (other, "two.txt")):
        ok(run("rerank.py", "--model", model, *long_run, "--output", tmp_path / name))
    assert (tmp_path / "one.txt").read_bytes() != (tmp_path / "two.txt").read_bytes()
    command = [sys.executable, ROOT / "rerank.py", "--model", other, *long_run, "--output", tmp_path / "run.txt"]
    kill_after(command, tmp_path / "run.txt.scores.0.jsonl", 5)
    ok(run("rerank.py", "--model", tiny_t5, *long_run, "--output", tmp_path / "run.txt"))
    assert (tmp_path / "run.txt").read_bytes() == (tmp_path / "one.txt").read_bytes()


def test_two_processes_write_the_run_of_one(long_run: list[object], tiny_t5: Path, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    args = ["--model", tiny_t5, *long_run]
    one = [sys.executable, ROOT / "rerank.py", *args, "--output", tmp_path / "one.txt"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    two = [*torchrun, ROOT / "rerank.py", *args, "--output", tmp_path / "two.txt"]
    for command in (one, two):
        done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.txt").read_bytes() == (tmp_path / "two.txt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.txt", "two.txt"]


def test_a_dry_run_counts_and_writes_nothing(long_run: list[object], tiny_t5: Path, tmp_path: Path) -> None:
    done = ok(run("rerank.py", "--model", tiny_t5, *long_run, "--output", tmp_path / "run.txt", "--dry_run"))
    assert not list(tmp_path.iterdir())
    files = {flag: path for flag, path in zip(long_run[::2], long_run[1::2], strict=True)}
    topics = dict(line.split("\t") for line in files["--queries"].read_text().splitlines())
    texts = dict(line.split("\t") for line in files["--corpus"].read_text().splitlines())
    model = load_model(str(tiny_t5), max_length=64)
    hits = [line.split() for line in files["--run"].read_text().splitlines()]
    tokens = sum(len(model.encode(topics[hit[0]], texts[hit[2]])[0]) for hit in hits)
    assert f"1,000 queries, 20,000 pairs, {tokens:,} tokens" in done.stdout


# -------------------------------------------------------------------------------------------------------- interpolation


def test_mixed_scores() -> None:
    hits = [ScoredDoc("q", "a", 30.0), ScoredDoc("q", "b", 20.0), ScoredDoc("q", "c", 10.0), ScoredDoc("q", "d", 5.0)]
    scores = {"a": -3.0, "b": -1.0, "c": -2.0}  # d was not reranked
    assert interpolate(hits, scores, 1.0) == scores
    step = (3 / 2) ** 0.5  # three values at equal distances, standardised
    assert interpolate(hits, scores, 0.0) == pytest.approx({"a": step, "b": 0, "c": -step})
    assert interpolate(hits, scores, 0.5) == pytest.approx({"a": 0, "b": step / 2, "c": -step / 2})
    assert interpolate(hits[:1], {"a": -3.0}, 0.5) == {"a": 0.0}  # nothing to compare with


def test_the_weight_is_chosen_where_the_source_documents_come_first() -> None:
    run = {q: [ScoredDoc(q, "a", 3.0), ScoredDoc(q, "b", 2.0), ScoredDoc(q, "c", 1.0)] for q in ("1", "2")}
    against = {q: {"a": -3.0, "b": -2.0, "c": -1.0} for q in run}
    source = [Qrel("1", "a", 1), Qrel("2", "a", 1)]
    assert choose_weight(run, against, source) == 0.4  # up to here the first stage's order holds
    assert choose_weight(run, against, [Qrel("1", "c", 1), Qrel("2", "c", 1)]) == 1.0


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
    assert "left out" not in ok(run("generate_triples_train.py", *mining, *index, "--holdout", 10)).stderr
    held = rows(tmp_path / "t.tsv.holdout.jsonl")
    assert len(held) == 10
    lines = {int(line.split("\t")[0]) for line in (tmp_path / "ids.tsv").read_text().splitlines()}
    assert lines == set(range(len(data))) - {data.index(row) for row in held}  # and no triple is of those
    too_many = run("generate_triples_train.py", *mining, *index, "--holdout", len(data))
    assert "leaves none" in sentence(too_many)

    files = ["--model", tiny_t5, "--queries", separable / "topics.tsv", *index, "--qrels", separable / "qrels.txt"]
    mixing = ["--interpolation_weight", "auto", "--holdout", tmp_path / "t.tsv.holdout.jsonl", "--top_k", 20]
    done = ok(run("rerank.py", *files, *mixing, "--output", tmp_path / "auto.txt", "--max_length", 64))
    assert "nDCG@10 of 10 held-out synthetic queries by weight: 0: " in done.stderr
    weight = re.search(r"weight ([0-9.]+) beside the first stage's", done.stdout)[1]
    fixed = ["--interpolation_weight", weight, "--top_k", 20, "--output", tmp_path / "fixed.txt", "--max_length", 64]
    ok(run("rerank.py", *files, *fixed))
    assert (tmp_path / "auto.txt").read_bytes() == (tmp_path / "fixed.txt").read_bytes()
    first = (tmp_path / "fixed.txt.bm25.txt").read_text().splitlines()
    assert first[0].split()[5] == "bm25"

    # The same queries choose a checkpoint.
    selecting = ["--holdout", tmp_path / "t.tsv.holdout.jsonl", *index, "--select_by", "nDCG@10", "--eval_steps", 1]
    quick = ["--max_steps", 3, "--gradient_accumulation_steps", 1, "--learning_rate", 1e-2]
    said = ok(train(separable, tiny_t5, tmp_path / "model", *selecting, *quick)).stderr
    first_stage = re.search(r"by weight: 0: ([0-9.]+)", done.stderr)[1]  # BM25 alone on these queries
    assert f"first stage: nDCG@10 {first_stage}" in said
    with (tmp_path / "model/results.csv").open() as file:
        values = [float(row["nDCG@10"]) for row in csv.DictReader(file)]
    assert len(values) == 3
    assert f"model: the model of step {1 + values.index(max(values))}" in said
    card = (tmp_path / "model/README.md").read_text()
    assert "Evaluated on t.tsv.holdout.jsonl, synthetic queries kept from training" in card

    assert "needs --holdout" in sentence(run("rerank.py", *files, *mixing[:2], "--output", tmp_path / "x"), 2)
    assert "from 0 to 1" in sentence(run("rerank.py", *files, *mixing[:1], "2", "--output", tmp_path / "x"), 2)


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
    chosen = train(separable, tiny_t5, output, "--select_by", "MRR@10")
    assert "--select_by needs an evaluation" in sentence(chosen, 2)
    held = train(separable, tiny_t5, output, *dev(separable), "--holdout", "x", "--index", "y")
    assert "--holdout needs --index and --corpus, and no other" in sentence(held, 2)
    impatient = train(separable, tiny_t5, output, *dev(separable), "--early_stopping_patience", 2)
    assert "needs --select_by" in sentence(impatient, 2)
    assert "pip install wandb" in sentence(train(separable, tiny_t5, output, "--report_to", "wandb"), 2)
    (tmp_path / "t.tsv").write_text("only one column\n")
    no_triples = run("train_t5.py", "--triples_train", tmp_path / "t.tsv", "--output_dir", output)
    assert "t.tsv: not one usable line" in sentence(no_triples)
    args = ["--queries", separable / "topics.tsv", "--corpus", separable / "collection.tsv", "--output", tmp_path / "o"]
    assert "one of --run and --index is needed" in sentence(run("rerank.py", "--model", tiny_t5, *args), 2)
    no_model = run("rerank.py", "--model", tmp_path / "absent", *args, "--run", separable / "run.txt")
    assert "cannot load the model" in sentence(no_model)
