"""All five stages, on real text with a real language model and real Lucene."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, error_line, ok, rows, run, run_process, save_t5
from stand_in import StandIn, completion


def test_from_a_collection_to_a_table(demo_data: Path, llm_url: str, tmp_path: Path) -> None:
    collection, work = demo_data / "collection.tsv", tmp_path
    generate = [
        "--collection",
        collection,
        "--output",
        work / "queries.jsonl",
        "--base_url",
        llm_url,
        "--engine",
        "any",
    ]
    short = ["--truncate_doc_chars", 100, "--max_tokens", 20]  # most of the time is the language model's
    ok(run("generate_queries_openai.py", *generate, *short, "--max_examples", 4))
    filtering = ["--input", work / "queries.jsonl", "--output", work / "filtered.jsonl", "--top_k", 3]
    ok(run("filter_queries_by_score.py", *filtering))
    assert [row["score"] for row in rows(work / "filtered.jsonl")] == sorted(
        (row["score"] for row in rows(work / "filtered.jsonl")), reverse=True
    )
    mining = ["--input", work / "filtered.jsonl", "--output", work / "triples.tsv", "--output_ids", work / "ids.tsv"]
    ok(run("generate_triples_train.py", *mining, "--corpus", collection, "--index", work / "index", "--n_samples", 2))
    assert len((work / "triples.tsv").read_text().splitlines()) == 6

    base = save_t5(work / "base", collection.read_text().splitlines()[:100])
    training = ["--base_model", base, "--triples_train", work / "triples.tsv", "--output_dir", work / "model"]
    training += ["--max_steps", 2, "--gradient_accumulation_steps", 1, "--max_length", 128]
    ok(run("train_t5.py", *training))
    judged = ["--queries", demo_data / "topics.tsv", "--qrels", demo_data / "qrels.txt", "--corpus", collection]
    reranking = ["--model", work / "model", *judged, "--index", work / "index", "--output", work / "run.txt"]
    done = ok(run("rerank.py", *reranking, "--top_k", 10, "--max_length", 128))
    assert "20 judged queries" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("R@1000")
    assert len({line.split()[0] for line in (work / "run.txt").read_text().splitlines()}) == 20


@pytest.mark.parametrize("documents", ["many", "0", "-5", "1.5", "6,000"])
def test_the_demo_refuses_a_wrong_number_of_documents(documents: str) -> None:
    command = ["bash", str(ROOT / "run_demo.sh")]
    done = subprocess.run(command, env={**os.environ, "DEMO_DOCUMENTS": documents}, capture_output=True, text=True)
    assert done.returncode == 2
    expected = f"error: DEMO_DOCUMENTS is '{documents}'. Set it to a number of documents, such as 6000.\n"
    assert (done.stdout, done.stderr) == ("", expected)


@pytest.mark.parametrize("settings", [None, "settings 2, 600 documents\n", "settings 3, 800 documents\n"])
def test_the_demo_refuses_a_folder_of_other_settings(settings: str | None, tmp_path: Path) -> None:
    """Finished stages are skipped, so files of other settings would give a mixed result."""
    for name in ("run_demo.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("work*"))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    work = tmp_path / "demo/work"
    work.mkdir()
    (work / "collection.tsv").touch()
    if settings:
        (work / "settings.txt").write_text(settings)
    done = subprocess.run(["bash", str(tmp_path / "run_demo.sh")], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: demo/work was made with other settings. Move or delete this folder.\n"


GENERATE = """--collection data/msmarco/collection.tsv --output data/msmarco/synthetic_queries.jsonl --engine curie"""
FILTER = """--input data/msmarco/synthetic_queries.jsonl --output data/msmarco/filtered_synthetic_queries.jsonl
    --top_k 10000 --scoring_function mean_log_probs"""
TRIPLES = """--input data/msmarco/filtered_synthetic_queries.jsonl --output data/msmarco/synthetic.triples.train.tsv
    --output_ids data/msmarco/synthetic.triples.train.ids.tsv --corpus data/msmarco/collection.tsv
    --index msmarco-passage"""
TRAIN = """--base_model t5_base --corpus data/msmarco/collection.tsv
    --triples_train data/msmarco/synthetic.triples.train.tsv
    --queries data/msmarco/topics.msmarco-passage.dev-subset.txt
    --qrels data/msmarco/qrels.msmarco-passage.dev-subset.txt
    --run data/msmarco/run.beir-v1.0.0-trec-covid-flat.trec --relevance_threshold 2 --output_dir data/msmarco/
    --save_every_n_steps 156 --eval_steps 156 --max_eval_queries 54 --max_eval_docs_per_query 1000"""


@pytest.mark.slow
def test_the_papers_commands_as_printed(
    demo_data: Path, openai_server: StandIn, hub: dict[str, str], tmp_path: Path
) -> None:
    """A small collection replaces MS MARCO, and an index of it has the name of Pyserini's prebuilt one."""
    folder = tmp_path / "data" / "msmarco"
    folder.mkdir(parents=True)
    judged = [line.split() for line in (demo_data / "qrels.txt").read_text().splitlines()]
    relevant = {doc_id for _, _, doc_id, _ in judged}
    lines = (demo_data / "collection.tsv").read_text().splitlines(keepends=True)
    lines = [line for i, line in enumerate(lines) if i % 6 == 0 or line.split("\t")[0] in relevant]
    (folder / "collection.tsv").write_text("".join(lines))
    (folder / "topics.msmarco-passage.dev-subset.txt").write_bytes((demo_data / "topics.tsv").read_bytes())
    (folder / "qrels.msmarco-passage.dev-subset.txt").write_bytes((demo_data / "qrels.txt").read_bytes())
    trec_covid = folder / "run.beir-v1.0.0-trec-covid-flat.trec"
    trec_covid.write_text("1 Q0 ug7v899j 1 9.5 Anserini\n2 Q0 02tnwd4m 1 9.4 Anserini\n")

    # OpenAI no longer serves curie. A server that does may be asked for a model of this name.
    server = {"OPENAI_BASE_URL": openai_server.url, "API_KEY": "sk-test"}
    assert "--engine curie: OpenAI shut down" in error_line(
        run("generate_queries_openai.py", *GENERATE.split(), cwd=tmp_path)
    )
    openai_server.respond = lambda request: (404, {"error": {"message": "deprecated", "code": "model_not_found"}})
    gone = run("generate_queries_openai.py", *GENERATE.split(), cwd=tmp_path, **server)
    assert "--engine curie: OpenAI shut down" in error_line(gone)
    # The stand-in answers with the first words of the document, so that BM25 retrieves something.
    openai_server.respond = lambda request: (200, completion(first_words(request["prompt"]) + "\n\n"))
    ok(run("generate_queries_openai.py", *GENERATE.split(), cwd=tmp_path, **server))
    generated = rows(folder / "synthetic_queries.jsonl")
    assert len(generated) > 20
    assert all(len(row["doc_text"]) >= 300 for row in generated)

    ok(run("filter_queries_by_score.py", *FILTER.split(), cwd=tmp_path))
    assert len(rows(folder / "filtered_synthetic_queries.jsonl")) == len(generated)

    index = ["--index", "index-made-here"]
    ok(run("generate_triples_train.py", *TRIPLES.split(), *index, cwd=tmp_path))
    triples = (folder / "synthetic.triples.train.tsv").read_bytes()
    (tmp_path / "index-made-here").rename(tmp_path / "msmarco-passage")
    ok(run("generate_triples_train.py", *TRIPLES.split(), cwd=tmp_path))
    assert (folder / "synthetic.triples.train.tsv").read_bytes() == triples

    # The run that the paper's command names belongs to another collection.
    other = run("train_t5.py", *TRAIN.split(), cwd=tmp_path, **hub)
    assert "This run belongs to other topics: pass the run of these topics with --run" in error_line(other)
    assert not (folder / "results.csv").exists()
    trec_covid.write_text("".join(f"{q} Q0 {doc_id} 1 1.0 x\n" for q, _, doc_id, _ in judged))
    ok(run_process("train_t5.py", *TRAIN.split(), cwd=tmp_path, **hub))  # t5_base is google-t5/t5-base on the hub
    assert (folder / "model.safetensors").exists()
    assert (folder / "results.csv").read_text().startswith("step,epoch,loss,nDCG@10")
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "collection.tsv").exists()


def first_words(prompt: str) -> str:
    document = prompt.rpartition("Document: ")[2].partition("\n")[0]
    return " " + " ".join(document.split()[:6])
