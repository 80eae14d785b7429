"""Stage 1: servers and documents that fail."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, error_line, ok, rows, run
from generation import EVERY, errors, fails_for, generate, meta, start, written
from stand_in import FAULTS, StandIn, completion, document_of, error


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the waits between tries begin with milliseconds, and end with a tenth of a second."""
    monkeypatch.setattr("inpars_lib.llm.server.FIRST_WAIT", 0.002)
    monkeypatch.setattr("inpars_lib.llm.server.LONGEST_WAIT", 0.1)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_an_engine_without_log_probs(collection: Path, openai_server: StandIn, api: str) -> None:
    openai_server.api = api
    openai_server.fault = lambda request: "no_logprobs"
    said = error_line(generate(collection, openai_server.url, "--api", api))
    assert "m: no log-probabilities" in said
    assert "--no_log_probs" in said
    assert len(openai_server.requests) == 1  # before any further request
    openai_server.refuses = {"logprobs": "logprobs are not available", "top_logprobs": "top_logprobs are not available"}
    ok(generate(collection, openai_server.url, "--no_log_probs"))
    assert all(list(row) == ["doc_id", "doc_text", "question"] for row in written(collection).values())
    filtering = ["--input", collection.parent / "queries.jsonl", "--output", collection.parent / "filtered.jsonl"]
    said = error_line(run("filter_queries_by_score.py", *filtering))
    assert "(20 without log-probabilities)" in said
    assert "--scoring_function monot5 --model NAME" in said


def test_the_concurrency_limit_falls_and_recovers(collection: Path, openai_server: StandIn) -> None:
    """The server accepts 3 requests at a time until it has answered 50, then any number."""
    collection.write_text("".join(f"d{i}\tnumber{i} word\n" for i in range(200)))
    openai_server.latency = 0.05  # long beside what a slow machine needs for a request
    openai_server.headers = {"Retry-After": "0.02"}
    answered, refused, later = [], [], []

    def respond(request: dict) -> tuple[int, object]:
        now = openai_server.under_way
        if len(answered) < 50 and now > 3:
            refused.append(now)
            return error(429, "slow down", "rate_limit_exceeded")
        (answered if len(answered) < 50 else later).append(now)
        return openai_server.answer(request)

    openai_server.respond = respond
    ok(generate(collection, openai_server.url, "--concurrency", 16))
    assert len(written(collection)) == 200
    assert 0 < len(refused) < 100  # it began with 16 at a time, and came down
    assert max(later) > 9


def test_retry_after_is_respected(collection: Path, openai_server: StandIn) -> None:
    """No request arrives before the time that the 429 named. The stand-in records arrival times."""
    came, asked = [], 1.0

    def respond(request: dict) -> tuple[int, object]:
        came.append(time.monotonic())
        if len(came) == 2:
            openai_server.headers = {"Retry-After": str(asked)}
            return error(429, "slow down")
        return openai_server.answer(request)

    openai_server.respond = respond
    ok(generate(collection, openai_server.url, "--max_examples", 4, "--concurrency", 1))
    assert came[2] - came[1] >= asked
    assert len(written(collection)) == 4


@pytest.mark.slow
def test_a_restarted_server_loses_no_answer(collection: Path, tmp_path: Path) -> None:
    def serve_alone(port: int) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, ROOT / "tests/stand_in.py", "--port", str(port), "--latency", "0.1"]
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        return process, process.stdout.readline().strip()

    server, url = serve_alone(0)
    process = start(collection, url, "--concurrency", 2)
    while len(rows(tmp_path / "queries.jsonl") if (tmp_path / "queries.jsonl").exists() else []) < 4:
        time.sleep(0.02)
    server.kill()
    server.wait()
    for line in process.stderr:
        if "the connection broke" in line and "Trying again; the run stops at" in line:
            break
    server, _ = serve_alone(int(re.search(r":(\d+)/", url)[1]))
    said = process.stderr.read()
    server.kill()
    assert process.wait() == 0, said
    assert set(written(collection)) == EVERY
    assert not errors(collection)


