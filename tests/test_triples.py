"""Stage 3 on real Lucene or on a run, and the Java that Lucene runs on."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, Done, error_line, ok, rows, run, write_rows

from inpars_lib.formats.runs import read_run

SCRIPT = "generate_triples_train.py"


@pytest.fixture(scope="module")
def mined(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write triples for queries that are the first words of their documents. One query is empty."""
    folder = tmp_path_factory.mktemp("mined")
    docs = [line.split("\t") for line in (demo_data / "collection.tsv").read_text().splitlines()[:40]]
    data = [
        {"doc_id": i, "doc_text": text, "question": " ".join(text.split()[:8]), "log_probs": []} for i, text in docs
    ]
    data[3]["question"] = ""
    data[5]["question"] = "the of and"  # stop words alone: no hit
    data[6]["doc_text"] = "cafÃ©\tau  lait, \u201cfine\u201d \uff21"  # its encoding is repaired, and nothing else
    write_rows(folder / "queries.jsonl", data)
    done = ok(run(SCRIPT, *mine_args(folder, demo_data)))
    (folder / "stderr").write_text(done.stderr)
    return folder


def mine_args(folder: Path, data: Path, name: str = "triples") -> list[object]:
    args = ["--input", folder / "queries.jsonl", "--output", folder / f"{name}.tsv", "--max_hits", 20]
    return [
        *args,
        "--output_ids",
        folder / f"{name}.ids.tsv",
        "--corpus",
        data / "collection.tsv",
        "--index",
        folder / "index",
    ]


def test_triples_and_their_ids(mined: Path, demo_data: Path) -> None:
    texts = dict(line.split("\t") for line in (demo_data / "collection.tsv").read_text().splitlines())
    queries = [json.loads(line) for line in (mined / "queries.jsonl").read_text().splitlines()]
    triples = [line.split("\t") for line in (mined / "triples.tsv").read_text().splitlines()]
    ids = [line.split("\t") for line in (mined / "triples.ids.tsv").read_text().splitlines()]
    assert [int(line) for line, _, _ in ids] == [i for i in range(40) if i not in (3, 5)]
    for (question, positive, negative), (line, positive_id, negative_id) in zip(triples, ids, strict=True):
        assert question == queries[int(line)]["question"]
        assert positive_id == queries[int(line)]["doc_id"] != negative_id
        assert positive == (texts[positive_id] if line != "6" else "café au lait, \u201cfine\u201d \uff21")
        assert negative == " ".join(texts[negative_id].split())


def test_the_summary_line(mined: Path) -> None:
    said = (mined / "stderr").read_text()
    assert "Indexing" in said
    assert "MRR@10 0." in said
    assert "R@20 0." in said
    assert "38 triples; 1 query without a usable hit" in said
    assert "dropped 1 row without a question" in said
    for chatter in ("INFO", "WARN", "org.apache", "anserini", "SLF4J"):
        assert chatter not in said


def test_the_same_seed_gives_the_same_triples(mined: Path, demo_data: Path) -> None:
    args = mine_args(mined, demo_data, "again")
    said = ok(run(SCRIPT, *args, "--threads", 1)).stderr
    assert "Indexing" not in said
    assert (mined / "again.tsv").read_bytes() == (mined / "triples.tsv").read_bytes()
    assert (mined / "again.ids.tsv").read_bytes() == (mined / "triples.ids.tsv").read_bytes()
    ok(run(SCRIPT, *args, "--seed", 2, "--n_samples", 3))
    ids = [line.split("\t") for line in (mined / "again.ids.tsv").read_text().splitlines()]
    assert (mined / "again.ids.tsv").read_bytes() != (mined / "triples.ids.tsv").read_bytes()
    assert len({(line, negative) for line, _, negative in ids}) == len(ids)  # no negative twice for a query
    counts = Counter(line for line, _, _ in ids)
    assert max(counts.values()) == 3  # a query of rare words may have fewer hits


