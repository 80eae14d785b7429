"""Stage 1: against a real language model, and against what only OpenAI's own servers answer."""

import base64
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, command_of, error_line, ok, rows, run, serve
from generation import EVERY, SCRIPT, errors, fails_for, flags, generate, meta, queries, start, written
from stand_in import FAULTS, StandIn, completion, document_of, error, prompt_of

from inpars_lib.formats.records import Doc
from inpars_lib.llm.client import GenerationClient
from inpars_lib.llm.prompt import PromptTemplate

# ------------------------------------------------------------------------------------------------------- a real one


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_real_language_model_writes_queries(demo_data: Path, llm_url: str, tmp_path: Path, api: str) -> None:
    output = tmp_path / "queries.jsonl"
    args = ["--collection", demo_data / "collection.tsv", "--output", output, "--base_url", llm_url, "--engine", "any"]
    args += ["--max_examples", 3, "--min_doc_chars", 300, "--api", api, "--max_tokens", 20]
    ok(run(SCRIPT, *args))
    texts = dict(line.split("\t") for line in (demo_data / "collection.tsv").read_text().splitlines())
    written = rows(output)
    log = tmp_path / "queries.jsonl.errors.jsonl"
    failed = rows(log) if log.exists() else []  # a small chat model may write an introduction without a question
    assert len({row["doc_id"] for row in [*written, *failed]}) == 3
    assert len(written) >= 2
    for row in written:
        assert row["doc_text"] == texts[row["doc_id"]]
        assert len(row["doc_text"]) >= 300
        assert row["question"] == row["question"].strip()
        assert "\n" not in row["question"]
        assert 1 <= len(row["log_probs"]) <= 20
        assert all(p <= 0 for p in row["log_probs"])
    before = output.read_bytes()
    ok(run(SCRIPT, *args))  # nothing is left to do
    assert output.read_bytes() == before
    ok(run(SCRIPT, *args, "--max_examples", 4))  # a larger sample contains the smaller one
    assert output.read_bytes().startswith(before)
    assert len(rows(output)) + len(rows(log) if log.exists() else []) == 4


def test_the_log_probs_of_a_real_model_are_those_of_the_question(demo_data: Path, llm_url: str, tmp_path: Path) -> None:
    """The log-probabilities equal those of a direct request with the same prompt."""
    from openai import OpenAI

    output = tmp_path / "queries.jsonl"
    args = ["--collection", demo_data / "collection.tsv", "--output", output, "--base_url", llm_url, "--engine", "any"]
    # What llama.cpp's prefix cache held before changes the rounding, and so perhaps the greedy answer.
    uncached = {"cache_prompt": False}
    ok(run(SCRIPT, *args, "--max_examples", 1, "--extra_body", json.dumps(uncached)))
    [row] = rows(output)
    prompt = (ROOT / "prompts/vanilla_prompt.txt").read_text().rstrip().replace("{document_text}", row["doc_text"])
    client = OpenAI(base_url=llm_url, api_key="none")
    answer = client.completions.create(
        model="any", prompt=prompt, max_tokens=64, temperature=0, logprobs=1, extra_body=uncached
    )
    text, log_probs = "", []
    for token in answer.choices[0].model_dump()["logprobs"]["content"]:
        if "\n" in token["token"] and text.strip():
            break
        text += token["token"]
        log_probs.append(token["logprob"])
    assert text.strip() == row["question"]
    assert log_probs == pytest.approx(row["log_probs"], abs=0.001)


# ------------------------------------------------------------------------------------------------- the whole script


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_run_finds_the_api_that_the_engine_speaks(collection: Path, openai_server: StandIn, api: str) -> None:
    openai_server.api = api
    done = ok(generate(collection, openai_server.url, "--max_examples", 5, API_KEY="sk-one", OPENAI_API_KEY="sk-two"))
    assert f"m is used through the {api} API" in done.stderr
    assert "5 queries written; 5 of 5 documents have one" in done.stderr
    for row in written(collection).values():
        assert list(row) == ["doc_id", "doc_text", "question", "log_probs"]
        assert row["question"] == f"what is {row['doc_text'].split()[0]} about?"
        assert row["log_probs"] == [-0.5, -1.0, -1.5, -2.0]
    assert set(openai_server.keys) == {"Bearer sk-one"}  # API_KEY goes before OPENAI_API_KEY
    asked = Counter(request["path"] for request in openai_server.requests)
    other = {"/v1/completions": 1, "/v1/chat/completions": 5}  # one request to find out
    assert asked == ({"/v1/completions": 5} if api == "completions" else other)
    assert meta(collection)["settings"]["api"] == api
    openai_server.requests.clear()
    ok(generate(collection, openai_server.url, "--max_examples", 6))  # what was found out is known now
    assert len(openai_server.requests) == 1


