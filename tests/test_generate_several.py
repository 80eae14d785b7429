"""Stage 1 with several queries per document."""

import json
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
from conftest import error_line, ok, rows
from generation import errors, generate, meta, queries, start
from stand_in import StandIn, completion, document_of, error, prompt_of

SEVERAL = ["--temperature", 0.7, "--queries_per_doc", 3]


def seeded(request: dict) -> tuple[int, object]:
    """Answer with a question that tells document and seed."""
    text = f" what is {document_of(request)} about {request['seed']}?\n\n"
    return 200, completion(text, asked=prompt_of(request))


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Write four documents, two of them with ids that look like names of requests."""
    path = tmp_path / "collection.tsv"
    path.write_text("".join(f"{doc_id}\t{word} and more\n" for doc_id, word in WORDS.items()))
    return path


WORDS = {"a": "one", "a#1": "two", "a#1#2": "three", "b": "four"}


def test_each_document_gets_several_queries(numbered: Path, openai_server: StandIn) -> None:
    openai_server.respond = seeded
    done = ok(generate(numbered, openai_server.url, *SEVERAL, "--concurrency", 1))
    found = rows(numbered.parent / "queries.jsonl")
    expected = {(d, f"{d}#{i}", f"what is {word} about {i}?") for d, word in WORDS.items() for i in (1, 2, 3)}
    assert {(row["doc_id"], row["request"], row["question"]) for row in found} == expected
    assert len(found) == len(openai_server.requests) == 12
    in_order = [document_of(request) for request in openai_server.requests]
    together = [word for word in dict.fromkeys(in_order) for _ in range(3)]
    assert in_order == together  # while the server has the prompt of a document in its cache
    said = "12 queries written; 4 of 4 documents have one; of 12 requests, 12 are answered (0 duplicates dropped)"
    assert f"{said}, 0 failed, 0 are left" in done.stderr
    ok(generate(numbered, openai_server.url, *SEVERAL))
    assert len(openai_server.requests) == 12


def test_the_number_of_queries_per_document_may_be_raised(numbered: Path, openai_server: StandIn) -> None:
    openai_server.respond = seeded
    openai_server.fault = lambda request: None
    ok(generate(numbered, openai_server.url, *SEVERAL, "--queries_per_doc", 1))
    before = (numbered.parent / "queries.jsonl").read_text()
    assert "request" not in before
    assert not {"sampling_seed", "queries_per_doc"} & meta(numbered)["settings"].keys()
    done = ok(generate(numbered, openai_server.url, *SEVERAL))
    assert (numbered.parent / "queries.jsonl").read_text().startswith(before)
    assert queries(numbered).keys() == WORDS.keys()
    for doc_id, found in queries(numbered).items():
        assert sorted(found) == [f"what is {WORDS[doc_id]} about {i}?" for i in (1, 2, 3)]
    assert "4 of 12 requests were finished by earlier runs" in done.stderr
    assert len(openai_server.requests) == 12
    done = ok(generate(numbered, openai_server.url, *SEVERAL, "--queries_per_doc", 1))  # and lowered
    assert "0 queries written; 4 of 4 documents have one, 0 failed, 0 are left" in done.stderr
    assert len(openai_server.requests) == 12


def test_duplicates_of_a_document_are_dropped_once(collection: Path, openai_server: StandIn) -> None:
    """The third query of each document differs from the second in case and whitespace. An error interrupts the run."""

    def respond(request: dict) -> tuple[int, object]:
        if len(openai_server.requests) == 25:
            return error(401, "no")
        text = f" What is{' ' * request['seed'] if request['seed'] > 1 else ' not '}{document_of(request)}?\n\n"
        return 200, completion(text if request["seed"] == 3 else text.lower())

    openai_server.respond = respond
    args = [*SEVERAL, "--concurrency", 1]
    assert "refused (401" in error_line(generate(collection, openai_server.url, *args))
    assert (len(rows(collection.parent / "queries.jsonl")), len(errors(collection))) == (16, 8)
    done = ok(generate(collection, openai_server.url, *SEVERAL))
    assert "of 60 requests, 60 are answered (20 duplicates dropped), 0 failed, 0 are left" in done.stderr
    assert "24 queries written; 20 of 20 documents have one" in done.stderr
    assert Counter(map(len, queries(collection).values())) == {2: 20}
    assert set(errors(collection).values()) == {"duplicate of another query of this document"}
    assert len(openai_server.requests) == 61
    done = ok(generate(collection, openai_server.url, *SEVERAL, "--retry_errors"))  # would give the same again
    assert "(20 duplicates dropped), 0 failed" in done.stderr
    assert len(openai_server.requests) == 61
    assert len(errors(collection)) == 20


def test_a_failing_request_does_not_affect_the_others_of_its_document(numbered: Path, openai_server: StandIn) -> None:
    def respond(request: dict) -> tuple[int, object]:
        refused = document_of(request) == "one" and request["seed"] == 2
        return error(400, "content policy") if refused else seeded(request)

    openai_server.respond = respond
    done = ok(generate(numbered, openai_server.url, *SEVERAL))
    assert errors(numbered) == {"a#2": "content policy"}
    assert "document a#2: content policy" in done.stderr
    assert "4 of 4 documents have one; of 12 requests, 11 are answered (0 duplicates dropped), 1 failed" in done.stderr
    ok(generate(numbered, openai_server.url, *SEVERAL))
    assert len(openai_server.requests) == 12
    openai_server.respond = seeded
    ok(generate(numbered, openai_server.url, *SEVERAL, "--retry_errors"))
    assert len(openai_server.requests) == 13
    assert set(map(len, queries(numbered).values())) == {3}


def test_a_refused_document_with_many_queries_stops_no_run(numbered: Path, openai_server: StandIn) -> None:
    openai_server.respond = lambda request: (
        error(400, "content policy") if document_of(request) == "two" else seeded(request)
    )
    ok(generate(numbered, openai_server.url, *SEVERAL, "--queries_per_doc", 12, "--concurrency", 1))
    assert set(errors(numbered)) == {f"a#1#{i}" for i in range(1, 13)}
    assert len(rows(numbered.parent / "queries.jsonl")) == 36


@pytest.mark.slow
def test_kills_request_no_answered_query_again(numbered: Path, openai_server: StandIn) -> None:
    output, reached, killed = numbered.parent / "queries.jsonl", threading.Event(), threading.Event()

    def respond(request: dict) -> tuple[int, object]:
        if len(openai_server.requests) in (4, 8):
            killed.clear()
            reached.set()
            killed.wait(60)
        return seeded(request)

    openai_server.respond = respond
    for _ in range(2):
        reached.clear()
        process = start(numbered, openai_server.url, *SEVERAL, "--concurrency", 1)
        assert reached.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        killed.set()
    with output.open("a") as file:
        file.write('{"doc_id": "a#1", "doc_text"')  # torn by the kill
    ok(generate(numbered, openai_server.url, *SEVERAL))
    assert {doc_id: len(set(found)) for doc_id, found in queries(numbered).items()} == dict.fromkeys(WORDS, 3)
    assert len(rows(output)) == 12
    assert len(openai_server.requests) == 14  # the two that were in flight at a kill


def test_sampling_has_a_seed_of_its_own(collection: Path, openai_server: StandIn) -> None:
    openai_server.respond = seeded
    args = [*SEVERAL, "--max_examples", 4]
    ok(generate(collection, openai_server.url, *args))
    documents = set(queries(collection))
    assert {request["seed"] for request in openai_server.requests} == {1, 2, 3}
    ok(generate(collection, openai_server.url, *args, "--sampling_seed", 1))  # the same settings, said otherwise
    said = error_line(generate(collection, openai_server.url, *args, "--sampling_seed", 7))
    assert "made with other settings (sampling_seed null, now 7)" in said
    said = error_line(generate(collection, openai_server.url, *args, "--sampling_seed", 0))
    assert "made with other settings (sampling_seed null, now 0)" in said
    (collection.parent / "queries.jsonl").unlink()
    openai_server.requests.clear()
    ok(generate(collection, openai_server.url, *args, "--sampling_seed", 7))
    assert set(queries(collection)) == documents
    assert {request["seed"] for request in openai_server.requests} == {7, 8, 9}
    said = error_line(generate(collection, openai_server.url, *args))
    assert "made with other settings (sampling_seed 7, now null)" in said


def test_a_refused_seed_is_omitted_by_all_requests(numbered: Path, openai_server: StandIn) -> None:
    openai_server.respond = lambda request: (
        error(400, "Unsupported parameter: 'seed'", param="seed")
        if "seed" in request
        else (200, completion(f" what is {len(openai_server.requests)}?\n\n"))
    )
    (numbered.parent / "queries.jsonl").write_text(
        "".join(json.dumps({"doc_id": "a", "question": "q", "request": f"a#{i}"}) + "\n" for i in (1, 2))
    )
    done = ok(generate(numbered, openai_server.url, *SEVERAL))  # starts with the third request of a document
    assert done.stderr.count("m refuses seed. It is omitted") == 1
    assert len(openai_server.requests) == 1 + 10


def test_a_dry_run_of_several_queries(numbered: Path, openai_server: StandIn) -> None:
    openai_server.respond = lambda request: (200, completion(" what?", asked="word " * 100))
    done = ok(generate(numbered, openai_server.url, *SEVERAL, "--dry_run", 2))
    assert "6 requests sent, 0 without a query, 4 with a duplicate; nothing was written" in done.stdout
    assert "per request: 100 tokens in" in done.stdout
    assert "all 12: 1,200 tokens in" in done.stdout
    assert "requests per second" in done.stdout
    assert not (numbered.parent / "queries.jsonl").exists()


def test_greedy_decoding_gives_one_query_per_document(collection: Path) -> None:
    done = generate(collection, "http://127.0.0.1:9/v1", "--queries_per_doc", 2)
    assert "--queries_per_doc above 1 needs a --temperature above 0" in error_line(done, 2)