def test_several_queries_of_a_document(mined: Path, demo_data: Path, tmp_path: Path) -> None:
    """All rows have the same score and pass the filter; those of a document are held out together."""
    docs = [line.split("\t") for line in (demo_data / "collection.tsv").read_text().splitlines()[10:30]]
    data = [
        {"doc_id": i, "doc_text": text, "question": " ".join(text.split()[n : n + 8]), "log_probs": [-1.0] * 8}
        for i, text in docs
        for n in (0, 2, 4)
    ]
    write_rows(tmp_path / "generated.jsonl", data)
    filtering = ["--input", tmp_path / "generated.jsonl", "--output", tmp_path / "queries.jsonl"]
    ok(run("filter_queries_by_score.py", *filtering))
    rows = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()]
    assert Counter(row["doc_id"] for row in rows) == dict.fromkeys((i for i, _ in docs), 3)
    ok(run(SCRIPT, *mine_args(tmp_path, demo_data)[:-1], mined / "index", "--holdout", 7))
    held_out = [json.loads(line) for line in (tmp_path / "triples.tsv.holdout.jsonl").read_text().splitlines()]
    ids = [line.split("\t") for line in (tmp_path / "triples.ids.tsv").read_text().splitlines()]
    assert len(held_out) == 9
    assert set(Counter(row["doc_id"] for row in held_out).values()) == {3}
    assert not {row["doc_id"] for row in held_out} & {positive for _, positive, _ in ids}
    assert len({line for line, _, _ in ids}) == len(ids) == 51
    for line, positive, negative in ids:
        assert rows[int(line)]["doc_id"] == positive != negative


def test_an_index_of_another_collection(mined: Path, tmp_path: Path) -> None:
    (tmp_path / "collection.tsv").write_text("x\tanother text\n")
    args = mine_args(mined, tmp_path, "bad")
    refused = error_line(run(SCRIPT, *args))
    assert f"sampled documents has a text in {tmp_path / 'collection.tsv'}" in refused
    assert "Pass the run, the index or a new index of this collection." in refused
    assert not (mined / "bad.tsv").exists()