def test_the_request(collection: Path, openai_server: StandIn) -> None:
    ok(generate(collection, openai_server.url, "--max_examples", 5, "--api", "completions"))
    ok(generate(collection, openai_server.url, "--max_examples", 6, "--api", "chat", "--temperature", 0.5, "--force"))
    *first, last = openai_server.requests
    prompts = [request["prompt"] for request in first] + [last["messages"][0]["content"]]
    head = (ROOT / "prompts/vanilla_prompt.txt").read_text().partition("{document_text}")[0]
    assert all(prompt.startswith(head) for prompt in prompts)  # byte for byte: a server's prefix cache serves it
    assert all(prompt.endswith("\nRelevant Query:") for prompt in prompts)
    assert (first[0]["model"], first[0]["temperature"], first[0]["top_p"], first[0]["max_tokens"]) == ("m", 0, 1, 64)
    assert (first[0]["stop"], first[0]["logprobs"], "seed" in first[0]) == ("\n\n", 1, False)
    assert (last["max_completion_tokens"], last["logprobs"], last["seed"], last["temperature"]) == (64, True, 1, 0.5)


def test_parameters_that_newer_models_refuse(collection: Path, openai_server: StandIn) -> None:
    openai_server.api = "chat"
    openai_server.refuses = {
        "top_p": "Unsupported parameter: 'top_p'",
        "max_completion_tokens": "Unsupported parameter: 'max_completion_tokens'. Use 'max_tokens' instead.",
    }

    def respond(request: dict) -> tuple[int, object]:
        if "messages" in request and "temperature" in request and request.get("reasoning_effort") != "none":
            return error(400, "'temperature' does not support 0 with this model.", "unsupported_value", "temperature")
        return openai_server.answer(request)

    openai_server.respond = respond
    done = ok(generate(collection, openai_server.url))
    assert set(written(collection)) == EVERY
    for words in ("with reasoning_effort none", "refuses top_p. It is omitted", "Using max_tokens instead"):
        assert done.stderr.count(words) == 1
    last = openai_server.requests[-1]
    assert (last["reasoning_effort"], last["temperature"], last["max_tokens"]) == ("none", 0, 64)
    assert "top_p" not in last
    assert len(openai_server.requests) == 20 + 4  # each is refused once, by the first document's; and the other API
    assert meta(collection)["request"]["refused"] == ["max_completion_tokens", "top_p"]


def test_reasoning_effort_is_passed_on(collection: Path, openai_server: StandIn) -> None:
    ok(generate(collection, openai_server.url, "--max_examples", 1, "--reasoning_effort", "minimal", "--api", "chat"))
    assert openai_server.requests[0]["reasoning_effort"] == "minimal"


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


def test_braces_are_harmless(tmp_path: Path, openai_server: StandIn) -> None:
    (tmp_path / "collection.tsv").write_text("d\tdef f(): return {document_text} or {x} {}\n")
    template = tmp_path / "prompt.txt"
    template.write_text('{"json": {}} {0} {document_text}\nQuery:\n')
    openai_server.respond = lambda request: (200, completion(" a question\n\n"))
    ok(generate(tmp_path / "collection.tsv", openai_server.url, "--prompt_template", template))
    assert openai_server.requests[0]["prompt"] == ('{"json": {}} {0} def f(): return {document_text} or {x} {}\nQuery:')
    template.write_text("no slot {document}")
    done = generate(tmp_path / "collection.tsv", openai_server.url, "--prompt_template", template)
    assert "no {document_text} in this prompt" in error_line(done)


def test_echo_keeps_the_documents_log_probs_apart(collection: Path, openai_server: StandIn) -> None:
    openai_server.respond = lambda r: (200, completion(" a question\n", prompt=r["prompt"] if r["echo"] else ""))
    ok(generate(collection, openai_server.url, "--max_examples", 2, "--include_doc_probs"))
    for row in written(collection).values():
        assert row["question"] == "a question"
        assert row["log_probs"] == [-0.5, -1.0]
        assert row["doc_log_probs"] == [-9.0] * len(row["doc_text"].split())


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
    ok(generate(collection, openai_server.url, "--min_doc_chars", 50, "--max_doc_chars", 80))
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


# ----------------------------------------------------------------------------------------- several queries per document

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
    assert "the key was not accepted" in error_line(generate(collection, openai_server.url, *args))
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
    assert "6 requests sent, 0 of them without a query, 4 with a duplicate; nothing was written" in done.stdout
    assert "per request: 100 tokens in" in done.stdout
    assert "all 12: 1,200 tokens in" in done.stdout
    assert "requests per second" in done.stdout
    assert not (numbered.parent / "queries.jsonl").exists()


def test_greedy_decoding_gives_one_query_per_document(collection: Path) -> None:
    done = generate(collection, "http://127.0.0.1:9/v1", "--queries_per_doc", 2)
    assert "--queries_per_doc above 1 needs a --temperature above 0" in error_line(done, 2)


# ------------------------------------------------------------------------------------------- many requests at a time


def test_requests_go_out_concurrently(collection: Path, openai_server: StandIn) -> None:
    together = threading.Barrier(4)  # broken, and with it every answer, unless four requests are here at a time

    def respond(request: dict) -> tuple[int, object]:
        if len(openai_server.requests) > 1:  # the first goes alone
            together.wait(timeout=60)
        return openai_server.answer(request)

    openai_server.respond = respond
    ok(generate(collection, openai_server.url, "--max_examples", 9, "--concurrency", 4))
    assert len(written(collection)) == 9
    assert openai_server.most_under_way == 4