def test_a_server_that_does_not_come_back(collection: Path, openai_server: StandIn) -> None:
    def respond(request: dict) -> tuple[int, object]:
        return openai_server.answer(request) if len(openai_server.requests) < 5 else (503, b"<html>")

    openai_server.respond = respond
    openai_server.headers = {"Retry-After": "0.1"}
    said = error_line(generate(collection, openai_server.url, "--patience", 1))
    assert "and no answer for 1 s (--patience). Answers so far are saved" in said
    assert len(written(collection)) == 4
    assert not errors(collection)  # the server's fault, and no document's


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "refused"])
def test_transient_failures_are_retried(collection: Path, openai_server: StandIn, fault: str) -> None:
    openai_server.fault = fails_for(7, fault, times=1)
    ok(generate(collection, openai_server.url))
    assert set(written(collection)) == EVERY
    assert len(openai_server.requests) == 21
    assert not errors(collection)


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("refused", "maximum context length is 10 tokens", 1),
        ("empty", "the answer is empty", 1),
        ("hang", "no answer in 0.3 s, 5 times", 7),
        ("500", "the server failed (500 The server had an error), 5 times", 7),
    ],
)
def test_a_failing_document_does_not_affect_the_others(
    collection: Path, openai_server: StandIn, short_waits: None, fault: str, reason: str, requests: int
) -> None:
    openai_server.fault = fails_for(7, fault)
    openai_server.headers = {"Retry-After": "0.1"}
    done = ok(generate(collection, openai_server.url, "--timeout", 0.3))
    assert set(written(collection)) == EVERY - {"d7"}
    assert set(errors(collection)) == {"d7"}
    assert reason in errors(collection)["d7"]
    assert "19 of 20 documents have one, 1 failed, 0 are left" in done.stderr
    assert f"most common failures: {errors(collection)['d7'][:80]} (1)" in done.stderr
    assert len(openai_server.requests) == 19 + requests  # with the probes of the server
    openai_server.requests.clear()
    openai_server.fault = lambda request: None
    ok(generate(collection, openai_server.url))  # not by itself
    assert not openai_server.requests
    ok(generate(collection, openai_server.url, "--retry_errors"))
    assert len(openai_server.requests) == 1
    assert set(written(collection)) == EVERY
    ok(generate(collection, openai_server.url))
    assert not errors(collection)  # the file is gone


def test_an_answer_without_a_question_is_kept_with_its_error(collection: Path, openai_server: StandIn) -> None:
    def respond(request: dict) -> tuple[int, object]:
        body = completion(" how is this?\n\n")
        if document_of(request) == "number3":
            body["choices"][0]["logprobs"]["tokens"][0] = " who"
        if document_of(request) == "number4":  # half a surrogate pair, as broken JSON escapes give
            return 200, completion(" a \ud83d question\n\n")
        return 200, body

    openai_server.respond = respond
    ok(generate(collection, openai_server.url))
    [row] = rows(collection.parent / "queries.jsonl.errors.jsonl")
    assert row["doc_id"] == "d3"
    assert "do not spell" in row["reason"]
    assert row["answer"] == " how is this?\n\n"
    assert len(written(collection)["d4"]["log_probs"]) == 3


@pytest.mark.parametrize("down", [range(21, 121), range(197, 237)], ids=["in the middle", "at the end"])
def test_an_outage_fails_no_document(
    large: Path, openai_server: StandIn, short_waits: None, monkeypatch: pytest.MonkeyPatch, down: range
) -> None:
    """At the end no document is left that could be answered in between."""
    monkeypatch.setattr("inpars_lib.llm.server.Server.on_failure", lambda *_: None)  # the concurrency stays at 8
    seen = []

    def respond(request: dict) -> tuple[int, object]:
        seen.append(request)
        return error(503, "down") if len(seen) in down else openai_server.answer(request)

    openai_server.respond = respond
    ok(generate(large, openai_server.url, "--concurrency", 8))
    assert len(written(large)) == 200
    assert not errors(large)


def test_an_overloaded_server_fails_no_document(large: Path, openai_server: StandIn) -> None:
    """Two slots for 64 requests: the others wait in the server until they time out."""
    slots = threading.Semaphore(2)

    def respond(request: dict) -> tuple[int, object]:
        with slots:
            time.sleep(0.05)
            return openai_server.answer(request)

    openai_server.respond = respond
    ok(generate(large, openai_server.url, "--concurrency", 64, "--timeout", 0.3, "--max_examples", 80))
    assert len(written(large)) == 80
    assert not errors(large)


@pytest.mark.parametrize("documents", [["d0"], ["d19"], ["d0", "d1", "d18", "d19"]])
@pytest.mark.parametrize("concurrency", [1, 8])
def test_documents_that_the_server_cannot_answer(
    collection: Path, openai_server: StandIn, short_waits: None, documents: list[str], concurrency: int
) -> None:
    """The first and the last ones: nothing is answered before or after them. A later run meets nothing else."""
    bad = {f"number{doc_id[1:]}" for doc_id in documents}
    openai_server.fault = lambda request: "500" if document_of(request) in bad else None
    args = ["--concurrency", concurrency, "--sampling", "first"]
    ok(generate(collection, openai_server.url, *args))
    assert set(written(collection)) == EVERY - set(documents)
    assert set(errors(collection)) == set(documents)
    ok(generate(collection, openai_server.url, *args, "--retry_errors"))
    assert set(errors(collection)) == set(documents)
    assert len(written(collection)) == 20 - len(documents)


