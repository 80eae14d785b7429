"""All five stages by their command lines, on real text with a real language model and real Lucene."""

from pathlib import Path

from conftest import ok, rows, run, save_t5


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
    ok(run("generate_queries_openai.py", *generate, "--max_examples", 5))
    filtering = ["--input", work / "queries.jsonl", "--output", work / "filtered.jsonl", "--top_k", 4]
    ok(run("filter_queries_by_score.py", *filtering))
    assert [row["score"] for row in rows(work / "filtered.jsonl")] == sorted(
        (row["score"] for row in rows(work / "filtered.jsonl")), reverse=True
    )
    mining = ["--input", work / "filtered.jsonl", "--output", work / "triples.tsv", "--output_ids", work / "ids.tsv"]
    ok(run("generate_triples_train.py", *mining, "--corpus", collection, "--index", work / "index", "--n_samples", 2))
    assert len((work / "triples.tsv").read_text().splitlines()) == 8

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