def test_several_servers_share_the_work(collection: Path, openai_server: StandIn) -> None:
    other = StandIn()
    together = threading.Barrier(2)

    def respond(request: dict) -> tuple[int, object]:
        if len(openai_server.requests) + len(other.requests) > 1:
            together.wait(timeout=60)
        return openai_server.answer(request)

    openai_server.respond = other.respond = respond
    with serve(other.handler()) as url:
        both = ["--base_url", openai_server.url, f"{url}/v1", "--concurrency", 2, "--max_examples", 9]
        ok(generate(collection, openai_server.url, *both))
    assert len(written(collection)) == 9
    assert min(len(openai_server.requests), len(other.requests)) >= 4
    gone = ["--base_url", f"{url}/v1", openai_server.url]  # the first is gone now, and the second does all
    openai_server.respond = openai_server.answer
    ok(generate(collection, openai_server.url, *gone))
    assert set(written(collection)) == EVERY


def test_the_concurrency_limit_falls_and_recovers(collection: Path, openai_server: StandIn) -> None:
    """The server accepts 3 requests at a time until it has answered 100, then any number."""
    collection.write_text("".join(f"d{i}\tnumber{i} word\n" for i in range(300)))
    openai_server.latency = 0.05  # long beside what a slow machine needs for a request
    openai_server.headers = {"Retry-After": "0.02"}
    answered, refused, later = [], [], []

    def respond(request: dict) -> tuple[int, object]:
        now = openai_server.under_way
        if len(answered) < 100 and now > 3:
            refused.append(now)
            return error(429, "slow down", "rate_limit_exceeded")
        (answered if len(answered) < 100 else later).append(now)
        return openai_server.answer(request)

    openai_server.respond = respond
    ok(generate(collection, openai_server.url, "--concurrency", 16))
    assert len(written(collection)) == 300
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
        if "is unreachable. Waiting" in line:
            break
    server, _ = serve_alone(int(re.search(r":(\d+)/", url)[1]))
    said = process.stderr.read()
    server.kill()
    assert process.wait() == 0, said
    assert "is back" in said
    assert set(written(collection)) == EVERY
    assert not errors(collection)


def test_a_server_that_does_not_come_back(collection: Path, openai_server: StandIn) -> None:
    def respond(request: dict) -> tuple[int, object]:
        return openai_server.answer(request) if len(openai_server.requests) < 5 else (503, b"<html>")

    openai_server.respond = respond
    openai_server.headers = {"Retry-After": "0.1"}
    said = error_line(generate(collection, openai_server.url, "--patience", 1))
    assert "and no answer for 1 s. Answers so far are saved" in said
    assert len(written(collection)) == 4
    assert not errors(collection)  # the server's fault, and no document's


# ---------------------------------------------------------------------------------- what goes wrong with one document


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
        ("hang", "no answer in 0.5 s", 4),
        ("500", "the server failed (500 The server had an error), 7 times", 7),
    ],
)
def test_a_failing_document_does_not_affect_the_others(
    collection: Path, openai_server: StandIn, fault: str, reason: str, requests: int
) -> None:
    openai_server.fault = fails_for(7, fault)
    openai_server.headers = {"Retry-After": "0.1"}
    done = ok(generate(collection, openai_server.url, "--timeout", 0.5))
    assert set(written(collection)) == EVERY - {"d7"}
    assert set(errors(collection)) == {"d7"}
    assert reason in errors(collection)["d7"]
    assert "19 of 20 documents have one, 1 failed, 0 are left" in done.stderr
    assert f"most common failures: {errors(collection)['d7'][:80]} (1)" in done.stderr
    assert len(openai_server.requests) == 19 + requests
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


# ------------------------------------------------------------------------------------ nothing lost, nothing paid twice