@pytest.mark.parametrize("fault", ["500", "cut", "hang"])
def test_a_server_that_answers_nobody_is_at_fault(
    collection: Path, openai_server: StandIn, short_waits: None, fault: str
) -> None:
    openai_server.fault = lambda request: fault
    said = error_line(generate(collection, openai_server.url, "--patience", 1, "--timeout", 0.1))
    assert "no answer for 1 s (--patience)" in said
    assert not errors(collection)
    assert (collection.parent / "queries.jsonl").read_bytes() == b""


def test_each_reason_is_told_once_and_at_once(collection: Path, openai_server: StandIn, short_waits: None) -> None:
    def respond(request: dict) -> tuple[int, object]:
        number = len(openai_server.requests)
        if number < 4:
            return error(503, f"loading model, request 0a{number}")
        return error(502, "bad gateway") if number == 4 else openai_server.answer(request)

    openai_server.respond = respond
    done = ok(generate(collection, openai_server.url))
    assert done.stderr.count("the server failed (503 loading model, request 0a1). Trying again; the run stops at") == 1
    assert done.stderr.count("502 bad gateway). Trying again") == 1
    assert done.stderr.count("Trying again") == 2
    assert done.stderr.count("is back") == 1


def test_a_wait_beyond_patience_stops_the_run(collection: Path, openai_server: StandIn) -> None:
    openai_server.headers = {"Retry-After": "7200"}
    openai_server.respond = lambda request: error(429, "daily limit")
    said = error_line(generate(collection, openai_server.url))
    assert "(429 daily limit), and the server asks to wait 2 hours, longer than --patience 60 minutes" in said
    assert len(openai_server.requests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 503])
def test_a_rate_limiter(collection: Path, openai_server: StandIn, status: int) -> None:
    """As nginx's `limit_req`: at most one request in a twentieth of a second, the others are refused."""
    accepted = [0.0]

    def respond(request: dict) -> tuple[int, object]:
        with openai_server.lock:
            if time.monotonic() - accepted[-1] < 0.05:
                return error(status, "limited")
            accepted.append(time.monotonic())
        return openai_server.answer(request)

    openai_server.respond = respond
    collection.write_text("".join(f"d{i}\tnumber{i} word\n" for i in range(60)))
    ok(generate(collection, openai_server.url))
    assert len(written(collection)) == 60
    assert not errors(collection)
    print(f"\n{len(openai_server.requests)} requests, {accepted[-1] - accepted[1]:.1f} s, 2.95 s at the limiter's rate")
    assert len(openai_server.requests) < 120


def test_a_refused_document_does_not_block_the_output(collection: Path, openai_server: StandIn) -> None:
    openai_server.respond = lambda request: (
        error(403, "not allowed") if document_of(request) == "number7" else openai_server.answer(request)
    )
    ok(generate(collection, openai_server.url))
    assert errors(collection) == {"d7": "the server refused this document (403 not allowed)"}
    ok(generate(collection, openai_server.url, "--retry_errors"))
    assert set(written(collection)) == EVERY - {"d7"}


def test_a_server_that_turns_bad_stops_the_run(large: Path, openai_server: StandIn) -> None:
    openai_server.respond = lambda request: (
        error(400, "bad") if len(openai_server.requests) > 30 else openai_server.answer(request)
    )
    assert "10 documents in a row failed" in error_line(generate(large, openai_server.url, "--concurrency", 1))
    assert len(errors(large)) == 10


def test_a_wait_of_zero_is_no_invitation(collection: Path, openai_server: StandIn) -> None:
    openai_server.headers = {"Retry-After": "0"}
    openai_server.respond = lambda request: (
        openai_server.answer(request) if len(openai_server.requests) < 5 else error(429, "slow down")
    )
    generate(collection, openai_server.url, "--patience", 2)
    assert len(openai_server.requests) < 50  # without a floor, hundreds per second


def test_a_dripping_answer_times_out(collection: Path, openai_server: StandIn, short_waits: None) -> None:
    openai_server.fault = fails_for(7, "drip")
    ok(generate(collection, openai_server.url, "--timeout", 0.3))
    assert "no answer in 0.3 s" in errors(collection)["d7"]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, {"error": {"message": "no provider", "code": 502}}, "no provider"),
        (200, {"status": "ok"}, "--base_url ends in /v1"),
        (422, {"detail": "Field required"}, "Field required"),
    ],
)
def test_messages_of_other_servers(
    collection: Path, openai_server: StandIn, status: int, body: object, words: str
) -> None:
    openai_server.respond = lambda request: (status, body)
    assert words in error_line(generate(collection, openai_server.url, "--patience", 1))


