"""Stage 1: what is requested and written, against a real language model and a stand-in for OpenAI."""

import json
import re
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, error_line, ok, rows, run, serve
from generation import EVERY, SCRIPT, errors, generate, meta, written
from stand_in import StandIn, completion, document_of, error

from inpars_lib.llm.client import GenerationClient


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_real_language_model_writes_queries(demo_data: Path, llm_url: str, tmp_path: Path, api: str) -> None:
    output = tmp_path / "queries.jsonl"
    args = ["--collection", demo_data / "collection.tsv", "--output", output, "--base_url", llm_url, "--engine", "any"]
    args += ["--max_examples", 3, "--min_doc_chars", 300, "--api", api, "--max_tokens", 20]
    args += ["--truncate_doc_chars", 100]  # most of the time is the prompt's
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


def test_the_token_limit_is_exceeded_by_requests_in_flight_only(large: Path, openai_server: StandIn) -> None:
    openai_server.latency = 0.05
    done = ok(generate(large, openai_server.url, "--concurrency", 16, "--max_total_tokens", 10_000))
    usage = meta(large)["usage"]
    spent, each = usage["prompt_tokens"] + usage["completion_tokens"], 230
    assert 10_000 <= spent < 10_000 + 16 * each
    assert "(--max_total_tokens 10,000). The answers to" in done.stderr
    assert len(written(large)) == len(openai_server.requests)


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


def test_max_total_tokens_counts_all_runs(collection: Path, openai_server: StandIn) -> None:
    limited = ["--max_total_tokens", 20 * 300 // 4, "--concurrency", 1]
    assert "stopping at" in ok(generate(collection, openai_server.url, *limited)).stderr
    first = len(openai_server.requests)
    assert 3 < first < 20
    ok(generate(collection, openai_server.url, *limited))
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
    assert re.search(r"about [\d.]+ (s|minutes) at [\d,.]+ documents per second", done.stdout)
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