@pytest.mark.slow
def test_kills_lose_nothing_and_repeat_nothing(collection: Path, openai_server: StandIn) -> None:
    """SIGKILL after the k-th request of a run, k random, every fifth request failing. `KILLS=100` for more."""
    kills, chance = int(os.environ.get("KILLS", 8)), random.Random(0)
    documents = 40 * kills
    collection.write_text("".join(f"d{i}\tnumber{i} word\n" for i in range(documents)))
    output = collection.parent / "queries.jsonl"
    on_disk: set[str] = set()
    read = sent_twice = answered = countdown = 0
    lock, reached = threading.Lock(), threading.Event()

    def respond(request: dict) -> tuple[int, object]:
        nonlocal read, sent_twice, answered, countdown
        with lock:  # what stands in the file when the request comes
            countdown -= 1
            if countdown == 0:
                reached.set()
            new = output.read_bytes()[read:]
            new = new[: new.rfind(b"\n") + 1]
            read += len(new)
            on_disk.update(json.loads(line)["doc_id"] for line in new.splitlines())
            sent_twice += f"d{document_of(request)[6:]}" in on_disk
        status, body = openai_server.answer(request)
        whole = isinstance(body, dict) and (body.get("choices") or [{}])[0].get("logprobs")
        answered += bool(status == 200 and whole)
        return status, body

    openai_server.respond = respond
    openai_server.faults = 0.2
    faults = [fault for fault in FAULTS if fault != "429"]  # without a header that one costs a second each time

    def fault(_: dict) -> str | None:
        with lock:
            return chance.choice(faults) if chance.random() < openai_server.faults else None

    openai_server.fault = fault
    killed = 0
    for _ in range(2 * kills):  # a fault may end a run before its kill
        if killed == kills:
            break
        reached.clear()
        countdown = chance.randint(1, 30)
        process = start(collection, openai_server.url, "--retry_errors", "--concurrency", 4)
        while process.poll() is None and not reached.wait(0.01):
            pass
        before = output.read_bytes() if output.exists() else b""
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stderr.close()
        after = output.read_bytes() if output.exists() else b""
        assert after.startswith(before)
        if chance.random() < 0.5 and b"\n" in after:  # a kill in the middle of a write, which is rare, made by hand
            with output.open("ab") as file:
                file.write(after[: after.index(b"\n") // 2])
    openai_server.faults = 0
    ok(generate(collection, openai_server.url, "--retry_errors"))
    lost = documents - len(written(collection))
    on_the_wire = answered - documents
    print(
        f"\n{killed} kills, {len(openai_server.requests):,} requests for {documents:,} documents: {lost} lost, "
        f"{sent_twice} sent twice after their answer was on disk, {on_the_wire} answers on the wire when a kill came"
    )
    assert (killed, lost, sent_twice) == (kills, 0, 0)
    assert len(openai_server.requests) > documents  # the kills came while requests were in flight


def test_a_torn_last_line_is_repaired(collection: Path, openai_server: StandIn) -> None:
    output = collection.parent / "queries.jsonl"
    ok(generate(collection, openai_server.url, "--max_examples", 7))
    kept = output.read_text()
    with output.open("a") as file:
        file.write('{"doc_id": "d1", "doc_te')
    openai_server.requests.clear()
    done = ok(generate(collection, openai_server.url))
    assert "7 of 20 documents were finished by earlier runs" in done.stderr
    assert output.read_text().startswith(kept)
    assert set(written(collection)) == EVERY
    assert len(openai_server.requests) == 13


def interrupt(process: subprocess.Popen, asked: threading.Event) -> None:
    """Send Ctrl-C while a request is in flight, and return after the script has announced that it stops."""
    assert asked.wait(60)
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "Stopping" in line:
            break


@pytest.mark.slow
def test_ctrl_c_waits_for_the_requests_in_flight(collection: Path, openai_server: StandIn) -> None:
    asked, go = threading.Event(), threading.Event()

    def respond(request: dict) -> tuple[int, object]:
        asked.set()
        go.wait(60)
        return openai_server.answer(request)

    openai_server.respond = respond
    process = start(collection, openai_server.url)
    interrupt(process, asked)
    go.set()
    assert "Run the same command again to resume" in process.stderr.read()
    assert process.wait() == 130
    assert len(written(collection)) == 1
    assert len(openai_server.requests) == 1


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(collection: Path, openai_server: StandIn) -> None:
    asked = threading.Event()

    def respond(request: dict) -> tuple[int, object]:
        asked.set()
        return -1, {}

    openai_server.respond = respond
    process = start(collection, openai_server.url)
    interrupt(process, asked)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    process.stderr.close()


def test_two_processes_do_not_write_one_output(collection: Path, openai_server: StandIn) -> None:
    with (collection.parent / "queries.jsonl").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is writing to this file" in error_line(generate(collection, openai_server.url))
    assert not openai_server.requests


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--engine", "n"], 'engine "m", now "n"'),
        (["--seed", 2], "seed 1, now 2"),
        (["--temperature", 0.5], "temperature 0.0, now 0.5"),
        (["--api", "chat"], 'api "completions", now "chat"'),
        (["--good_bad"], "good_bad false, now true"),
        (["--prompt_template", ROOT / "prompts/gbq_prompt.txt"], "the prompt differs"),
    ],
)
def test_other_settings_on_the_same_output(
    collection: Path, openai_server: StandIn, change: list[object], words: str
) -> None:
    ok(generate(collection, openai_server.url, "--max_examples", 3))
    before = (collection.parent / "queries.jsonl").read_bytes()
    openai_server.requests.clear()
    said = error_line(generate(collection, openai_server.url, *change))
    assert "made with other settings" in said
    assert words in said
    assert not openai_server.requests
    assert (collection.parent / "queries.jsonl").read_bytes() == before
    if "--engine" in change:
        ok(generate(collection, openai_server.url, *change, "--force"))
        assert set(written(collection)) == EVERY
        assert meta(collection)["settings"]["engine"] == "n"


def test_settings_of_a_run_that_wrote_nothing_do_not_count(collection: Path, openai_server: StandIn) -> None:
    openai_server.respond = lambda request: error(401, "no")
    assert "the key was not accepted" in error_line(generate(collection, openai_server.url))
    openai_server.respond = openai_server.answer
    ok(generate(collection, openai_server.url, "--engine", "n"))


@pytest.mark.slow
def test_a_full_disk_leaves_whole_rows(collection: Path, openai_server: StandIn) -> None:
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    command = command_of(SCRIPT, *flags(collection, openai_server.url))
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert "File too large" in error_line(done)
    assert 3 < len(written(collection)) < 20
    assert (collection.parent / "queries.jsonl").read_bytes().endswith(b"\n")
    ok(generate(collection, openai_server.url))
    assert set(written(collection)) == EVERY