@pytest.mark.parametrize(
    ("collection", "index", "words"),
    [
        ("a\tone\na\ttwo\n", "new", "the id a is on two lines"),
        ("\n", "new", "no usable line found"),
        ("a\tone\n", "full", "no Lucene index in this folder"),
        ("a\tone\n", "file", "this is a file. Set --index to a folder"),
    ],
)
def test_collections_that_cannot_be_indexed(
    mined: Path, tmp_path: Path, collection: str, index: str, words: str
) -> None:
    (tmp_path / "collection.tsv").write_text(collection)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    args = [*mine_args(mined, tmp_path, "bad")[:-1], tmp_path / index]
    assert words in error_line(run(SCRIPT, *args))
    assert not (tmp_path / "new").exists()  # a half-made index is never taken for a whole one
    assert not (tmp_path / "new.unfinished").exists()
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def retrieved(mined: Path, demo_data: Path) -> Path:
    """Write a run of the queries with the commands of docs/first-stage.md."""
    [code] = re.findall("python - <<'END'\n(.+?)END\n", (ROOT / "docs/first-stage.md").read_text(), re.DOTALL)
    code = code.replace("filtered.jsonl", "queries.jsonl")
    subprocess.run([sys.executable, "-c", code], cwd=mined, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    args = ["--index", mined / "index", "--topics", mined / "topics.tsv", "--output", mined / "run.txt", "--hits", 30]
    ok(run("inpars_lib.bm25", "search", *args))
    return mined


def mine_run(folder: Path, queries: Path, data: Path, *args: object) -> Done:
    files = ["--input", queries, "--corpus", data / "collection.tsv"]
    return run(SCRIPT, *files, "--output", folder / "run.tsv", "--output_ids", folder / "run.ids.tsv", *args)


def test_a_run_serves_like_its_index(retrieved: Path, demo_data: Path, tmp_path: Path) -> None:
    args = ["--max_hits", 25, "--n_samples", 3, "--holdout", 10]
    ok(run(SCRIPT, *mine_args(retrieved, demo_data, "index"), *args))
    done = ok(mine_run(tmp_path, retrieved / "queries.jsonl", demo_data, *args, "--run", retrieved / "run.txt"))
    assert "run.txt retrieves the source documents with MRR@10 " in done.stderr
    held_out = tmp_path / "run.tsv.holdout.jsonl"
    flags = f"--holdout {held_out} --run {tmp_path / 'run.tsv.holdout.run.txt'} --corpus {demo_data / 'collection.tsv'}"
    assert f"{held_out}: 10 queries held out. For train_t5.py: {flags}" in done.stderr
    for name in ("tsv", "ids.tsv", "tsv.holdout.jsonl"):
        assert (tmp_path / f"run.{name}").read_bytes() == (retrieved / f"index.{name}").read_bytes()
    # The hits of the held-out queries, whose lines are others in their new file
    lines = (retrieved / "queries.jsonl").read_text().splitlines()
    held_out = (tmp_path / "run.tsv.holdout.jsonl").read_text().splitlines()
    before, after = read_run(str(retrieved / "run.txt")), read_run(str(tmp_path / "run.tsv.holdout.run.txt"))
    expected = {str(i): before.get(str(lines.index(line)), []) for i, line in enumerate(held_out)}
    assert {i: [hit[1:] for hit in hits] for i, hits in after.items()} == {
        i: [hit[1:] for hit in hits] for i, hits in expected.items() if hits
    }


def test_held_out_queries_belong_to_their_triples(retrieved: Path, demo_data: Path, tmp_path: Path) -> None:
    """Files of earlier triples are deleted, and stay if the new triples cannot be written."""
    queries = retrieved / "queries.jsonl"
    held_out = [tmp_path / f"run.tsv.holdout.{name}" for name in ("jsonl", "run.txt")]
    with_run = ["--run", retrieved / "run.txt"]
    ok(mine_run(tmp_path, queries, demo_data, *with_run, "--holdout", 10))
    before = [path.read_bytes() for path in held_out]
    error_line(mine_run(tmp_path, queries, demo_data, *with_run, "--holdout", 5, "--min_rank", 31, "--max_hits", 40))
    assert [path.read_bytes() for path in held_out] == before
    done = ok(mine_run(tmp_path, queries, demo_data, "--index", retrieved / "index", "--holdout", 5, "--restart"))
    assert "run.tsv.holdout.run.txt: deleted, because it belonged to the triples that this run" in done.stderr
    assert (len(rows(held_out[0])), held_out[1].exists()) == (5, False)
    done = ok(mine_run(tmp_path, queries, demo_data, "--index", retrieved / "index"))
    assert "run.tsv.holdout.jsonl: deleted" in done.stderr
    assert not held_out[0].exists()


def test_the_lines_of_a_run_include_unusable_rows(retrieved: Path, demo_data: Path, tmp_path: Path) -> None:
    data = rows(retrieved / "queries.jsonl")
    write_rows(tmp_path / "q.jsonl", [*data, {"doc_id": "9", "doc_text": "", "question": "what is the text"}])
    hits = f"{len(data)} Q0 {data[0]['doc_id']} 1 9.5 bm25\n"
    (tmp_path / "run.txt").write_text((retrieved / "run.txt").read_text() + hits)
    ok(mine_run(tmp_path, tmp_path / "q.jsonl", demo_data, "--run", tmp_path / "run.txt"))


def test_rows_without_a_text_take_the_text_of_the_corpus(retrieved: Path, demo_data: Path, tmp_path: Path) -> None:
    data = rows(retrieved / "queries.jsonl")
    del data[6]  # its text is not the collection's
    write_rows(tmp_path / "q.jsonl", data)
    lines = [line.split(" ", 1) for line in (retrieved / "run.txt").read_text().splitlines(keepends=True)]
    hits = [f"{int(line) - (int(line) > 6)} {rest}" for line, rest in lines if line != "6"]
    (tmp_path / "hits.txt").write_text("".join(hits))
    args = [tmp_path, tmp_path / "q.jsonl", demo_data, "--run", tmp_path / "hits.txt"]
    ok(mine_run(*args))
    expected = (tmp_path / "run.tsv").read_bytes()
    for row in data[:20]:
        row["doc_text"] = ""
    for row in data[10:]:
        del row["doc_text"]
    write_rows(tmp_path / "q.jsonl", data)
    ok(mine_run(*args))
    assert (tmp_path / "run.tsv").read_bytes() == expected
    data[0]["doc_id"] = "absent"
    write_rows(tmp_path / "q.jsonl", data)
    done = ok(mine_run(*args))
    assert "dropped 1 row whose document has no text" in done.stderr
    assert (tmp_path / "run.tsv").read_bytes() == expected.split(b"\n", 1)[1]
    write_rows(tmp_path / "q.jsonl", [{**row, "doc_id": "absent"} for row in data])
    assert "no row has a document text (`doc_text` or `text`)" in error_line(mine_run(*args))


PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
import generate_triples_train
generate_triples_train.main(sys.argv[2:])
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak.split()[1]) // 1024)  # MiB; ru_maxrss would include the parent's memory
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """The larger input has 30 MB of texts, the smaller one 1.5 MB."""
    peaks = []
    for n in (500, 10_000):
        docs = [f"d{i}\t{i} {'word ' * 600}\n" for i in range(n)]
        (tmp_path / "collection.tsv").write_text("".join(docs))
        texts = (line.split("\t") for line in docs)
        data = [{"doc_id": doc_id, "doc_text": text.strip(), "question": "what is it"} for doc_id, text in texts]
        write_rows(tmp_path / "queries.jsonl", data)
        (tmp_path / "run.txt").write_text("".join(f"{i} Q0 d{(i + 1) % n} 1 1.0 x\n" for i in range(n)))
        files = {
            "--input": "queries.jsonl",
            "--corpus": "collection.tsv",
            "--run": "run.txt",
            "--output": "triples.tsv",
        }
        words = [str(word) for flag, name in files.items() for word in (flag, tmp_path / name)]
        command = [sys.executable, "-c", PEAK, ROOT, *words, "--output_ids", tmp_path / "ids", "--holdout", "10"]
        peaks.append(int(subprocess.run([*map(str, command)], check=True, capture_output=True).stdout))
        assert len((tmp_path / "ids").read_text().splitlines()) == n - 10
    assert peaks[1] < peaks[0] + 20


