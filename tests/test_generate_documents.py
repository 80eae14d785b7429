"""Stage 1: which documents are sampled, and how long ones are truncated."""

from pathlib import Path

import pytest
from conftest import error_line, ok
from generation import EVERY, generate, meta, written
from stand_in import StandIn, completion, document_of, prompt_of

from inpars_lib.formats.records import Doc
from inpars_lib.llm.prompt import PromptTemplate


def test_the_sample_depends_on_the_seed_and_not_on_the_order(collection: Path, openai_server: StandIn) -> None:
    def sampled(*args: object) -> set[str]:
        ok(generate(collection, openai_server.url, "--max_examples", 6, *args))
        ids = set(written(collection))
        (collection.parent / "queries.jsonl").unlink()
        return ids

    first = sampled("--sampling", "first")
    assert first == {f"d{i}" for i in range(6)}
    one, two = sampled(), sampled("--seed", 2)
    assert len(one) == len(two) == 6
    assert len({frozenset(x) for x in (first, one, two)}) == 3
    collection.write_text("".join(reversed(collection.read_text().splitlines(keepends=True))))
    assert sampled() == one


def test_document_lengths(collection: Path, openai_server: StandIn) -> None:
    lengths = {line.split("\t")[0]: len(line.split("\t")[1]) for line in collection.read_text().splitlines()}
    done = generate(collection, openai_server.url, "--min_doc_chars", 5000)
    assert "no document of 5000 to 100000 characters" in error_line(done)
    done = ok(generate(collection, openai_server.url, "--min_doc_chars", 50, "--max_doc_chars", 80))
    short, long = (sum(length < 50 for length in lengths.values()), sum(length > 80 for length in lengths.values()))
    assert f"skipped {short} documents under 50 characters (--min_doc_chars)" in done.stderr
    assert f"skipped {long} documents over 80 characters (--max_doc_chars)" in done.stderr
    expected = {doc_id for doc_id, length in lengths.items() if 50 <= length <= 80}
    assert set(written(collection)) == expected
    assert 0 < len(expected) < 20


@pytest.mark.parametrize(
    ("text", "limit", "shown"),
    [
        ("some words here", 15, "some words here"),
        ("some words here", 14, "some words"),
        ("some words here", 10, "some words"),
        ("some  words here", 11, "some  words"),
        ("some words  here", 11, "some words"),
        ("a whatalongword", 14, "a whatalongwor"),  # not `a` alone
        ("一二三四五六", 4, "一二三四"),
        ("🙂🙂🙂", 2, "🙂🙂"),
        ("word", 1, "w"),
    ],
)
def test_documents_are_truncated_at_whitespace(text: str, limit: int, shown: str) -> None:
    assert PromptTemplate("<{document_text}>", limit).fill(Doc("d", text)) == f"<{shown}>"


@pytest.mark.parametrize("batch", [[], ["--batch", "--batch_poll", 0]])
def test_long_documents_are_truncated_in_the_prompt(
    collection: Path, openai_server: StandIn, batch: list[object]
) -> None:
    texts = dict(line.split("\t") for line in collection.read_text().splitlines())
    template = collection.parent / "prompt.txt"
    template.write_text("Document: {document_text} Query:")
    args = ["--prompt_template", template, *batch]
    done = ok(generate(collection, openai_server.url, *args, "--truncate_doc_chars", 43, "--min_doc_chars", 30))
    assert "16 of 19 documents are truncated in the prompt" in done.stderr
    prompts = {document_of(request): prompt_of(request) for request in openai_server.requests}
    assert prompts["number3"] == f"Document: number3{' word' * 7} Query:"
    assert prompts["number4"] == f"Document: number4{' word' * 7} Query:"
    assert prompts["number19"] == f"Document: number19{' word' * 7} Query:"
    for doc_id, row in written(collection).items():
        assert row["doc_text"] == texts[doc_id]  # stage 3 trains with it, and stage 5 reranks such texts
    assert meta(collection)["settings"]["truncate_doc_chars"] == 43
    assert "max_doc_chars" not in meta(collection)["settings"]
    said = error_line(generate(collection, openai_server.url, *args, "--min_doc_chars", 30))
    assert "truncate_doc_chars 43, now null" in said


def test_limits_of_length_hold_for_the_full_text(collection: Path, openai_server: StandIn) -> None:
    long = "long " * 30_000
    with collection.open("a") as file:
        file.write(f"x\tnumber20 {long}\n")
    ok(generate(collection, openai_server.url, "--max_examples", 30))
    assert set(written(collection)) == EVERY  # 100,000 characters is the default
    assert "truncate_doc_chars" not in meta(collection)["settings"]
    (collection.parent / "queries.jsonl").unlink()
    ok(generate(collection, openai_server.url, "--truncate_doc_chars", 50))
    assert set(written(collection)) == {*EVERY, "x"}
    (collection.parent / "queries.jsonl").unlink()
    ok(generate(collection, openai_server.url, "--truncate_doc_chars", 50, "--max_doc_chars", 80))
    assert 0 < len(written(collection)) < 20
    done = generate(collection, openai_server.url, "--truncate_doc_chars", 50, "--min_doc_chars", 10**6, "--force")
    assert "no document of 1000000 to any number of characters" in error_line(done)


def test_log_probs_of_a_truncated_document(collection: Path, openai_server: StandIn) -> None:
    openai_server.respond = lambda r: (200, completion(" a question\n", prompt=r["prompt"]))
    ok(generate(collection, openai_server.url, "--include_doc_probs", "--truncate_doc_chars", 20))
    for row in written(collection).values():
        assert row["log_probs"] == [-0.5, -1.0]
        assert row["doc_log_probs"] == [-9.0] * 3
        assert len(row["doc_text"].split()) > 4


def test_an_id_with_two_texts_is_refused_before_any_request(collection: Path, openai_server: StandIn) -> None:
    with collection.open("a") as file:
        file.write("d3\tnumber3 again\n")
    assert "the id d3 is on two lines with different texts" in error_line(generate(collection, openai_server.url))
    assert not openai_server.requests