# --------------------------------------------------------------- innocent documents, secrets, odd servers and answers


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "collection.tsv"
    path.write_text("".join(f"d{i}\tnumber{i} some words\n" for i in range(200)))
    return path


@pytest.mark.parametrize("down", [range(21, 121), range(197, 237)], ids=["in the middle", "at the end"])
def test_an_outage_fails_no_document(
    large: Path, openai_server: StandIn, monkeypatch: pytest.MonkeyPatch, down: range
) -> None:
    """At the end no document is left that could be answered in between."""
    monkeypatch.setattr("inpars_lib.llm.server.FIRST_WAIT", 0.002)
    monkeypatch.setattr("inpars_lib.llm.server.Server.on_overload", lambda *_: None)  # the concurrency stays at 8
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
    ok(generate(large, openai_server.url, "--concurrency", 64, "--timeout", 0.3, "--max_examples", 120))
    assert len(written(large)) == 120
    assert not errors(large)


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


def test_a_key_with_a_newline_is_stripped_and_never_shown(collection: Path, openai_server: StandIn) -> None:
    done = ok(generate(collection, openai_server.url, API_KEY="sk-secret\n"))
    assert set(openai_server.keys) == {"Bearer sk-secret"}
    assert "sk-secret" not in done.stderr
    refused = error_line(generate(collection, openai_server.url, API_KEY="sk-sécret"))
    assert "API_KEY: the key has characters" in refused
    assert "cret" not in refused


def test_openais_key_goes_to_openai_only(collection: Path, openai_server: StandIn) -> None:
    ok(generate(collection, openai_server.url, OPENAI_API_KEY="sk-openai"))
    assert not any("sk-openai" in key for key in openai_server.keys)


def test_a_wait_of_zero_is_no_invitation(collection: Path, openai_server: StandIn) -> None:
    openai_server.headers = {"Retry-After": "0"}
    openai_server.respond = lambda request: (
        openai_server.answer(request) if len(openai_server.requests) < 5 else error(429, "slow down")
    )
    generate(collection, openai_server.url, "--patience", 2)
    assert len(openai_server.requests) < 50  # without a floor, hundreds per second


def test_a_dripping_answer_times_out(collection: Path, openai_server: StandIn) -> None:
    openai_server.fault = fails_for(7, "drip")
    ok(generate(collection, openai_server.url, "--timeout", 0.5))
    assert "no answer in 0.5 s" in errors(collection)["d7"]


def test_the_token_limit_holds_for_requests_in_flight(large: Path, openai_server: StandIn) -> None:
    """The prompts grow, and 32 requests are in flight when the limit is near."""
    large.write_text("".join(f"d{i}\tnumber{i}{' word' * (20 * i + 1)}\n" for i in range(60)))
    openai_server.latency = 0.05
    args = ["--sampling", "first", "--concurrency", 32, "--max_total_tokens", 20_000, "--max_doc_chars", 10**6]
    ok(generate(large, openai_server.url, *args))
    usage = meta(large)["usage"]
    assert 10_000 < usage["prompt_tokens"] + usage["completion_tokens"] <= 20_000


def test_tokens_are_estimated_if_the_server_counts_none(collection: Path, openai_server: StandIn) -> None:
    def respond(request: dict) -> tuple[int, object]:
        status, body = openai_server.answer(request)
        return status, {**body, "usage": None}

    openai_server.respond = respond
    done = ok(generate(collection, openai_server.url, "--max_total_tokens", 3000))
    assert done.stderr.count("The server does not count tokens") == 1
    assert len(written(collection)) < 20


def test_a_projection_of_the_steady_state() -> None:
    """The first answer, which shows the API, and the last ones, when nothing is left to send, do not count."""
    store = SimpleNamespace(answered=60)
    client = SimpleNamespace(steady_answers=40, first_answer_at=10.0, steady_until=12.0, store=store)
    assert GenerationClient.rate(client, 30.0) == 20.0
    client.steady_answers = 0  # a few documents, all sent at once
    assert GenerationClient.rate(client, 30.0) == 2.0


def test_another_collection_on_the_same_output(collection: Path, openai_server: StandIn) -> None:
    ok(generate(collection, openai_server.url))
    collection.write_text("".join(f"d{i}\tnumber{i} of another\n" for i in range(20)))
    assert "made with other settings (the collection differs)" in error_line(generate(collection, openai_server.url))


def test_an_id_with_two_texts_is_refused_before_any_request(collection: Path, openai_server: StandIn) -> None:
    with collection.open("a") as file:
        file.write("d3\tnumber3 again\n")
    assert "the id d3 is on two lines with different texts" in error_line(generate(collection, openai_server.url))
    assert not openai_server.requests


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
    assert words in error_line(generate(collection, openai_server.url))


def test_a_proxy_is_named(collection: Path) -> None:
    done = generate(collection, "http://127.0.0.1:9/v1", HTTP_PROXY="http://127.0.0.1:9", NO_PROXY=None, no_proxy=None)
    assert "The environment has a proxy, HTTP_PROXY" in error_line(done)