def test_a_document_with_two_texts_is_refused(retrieved: Path, demo_data: Path, tmp_path: Path) -> None:
    lines = (demo_data / "collection.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "collection.tsv").write_text("".join([*lines, *lines]))
    args = ["--run", retrieved / "run.txt", "--max_hits", 5]
    ok(mine_run(tmp_path, retrieved / "queries.jsonl", tmp_path, *args))
    (tmp_path / "collection.tsv").write_text("".join([*lines, *(line.replace("\t", "\tother ") for line in lines)]))
    refused = error_line(mine_run(tmp_path, retrieved / "queries.jsonl", tmp_path, *args))
    assert "is on two lines with different texts. Delete one of them." in refused


def test_negatives_of_a_range_of_ranks(retrieved: Path, demo_data: Path, tmp_path: Path) -> None:
    args = ["--run", retrieved / "run.txt", "--n_samples", 50]
    done = ok(mine_run(tmp_path, retrieved / "queries.jsonl", demo_data, *args, "--min_rank", 5, "--max_hits", 20))
    queries = rows(retrieved / "queries.jsonl")
    negatives = [tuple(line.split("\t")[::2]) for line in (tmp_path / "run.ids.tsv").read_text().splitlines()]
    run = read_run(str(retrieved / "run.txt"))
    expected = [(line, hit.doc_id) for line, hits in run.items() for hit in hits[4:20]
                if hit.doc_id != queries[int(line)]["doc_id"]]  # fmt: skip
    assert sorted(negatives) == sorted(expected)
    assert f"{39 - len(dict(negatives))} quer" in done.stderr
    nothing = mine_run(tmp_path, retrieved / "queries.jsonl", demo_data, *args, "--min_rank", 31)
    assert "no query has a hit at ranks 31 to 1000 other than its source document" in error_line(nothing)
    wrong = mine_run(tmp_path, retrieved / "queries.jsonl", demo_data, *args, "--min_rank", 5, "--max_hits", 4)
    assert "--min_rank must not be above --max_hits" in error_line(wrong, 2)


@pytest.mark.parametrize("change", [None, "min_rank 1, now 2", "the run differs"])
def test_a_log_belongs_to_its_run_and_ranks(
    retrieved: Path, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str | None
) -> None:
    """The log goes on with the same settings. Others are refused by name, and --restart starts over."""
    shutil.copy(retrieved / "run.txt", tmp_path)
    log, kept = tmp_path / "run.tsv.negatives.jsonl", tmp_path / "kept"
    args = [tmp_path, retrieved / "queries.jsonl", demo_data, "--run", tmp_path / "run.txt"]
    with monkeypatch.context() as patch:
        patch.setattr("os.remove", lambda path: shutil.move(path, kept) if "negatives" in path else os.unlink(path))
        ok(mine_run(*args))
    settings, *finished = rows(kept)
    write_rows(log, [settings, *[{**row, "doc_ids": []} for row in finished[:10]]])  # shows whether the log is used
    before = log.read_bytes()
    if change == "the run differs":
        with (tmp_path / "run.txt").open("a") as file:
            file.write("0 Q0 one-more 99 0.1 x\n")
    args += ["--min_rank", 2] if change == "min_rank 1, now 2" else []
    if change:
        refused = error_line(mine_run(*args))
        assert f"run.tsv.negatives.jsonl: made with other settings ({change}). Repeat the earlier" in refused
        assert log.read_bytes() == before
    done = ok(mine_run(*args, *(["--restart"] if change else [])))
    unserved = int(re.search("([0-9]+) quer(?:y|ies) without", done.stderr)[1])
    assert (unserved >= 10) == (change is None)
    assert not log.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("40 Q0 a 1 1 x\n", "the query id 40 is no line of"),
        ("q1\ta\t1\n", "the query id q1 is no line of"),
        ("007\ta\t1\n", "the query id 007 is no line of"),
        ("", "no usable line found"),
        ("0 Q0 absent 1 1 x\n", "none of the 1 sampled documents has a text in"),
        # The question of line 3 is empty.
        ("3 Q0 absent 1 1 x\n", "no query has a hit at ranks 1 to 1000 other than its source document"),
    ],
)
def test_runs_of_other_queries(mined: Path, demo_data: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.txt").write_text(text)
    done = mine_run(tmp_path, mined / "queries.jsonl", demo_data, "--run", tmp_path / "run.txt")
    assert words in error_line(done)
    assert not (tmp_path / "run.tsv").exists()


def test_a_suspicious_run_is_reported(retrieved: Path, demo_data: Path, tmp_path: Path) -> None:
    lines = (retrieved / "run.txt").read_text().splitlines(keepends=True)
    (tmp_path / "run.txt").write_text("".join(line for line in lines if int(line.split()[0]) < 9))
    write_rows(tmp_path / "queries.jsonl", rows(retrieved / "queries.jsonl")[::-1])
    done = ok(mine_run(tmp_path, tmp_path / "queries.jsonl", demo_data, "--run", tmp_path / "run.txt"))
    assert "of 39 queries have no hits." in done.stderr
    assert "few source documents are among the hits of their query" in done.stderr
    for flags in (["--index", "x"], ["--k1", 1], ["--language", "de"]):
        refused = mine_run(tmp_path, tmp_path / "queries.jsonl", demo_data, "--run", tmp_path / "run.txt", *flags)
        assert " not " in error_line(refused, 2)


def test_lucene_starts_without_pyserinis_modules() -> None:
    """They import torch, transformers and a client of OpenAI, which takes up to half a minute."""
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from inpars_lib.bm25 import lucene
before = dict(os.environ)
lucene.start_lucene()
assert os.environ == before, set(os.environ.items()) ^ set(before.items())
assert not {"torch", "transformers", "openai", "pyserini"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