def test_paid_answers_that_cannot_be_used_stay_in_the_errors_file(collection: Path, openai_server: StandIn) -> None:
    body = completion(" What is it?")
    body["choices"][0]["logprobs"]["tokens"] = ["token_id:7"] * 4
    body["choices"][0]["logprobs"]["token_logprobs"] = [-1.0] * 4
    openai_server.respond = lambda request: (200, body)
    assert "Add --no_log_probs" in error_line(generate(collection, openai_server.url))
    answers = [row["answer"] for row in rows(collection.parent / "queries.jsonl.errors.jsonl")]
    assert answers == [" What is it?"] * 10
    ok(generate(collection, openai_server.url, "--no_log_probs"))  # no query is mixed, so no --force is needed
    assert written(collection).keys() == EVERY


def test_errors_inside_answers_are_classified_by_their_code(collection: Path, openai_server: StandIn) -> None:
    limited = {"error": {"message": "slow down", "code": 429}, "choices": None}
    openai_server.respond = lambda request: (
        (200, limited) if len(openai_server.requests) % 5 == 1 else openai_server.answer(request)
    )
    done = ok(generate(collection, openai_server.url))
    assert written(collection).keys() == EVERY
    assert "too many requests (429 slow down)" in done.stderr


def test_the_model_that_answered_and_cut_answers_are_told(collection: Path, openai_server: StandIn) -> None:
    body = completion(" What is it?") | {"model": "llama-3-8b"}
    body["choices"][0]["finish_reason"] = "length"
    openai_server.respond = lambda request: (200, body)
    done = ok(generate(collection, openai_server.url))
    assert done.stderr.count("--engine m: the answers come from a model that the server calls llama-3-8b") == 1
    assert "warning: 20 of 20 answers ended at the limit of tokens" in done.stderr
    assert meta(collection)["models"] == ["llama-3-8b"]
    assert meta(collection)["usage"]["cut_answers"] == 20
    refused = error_line(generate(collection, openai_server.url, "--temperature", 1))
    assert "Models that answered so far: llama-3-8b" in refused


def test_a_proxy_is_named(collection: Path) -> None:
    done = generate(collection, "http://127.0.0.1:9/v1", HTTP_PROXY="http://127.0.0.1:9", NO_PROXY=None, no_proxy=None)
    assert "The environment has a proxy, HTTP_PROXY" in error_line(done)


NOT_FOUND = {"error": {"message": "The model `curie` has been deprecated", "code": "model_not_found"}}


@pytest.mark.parametrize(
    ("engine", "status", "body", "words"),
    [
        ("curie", 404, NOT_FOUND, "--engine curie: OpenAI shut down its GPT-3 models in January 2024"),
        ("text-davinci-003", 404, NOT_FOUND, "--base_url http://HOST:8000/v1"),
        ("gpt-4o", 404, NOT_FOUND, "status 404 for engine gpt-4o"),
        ("gpt-9", 404, {"error": {"message": "no such model"}}, "status 404 for engine gpt-9"),
        ("m", 401, {"error": {"message": "Incorrect API key provided: sk-secret"}}, "<key>). Set API_KEY"),
        ("m", 403, {"error": {"message": "sk-secret may not"}}, "(403 <key> may not). Use a key"),
        ("m", 429, {"error": {"message": "quota", "code": "insufficient_quota"}}, "no credit left"),
        ("m", 402, {"error": {"message": "Insufficient Balance"}}, "no credit left"),
        (
            "m",
            400,
            {"error": {"message": "bad request, sk-secret"}},
            "refused 3 documents (bad request, <key>). Check --e",
        ),
        ("m", 200, {"choices": [{"index": 0, "text": " q?", "finish_reason": "stop"}]}, "m: no log-probabilities"),
    ],
)
def test_errors_that_every_document_would_meet(
    collection: Path, openai_server: StandIn, engine: str, status: int, body: object, words: str
) -> None:
    openai_server.respond = lambda request: (status, body)
    done = generate(collection, openai_server.url, "--engine", engine, API_KEY="sk-secret")
    assert words in error_line(done)
    assert "sk-secret" not in done.stderr
    for path in collection.parent.iterdir():
        assert "sk-secret" not in path.read_text()
    assert (collection.parent / "queries.jsonl").read_bytes() == b""
    assert not errors(collection)
    # A 404 may be about the API: the other one is tried with the same document.
    documents = {document_of(request) for request in openai_server.requests}
    assert len(documents) == (3 if status == 400 else 1)
    assert len(openai_server.requests) == {400: 3, 404: 2}.get(status, 1)


def test_an_unreachable_server(collection: Path) -> None:
    assert "http://127.0.0.1:9/v1: the server cannot be reached" in error_line(
        generate(collection, "http://u:pw@127.0.0.1:9/v1?k=1")
    )