# --------------------------------------------------------------------------------------------------------- any server


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("/openai/v1", "/openai/v1/chat/completions"),
        ("/openai/v1/?api-version=preview", "/openai/v1/chat/completions?api-version=preview"),
        (
            "/openai/deployments/my-gpt?api-version=2024-10-21&a=b%20c",
            "/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21&a=b+c",
        ),
    ],
)
def test_azures_addresses(collection: Path, openai_server: StandIn, address: str, path: str) -> None:
    server = openai_server.url.removesuffix("/v1") + address
    key = ["--header", "api-key=azure-secret", "--header", "X-Team= search = 1 "]
    done = ok(generate(collection, server, "--api", "chat", *key))
    assert set(written(collection)) == EVERY
    assert {(method, path) for method, path, _ in openai_server.received} == {("POST", path)}
    for _, _, headers in openai_server.received:
        assert (headers["api-key"], headers["x-team"]) == ("azure-secret", "search = 1")
        assert "authorization" not in headers  # a made-up key must not stand beside the real one
    assert "azure-secret" not in done.stderr
    for file in collection.parent.iterdir():
        assert "azure-secret" not in file.read_text()


def test_headers_and_key_go_together(collection: Path, openai_server: StandIn) -> None:
    ok(generate(collection, openai_server.url, "--header", "X-Title=InPars", "--max_examples", 1, API_KEY="sk-one"))
    assert openai_server.keys == ["Bearer sk-one"]
    mine = ["--header", "authorization=Bearer mine", "--max_examples", 2]
    ok(generate(collection, openai_server.url, *mine, API_KEY="sk-one"))
    assert openai_server.keys == ["Bearer sk-one", "Bearer mine"]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"error": {"message": "Header-Secret is not known, nor is sk-header: sk-key"}}),
        (400, {"error": {"message": "Header-Secret sk-header is not known, sk-key"}}),
        (404, {"error": {"message": "Header-Secret sk-header is not known, sk-key"}}),
        (200, {"error": {"message": "Header-Secret sk-header is not known, sk-key"}}),
        (500, {"error": {"message": "Header-Secret sk-header is not known, sk-key"}}),
    ],
)
def test_a_server_that_quotes_the_headers(collection: Path, openai_server: StandIn, status: int, body: object) -> None:
    def respond(request: dict) -> tuple[int, object]:
        return openai_server.answer(request) if document_of(request) == "number0" else (status, body)

    openai_server.respond = respond
    secrets = ["--header", "Authorization=Bearer sk-header", "--header", "X-Key=Header-Secret", "--patience", 0.5]
    for api in ([], ["--batch", "--batch_poll", 0, "--retry_errors"]):
        done = generate(collection, openai_server.url, *secrets, *api, API_KEY="sk-key")
        assert "is not known" in done.stderr or status == 401
        said = done.stderr + "".join(path.read_text() for path in collection.parent.iterdir())
        for secret in ("Header-Secret", "sk-header", "sk-key"):
            assert secret not in said


@pytest.mark.parametrize(("status", "api"), [(400, "completions"), (404, "chat"), (200, "chat")])
def test_a_long_message_that_quotes_a_secret(collection: Path, openai_server: StandIn, status: int, api: str) -> None:
    """Messages are shortened to 300 characters, which would cut the last secret."""
    secret = "SECRETabcdefghijklmnopqrstuvwxyz0123456789"
    body = {"error": {"message": f"{'x' * 120} {secret[::-1]} {'x' * 115} {secret} is bad"}}
    openai_server.respond = lambda request: (status, body)
    args = ["--api", api, "--header", f"X-Key={secret[::-1]}", "--patience", 0.5]
    for more in ([], ["--batch", "--batch_poll", 0, "--retry_errors"]):
        done = generate(collection, openai_server.url, *args, *more, API_KEY=secret)
        said = done.stderr + "".join(path.read_text() for path in collection.parent.iterdir())
        assert "xxx" in said
        assert "SECRET" not in said
        assert "TERCES" not in said


def test_the_rest_of_an_unquoted_header_is_not_printed(collection: Path, openai_server: StandIn) -> None:
    args = ["--header", "Authorization=Bearer", "SECRET"]
    assert "SECRET" not in error_line(generate(collection, openai_server.url, *args), 2)
    unknown = error_line(generate(collection, openai_server.url, "--nonsense=1", "word"), 2)
    assert unknown.endswith("unrecognized arguments: --nonsense")


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("api-key: s3cret", "expected NAME=VALUE"),
        ("api key=s3cret", "expected NAME=VALUE"),
        ("=s3cret", "expected NAME=VALUE"),
        ("api-key=s3cret\nHost: x", "the value of api-key"),
        ("api-key=s3crét", "the value of api-key"),
        ("api-key= ", "the value of api-key"),
    ],
)
def test_malformed_headers_are_not_quoted(collection: Path, header: str, problem: str) -> None:
    done = generate(collection, "http://127.0.0.1:9/v1", "--header", header)
    assert problem in error_line(done, 2)
    assert "s3cr" not in done.stderr


@pytest.mark.parametrize("batch", [[], ["--batch", "--batch_poll", 0]])
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_extra_fields_of_the_body(collection: Path, openai_server: StandIn, api: str, batch: list[object]) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 20, "stop": ["\n"], "név": "é"}
    ok(generate(collection, openai_server.url, "--api", api, "--extra_body", json.dumps(extra), *batch))
    assert all(request | extra == request for request in openai_server.requests)
    assert len(openai_server.requests) == 20
    assert meta(collection)["settings"]["extra_body"] == extra
    assert "top_k" not in meta(collection)["request"]["parameters"]
    said = error_line(generate(collection, openai_server.url, "--api", api, *batch))
    assert "made with other settings (extra_body {" in said
    ok(generate(collection, openai_server.url, "--api", api, "--extra_body", json.dumps(extra), *batch))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('{"n": 8}', "n: set by this script"),
        ('{"stream": true, "echo": true, "x": 1}', "echo, stream: set by this script"),
        ('{"logprobs": 5}', "logprobs: set"),
        ('{"messages": []}', "messages: set"),
        ('{"prompt": ""}', "prompt: set"),
        ('{"temperature": 1}', "temperature: set by this script. Use its flags"),
        ('{"max_completion_tokens": 1}', "max_completion_tokens: set"),
        ("[1]", "expected a JSON object: not a JSON object"),
        ("{'a': 1}", "expected a JSON object: not JSON"),
        ('{"a": NaN}', "expected a JSON object"),
        ('{"a": "\\ud83d"}', "expected a JSON object"),
        ("", "expected a JSON object"),
    ],
)
def test_fields_that_the_pipeline_depends_on_are_refused(collection: Path, body: str, problem: str) -> None:
    assert problem in error_line(generate(collection, "http://127.0.0.1:9/v1", "--extra_body", body), 2)


def test_a_refused_extra_field_stops_the_run(collection: Path, openai_server: StandIn) -> None:
    openai_server.refuses = {"top_k": "Unrecognized request argument supplied: 'top_k'"}
    done = generate(collection, openai_server.url, "--extra_body", '{"top_k": 20}')
    assert "m: --extra_body top_k was refused (Unrecognized request argument" in error_line(done)
    assert len(openai_server.requests) == 1
    openai_server.refuses = {}
    openai_server.respond = lambda request: (
        error(400, "no provider found") if document_of(request) == "number7" else openai_server.answer(request)
    )
    ok(generate(collection, openai_server.url, "--extra_body", '{"provider": {"only": ["a"]}}'))  # one document's
    assert errors(collection) == {"d7": "no provider found"}


@pytest.mark.parametrize("batch", [[], ["--batch", "--batch_poll", 0]])
def test_a_system_prompt_needs_the_chat_api(collection: Path, openai_server: StandIn, batch: list[object]) -> None:
    system = ["--system_prompt", "You write “queries”.\nOnly one."]
    ok(generate(collection, openai_server.url, *system, *batch))
    assert set(written(collection)) == EVERY
    for request in openai_server.requests:
        assert request["path"] == "/v1/chat/completions"
        first, second = request["messages"]
        assert first == {"role": "system", "content": system[1]}
        assert second["role"] == "user"
        assert second["content"].endswith("Relevant Query:")
    assert meta(collection)["settings"]["system_prompt"] == system[1]
    assert 'made with other settings (system_prompt "You' in error_line(generate(collection, openai_server.url))
    for other in (["--api", "completions"], ["--include_doc_probs"]):
        assert "--system_prompt needs --api chat" in error_line(generate(collection, "http://h", *system, *other), 2)


def test_an_output_of_an_earlier_version_is_resumed(collection: Path, openai_server: StandIn) -> None:
    """Format version 1 recorded settings that are not set, and called the prompt by another name."""
    ok(generate(collection, openai_server.url, "--max_examples", 3))
    path = collection.parent / "queries.jsonl.meta.json"
    before = json.loads(path.read_text())
    before["settings"]["prompt_sha256"] = before["settings"].pop("prompt")
    path.write_text(
        json.dumps(before | {"format_version": 1, "settings": {"reasoning_effort": None} | before["settings"]})
    )
    for change in (["--extra_body", '{"top_k": 1}'], ["--truncate_doc_chars", 9], ["--sampling_seed", 2]):
        assert "made with other settings" in error_line(generate(collection, openai_server.url, *change))
    ok(generate(collection, openai_server.url))
    assert set(written(collection)) == EVERY


# -------------------------------------------------------------------------------------------------------------- money


def test_tokens_are_summed_over_all_runs(collection: Path, openai_server: StandIn) -> None:
    ok(generate(collection, openai_server.url, "--max_examples", 8))
    done = ok(generate(collection, openai_server.url))
    words = sum(len(request["prompt"].split()) for request in openai_server.requests)
    cached = sum(len(request["prompt"].split()) // 2 for request in openai_server.requests)
    total = {"prompt_tokens": words, "cached_tokens": cached, "completion_tokens": 20 * 6}
    assert meta(collection)["usage"] == total
    assert f"all runs {words:,} in ({cached:,} cached), 120 out" in done.stderr


def test_max_total_tokens_stops_before_it_is_exceeded(collection: Path, openai_server: StandIn) -> None:
    whole = 20 * 300
    done = ok(generate(collection, openai_server.url, "--max_total_tokens", whole // 4))
    assert "stopping at" in done.stderr
    spent = meta(collection)["usage"]
    assert whole // 4 - 400 < spent["prompt_tokens"] + spent["completion_tokens"] <= whole // 4
    first = len(openai_server.requests)
    ok(generate(collection, openai_server.url, "--max_total_tokens", whole // 4))  # of all runs together
    assert len(openai_server.requests) == first
    ok(generate(collection, openai_server.url))
    assert set(written(collection)) == EVERY


def test_a_dry_run_projects_and_writes_nothing(collection: Path, openai_server: StandIn) -> None:
    done = ok(generate(collection, openai_server.url, "--dry_run", 4))
    assert sorted(path.name for path in collection.parent.iterdir()) == ["collection.tsv"]
    assert len(openai_server.requests) == 4
    words = sum(len(request["prompt"].split()) for request in openai_server.requests)
    assert f"per document: {words / 4:,.0f} tokens in" in done.stdout
    assert f"all 20: {words / 4 * 20:,.0f} tokens in" in done.stdout
    assert "120 out" in done.stdout
    assert "hours at" in done.stdout
    assert "Question: what is number" in done.stderr


def test_the_summary_of_the_questions(collection: Path, openai_server: StandIn) -> None:
    def respond(request: dict) -> tuple[int, object]:
        number = int(document_of(request)[6:])
        return 200, completion(" word word" if number < 3 else f" what is {number}" if number < 10 else " same here")

    openai_server.respond = respond
    done = ok(generate(collection, openai_server.url))
    # 3 + 7 + 10 questions, of which 1 + 7 + 1 differ; three stand in their documents
    assert "questions: 2 to 3 words, median 2; 11 duplicates, 3 copied from the document" in done.stderr
    expected = (13 * -0.75 + 7 * -1.0) / 20
    assert f"mean log-probability {expected:.3f}" in done.stderr


# ------------------------------------------------------------------------------------------------ one error_line each

NOT_FOUND = {"error": {"message": "The model `curie` has been deprecated", "code": "model_not_found"}}


@pytest.mark.parametrize(
    ("engine", "status", "body", "words"),
    [
        ("curie", 404, NOT_FOUND, "--engine curie: OpenAI shut down its GPT-3 models in January 2024"),
        ("text-davinci-003", 404, NOT_FOUND, "--base_url http://HOST:8000/v1"),
        ("gpt-4o", 404, NOT_FOUND, "Use a current OpenAI model (--engine gpt-6-luna)"),
        ("gpt-9", 404, {"error": {"message": "no such model"}}, "status 404 for engine gpt-9"),
        ("m", 401, {"error": {"message": "Incorrect API key provided: sk-secret"}}, "the key was not accepted (401)"),
        ("m", 403, {"error": {"message": "sk-secret may not"}}, "the key was not accepted (403)"),
        ("m", 429, {"error": {"message": "quota", "code": "insufficient_quota"}}, "no credit left"),
        ("m", 402, {"error": {"message": "Insufficient Balance"}}, "no credit left"),
        ("m", 400, {"error": {"message": "bad request, sk-secret"}}, "10 documents in a row failed"),
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
    assert len(documents) == (10 if status == 400 else 1)
    assert len(openai_server.requests) == {400: 10, 404: 2}.get(status, 1)


def test_a_user_in_the_address(collection: Path, openai_server: StandIn) -> None:
    ok(generate(collection, openai_server.url.replace("//", "//me:p%40ss@")))
    assert set(openai_server.keys) == {"Basic " + base64.b64encode(b"me:p@ss").decode()}


def test_an_unreachable_server(collection: Path) -> None:
    assert "http://127.0.0.1:9/v1: the server cannot be reached" in error_line(
        generate(collection, "http://u:pw@127.0.0.1:9/v1?k=1")
    )


def test_usage_errors(collection: Path) -> None:
    required = ["--collection", collection, "--output", collection.parent / "q.jsonl"]
    assert "API_KEY: not set. Run export API_KEY" in error_line(run(SCRIPT, *required))
    gone = error_line(run(SCRIPT, *required, "--engine", "curie"))  # known without a key
    assert "--engine curie: OpenAI shut down" in gone
    for way in ("--engine gpt-6-luna", "vLLM (--base_url http://HOST:8000/v1", "python demo/serve_llm.py --port 8080"):
        assert way in gone
    with_url = [*required, "--engine", "m", "--base_url", "http://127.0.0.1:9/v1"]
    assert "--api completions" in error_line(run(SCRIPT, *with_url, "--include_doc_probs", "--api", "chat"), 2)
    idle = run(SCRIPT, *with_url, "--concurrency", 0)
    assert "--concurrency: expected a whole number of at least 1, found '0'" in error_line(idle, 2)
    unlimited = run(SCRIPT, *with_url, "--batch", "--max_total_tokens", 9)
    assert "--max_total_tokens cannot stop a batch" in error_line(unlimited, 2)
    assert "No such file" in error_line(run(SCRIPT, *with_url, "--collection", "absent.tsv"))
    several = ["--base_url", "http://127.0.0.1:9/v1", "http://127.0.0.1:8/v1", "--batch"]
    assert "--batch uses one server" in error_line(run(SCRIPT, *required, *several), 2)
    assert not (collection.parent / "q.jsonl").exists()
