"""Stage 1: against a real language model, and against what only OpenAI's own servers answer."""

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, OpenAIServer, completion, ok, pieces, rows, run, sentence

from formats import Doc
from generate_queries_openai import align, read_answer

SCRIPT = "generate_queries_openai.py"


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    path = tmp_path / "collection.tsv"
    path.write_text("".join(f"d{i}\t{'word ' * (4 + i)}number{i}\n" for i in range(20)))
    return path


def generate(collection: Path, url: str, *args: object, **environment: str) -> subprocess.CompletedProcess:
    output = collection.parent / "queries.jsonl"
    required = [
        "--collection",
        collection,
        "--output",
        output,
        "--base_url",
        url,
        "--engine",
        "m",
        "--min_doc_chars",
        0,
    ]
    return run(SCRIPT, *required, *args, **environment)


# ------------------------------------------------------------------------------------------------------- a real one


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_real_language_model_writes_queries(demo_data: Path, llm_url: str, tmp_path: Path, api: str) -> None:
    output = tmp_path / "queries.jsonl"
    args = ["--collection", demo_data / "collection.tsv", "--output", output, "--base_url", llm_url, "--engine", "any"]
    args += ["--max_examples", 3, "--min_doc_chars", 300, "--api", api, "--max_tokens", 20]
    ok(run(SCRIPT, *args))
    texts = dict(line.split("\t") for line in (demo_data / "collection.tsv").read_text().splitlines())
    written = rows(output)
    assert len({row["doc_id"] for row in written}) == 3
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
    ok(run(SCRIPT, *args, "--max_examples", 4))  # a greater number adds to the draw
    assert output.read_bytes().startswith(before)
    assert len(rows(output)) == 4


def test_the_log_probs_of_a_real_model_are_those_of_the_question(demo_data: Path, llm_url: str, tmp_path: Path) -> None:
    """What is kept, token by token, is what the server gives when it is asked by hand for the same prompt."""
    from openai import OpenAI

    output = tmp_path / "queries.jsonl"
    args = ["--collection", demo_data / "collection.tsv", "--output", output, "--base_url", llm_url, "--engine", "any"]
    ok(run(SCRIPT, *args, "--max_examples", 1))
    [row] = rows(output)
    prompt = (ROOT / "prompts/vanilla_prompt.txt").read_text().rstrip().replace("{document_text}", row["doc_text"])
    client = OpenAI(base_url=llm_url, api_key="none")
    answer = client.completions.create(model="any", prompt=prompt, max_tokens=64, temperature=0, logprobs=1)
    text, log_probs = "", []
    for token in answer.choices[0].model_dump()["logprobs"]["content"]:
        if "\n" in token["token"] and text.strip():
            break
        text += token["token"]
        log_probs.append(token["logprob"])
    assert text.strip() == row["question"]
    # llama.cpp's 4-bit arithmetic differs by up to 0.1 with what its prefix cache held before.
    assert log_probs == pytest.approx(row["log_probs"], abs=0.3)


# ------------------------------------------------------------------------------------------ answers of every shape


def choice_of(text: str, tokens: list[str], log_probs: list[float]) -> dict:
    return {"text": text, "logprobs": {"tokens": tokens, "token_logprobs": log_probs}}


@pytest.mark.parametrize(
    ("text", "tokens", "question", "kept"),
    [
        (" What is X?", [" What", " is", " X", "?"], "What is X?", [0, 1, 2, 3]),
        ("\n\n What?\n\nExample 5:", ["\n\n", " What", "?", "\n\n", "Example", " 5", ":"], "What?", [1, 2]),
        ("What?", ["What", "?", "\n"], "What?", [0, 1]),  # the stop sequence comes among the tokens only
        ("What?", ["What", "?\n\n"], "What?", [0, 1]),  # one token holds the end and the stop sequence
        ("What?\nmore", ["What", "?\nm", "ore"], "What?", [0, 1]),
        ("What?", ["What", "?", "</s>"], "What?", [0, 1]),
        ("What?", ["What", "?", ""], "What?", [0, 1]),  # llama.cpp's last token
        (" What?", ["What", "?"], "What?", [0, 1]),  # sentencepiece tokens lose their first blank
        ("What ", ["What", " "], "What", [0]),
        ("是什么\n", ["是", "什\ufffd", "\ufffd", "\n"], "是什么", [0, 1, 2]),  # vLLM's pieces of a character
        ("a\ufffd", ["a", "bytes:\\xe6\\x98"], "a", [0]),  # the token limit cut a character in two
        ("\u3000是什么?", ["\u3000", "是什么", "?"], "是什么?", [1, 2]),  # a blank that is not ASCII's
        ("🙂?", ["bytes:\\xf0\\x9f", "bytes:\\x99\\x82", "?"], "🙂?", [0, 1, 2]),  # OpenAI's pieces of a character
        ("", [], "", []),
        (" \n", [" ", "\n"], "", []),
    ],
)
def test_log_probs_are_those_of_the_question(text: str, tokens: list[str], question: str, kept: list[int]) -> None:
    log_probs = [-(2.0**i) for i in range(len(tokens))]  # every subset has a sum of its own
    row = read_answer(choice_of(text, tokens, log_probs), "prompt", Doc("d", "doc"), good_bad=False, echo=False)
    assert row["question"] == question
    assert row["log_probs"] == [log_probs[i] for i in kept]


def test_chat_tokens_come_as_bytes() -> None:
    content = [
        {"token": "\\xe6", "bytes": [230, 152], "logprob": -1.0},
        {"token": "?", "bytes": [175], "logprob": -2.0},
    ]
    choice = {"message": {"content": "是"}, "logprobs": {"content": content}}
    assert read_answer(choice, "p", Doc("d", "t"), good_bad=False, echo=False)["log_probs"] == [-1.0, -2.0]


def test_tokens_that_do_not_spell_the_answer_are_refused() -> None:
    with pytest.raises(ValueError, match="do not spell"):
        align(b"What is X?", [b"Who", b" is", b" X?"])


@pytest.mark.parametrize(
    ("text", "good", "bad", "kept"),
    [
        (" How far?\nBad Question: Is it far?", "How far?", "Is it far?", 2),
        (" How far? bad question: Is it far?", "How far?", "Is it far?", 2),
        (" How far?", "", "", 0),
        (" How far?\nBad Question:", "", "", 0),
    ],
)
def test_good_and_bad_questions(text: str, good: str, bad: str, kept: int) -> None:
    tokens = pieces(text)
    choice = choice_of(text, tokens, [-1.0 * i for i in range(len(tokens))])
    row = read_answer(choice, "p", Doc("d", "t"), good_bad=True, echo=False)
    assert (row["question"], row["bad_question"]) == (good, bad)
    assert row["log_probs"] == [-1.0 * i for i in range(kept)]


# ------------------------------------------------------------------------------------------------- the whole script


def test_a_run_against_openais_completions(collection: Path, openai_server: OpenAIServer) -> None:
    openai_server.respond = lambda request: (200, completion(" a question\n\n"))
    done = ok(generate(collection, openai_server.url, "--max_examples", 5, API_KEY="sk-one", OPENAI_API_KEY="sk-two"))
    assert "5 queries written" in done.stderr
    written = rows(collection.parent / "queries.jsonl")
    assert [set(row) for row in written] == [{"doc_id", "doc_text", "question", "log_probs"}] * 5
    assert all(row["question"] == "a question" and row["log_probs"] == [-0.5, -1.0] for row in written)
    request = openai_server.requests[0]
    assert request["path"] == "/v1/completions"
    assert (request["model"], request["temperature"], request["top_p"], request["max_tokens"]) == ("m", 0, 1, 64)
    head = (ROOT / "prompts/vanilla_prompt.txt").read_text().partition("{document_text}")[0]
    assert all(request["prompt"].startswith(head) for request in openai_server.requests)
    assert all(request["prompt"].endswith("\nRelevant Query:") for request in openai_server.requests)
    assert set(openai_server.keys) == {"Bearer sk-one"}  # API_KEY goes before OPENAI_API_KEY


def test_braces_are_harmless(tmp_path: Path, openai_server: OpenAIServer) -> None:
    (tmp_path / "collection.tsv").write_text("d\tdef f(): return {document_text} or {x} {}\n")
    template = tmp_path / "prompt.txt"
    template.write_text('{"json": {}} {0} {document_text}\nQuery:\n')
    ok(generate(tmp_path / "collection.tsv", openai_server.url, "--prompt_template", template))
    assert openai_server.requests[0]["prompt"] == ('{"json": {}} {0} def f(): return {document_text} or {x} {}\nQuery:')
    template.write_text("no slot {document}")
    done = generate(tmp_path / "collection.tsv", openai_server.url, "--prompt_template", template)
    assert "no {document_text} in it" in sentence(done)


def test_echo_keeps_the_documents_log_probs_apart(collection: Path, openai_server: OpenAIServer) -> None:
    openai_server.respond = lambda r: (200, completion(" a question\n", prompt=r["prompt"] if r["echo"] else ""))
    ok(generate(collection, openai_server.url, "--max_examples", 2, "--include_doc_probs"))
    for row in rows(collection.parent / "queries.jsonl"):
        assert row["question"] == "a question"
        assert row["log_probs"] == [-0.5, -1.0]
        assert row["doc_log_probs"] == [-9.0] * len(row["doc_text"].split())


def test_the_draw_depends_on_the_seed_and_not_on_the_order(collection: Path, openai_server: OpenAIServer) -> None:
    output = collection.parent / "queries.jsonl"

    def drawn(*args: object) -> set[str]:
        ok(generate(collection, openai_server.url, "--max_examples", 6, *args))
        ids = {row["doc_id"] for row in rows(output)}
        output.unlink()
        return ids

    first = drawn("--sampling", "first")
    assert first == {f"d{i}" for i in range(6)}
    one, two = drawn(), drawn("--seed", 2)
    assert len(one) == len(two) == 6
    assert len({frozenset(x) for x in (first, one, two)}) == 3
    collection.write_text("".join(reversed(collection.read_text().splitlines(keepends=True))))
    assert drawn() == one


def test_document_lengths(collection: Path, openai_server: OpenAIServer) -> None:
    lengths = {line.split("\t")[0]: len(line.split("\t")[1]) for line in collection.read_text().splitlines()}
    ok(generate(collection, openai_server.url, "--min_doc_chars", 50, "--max_doc_chars", 80))
    expected = {doc_id for doc_id, length in lengths.items() if 50 <= length <= 80}
    assert {row["doc_id"] for row in rows(collection.parent / "queries.jsonl")} == expected
    assert 0 < len(expected) < 20
    done = generate(collection, openai_server.url, "--min_doc_chars", 5000)
    assert "no document of 5000 to 100000 characters" in sentence(done)


def test_requests_go_out_concurrently(collection: Path, openai_server: OpenAIServer) -> None:
    together = threading.Barrier(4)  # broken, and with it every answer, unless four requests are here at a time

    def respond(_: dict) -> tuple[int, object]:
        together.wait(timeout=60)
        return 200, completion(" a question\n\n")

    openai_server.respond = respond
    ok(generate(collection, openai_server.url, "--max_examples", 8, "--concurrency", 4))
    assert len(rows(collection.parent / "queries.jsonl")) == 8


def test_a_kill_loses_nothing_and_repeats_nothing(collection: Path, openai_server: OpenAIServer) -> None:
    """SIGKILL after some answers; the second run asks for the rest alone, and each document is there once."""
    output = collection.parent / "queries.jsonl"
    enough = threading.Event()

    def respond(request: dict) -> tuple[int, object]:
        if len(openai_server.requests) > 7:
            enough.set()
            time.sleep(60 if process.poll() is None else 0)
        return 200, completion(" a question\n\n")

    openai_server.respond = respond
    command = [sys.executable, ROOT / SCRIPT, "--collection", collection, "--output", output, "--engine", "m"]
    command += ["--base_url", openai_server.url, "--min_doc_chars", "0", "--concurrency", "1"]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL)
    assert enough.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = output.read_text()
    assert len(kept.splitlines()) == 7
    with output.open("a") as file:
        file.write('{"doc_id": "d1", "doc_te')  # what a kill in the middle of a write leaves
    openai_server.requests.clear()
    openai_server.respond = lambda request: (200, completion(" another question\n\n"))
    done = ok(generate(collection, openai_server.url))
    assert "7 of 20 documents have their query already" in done.stderr
    assert output.read_text().startswith(kept)
    assert Counter(row["doc_id"] for row in rows(output)) == Counter(f"d{i}" for i in range(20))
    assert len(openai_server.requests) == 13


def test_ctrl_c_waits_for_the_answers_under_way(collection: Path, openai_server: OpenAIServer) -> None:
    output = collection.parent / "queries.jsonl"
    asked, answer = threading.Event(), threading.Event()

    def respond(_: dict) -> tuple[int, object]:
        asked.set()
        answer.wait(60)
        return 200, completion(" a question\n\n")

    openai_server.respond = respond
    command = [sys.executable, ROOT / SCRIPT, "--collection", collection, "--output", output, "--engine", "m"]
    command += ["--base_url", openai_server.url, "--min_doc_chars", "0", "--concurrency", "1"]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert asked.wait(60)
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "Stopping" in line:
            break
    answer.set()
    assert "the same command goes on from here" in process.stderr.read()
    assert process.wait() == 1
    assert len(rows(output)) == 1
    assert len(openai_server.requests) == 1


def test_two_processes_do_not_write_one_output(collection: Path, openai_server: OpenAIServer) -> None:
    import fcntl

    with (collection.parent / "queries.jsonl").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is writing to it" in sentence(generate(collection, openai_server.url))
    assert not openai_server.requests


def test_a_busy_server_is_asked_again(collection: Path, openai_server: OpenAIServer) -> None:
    def respond(_: dict) -> tuple[int, object]:
        turn = len(openai_server.requests)
        if turn in (1, 3):
            return (429, {"error": {"message": "slow down"}}) if turn == 1 else (503, b"<html>")
        return 200, completion(" a question\n\n")

    openai_server.respond = respond
    ok(generate(collection, openai_server.url, "--max_examples", 4, "--concurrency", 1))
    assert len(rows(collection.parent / "queries.jsonl")) == 4
    assert len(openai_server.requests) == 6


def test_one_refused_document_does_not_end_the_run(collection: Path, openai_server: OpenAIServer) -> None:
    def respond(request: dict) -> tuple[int, object]:
        if "number3\n" in request["prompt"]:
            return 400, {"error": {"message": "maximum context length is 2049 tokens"}}
        if "number4\n" in request["prompt"]:
            return 200, completion(" ")
        if "number5\n" in request["prompt"]:
            return 200, b'{"choices": [{"te'
        return 200, completion(" a \ud83d question\n\n")  # half a surrogate pair, as broken JSON escapes give

    openai_server.respond = respond
    done = ok(generate(collection, openai_server.url))
    assert "maximum context length" in done.stderr
    assert "2 documents were refused" in done.stderr
    written = {row["doc_id"]: row for row in rows(collection.parent / "queries.jsonl")}
    assert set(written) == {f"d{i}" for i in range(20)} - {"d3", "d5"}
    assert (written["d4"]["question"], written["d4"]["log_probs"]) == ("", [])
    assert len(written["d6"]["log_probs"]) == 3


# ------------------------------------------------------------------------------------------------ one sentence each

NOT_FOUND = {"error": {"message": "The model `curie` has been deprecated", "code": "model_not_found"}}


@pytest.mark.parametrize(
    ("engine", "status", "body", "words"),
    [
        ("curie", 404, NOT_FOUND, "engine curie is retired"),
        ("text-davinci-003", 404, NOT_FOUND, "--base_url http://HOST:8000/v1"),
        ("gpt-9", 404, {"error": {"message": "no such model"}}, "answers 404 for engine gpt-9 on its completions API"),
        ("m", 401, {"error": {"message": "Incorrect API key provided: sk-secret"}}, "did not accept the key (401)"),
        ("m", 403, {"error": {"message": "sk-secret may not"}}, "did not accept the key (403)"),
        ("m", 429, {"error": {"message": "quota", "code": "insufficient_quota"}}, "no credit left"),
        ("m", 400, {"error": {"message": "bad parameter, sk-secret"}}, "the first 5 documents failed"),
        ("m", 200, {"choices": [{"index": 0, "text": " q?", "finish_reason": "stop"}]}, "has no log-probabilities"),
    ],
)
def test_what_no_document_would_be_spared(
    collection: Path, openai_server: OpenAIServer, engine: str, status: int, body: object, words: str
) -> None:
    openai_server.respond = lambda request: (status, body)
    # One at a time: what was under way when the first failed would be asked too.
    done = generate(collection, openai_server.url, "--engine", engine, "--concurrency", 1, API_KEY="sk-secret")
    assert words in sentence(done)
    assert "sk-secret" not in done.stderr
    assert (collection.parent / "queries.jsonl").read_bytes() == b""
    assert len({request["prompt"] for request in openai_server.requests}) == (5 if status == 400 else 1)


def test_an_unreachable_server(collection: Path) -> None:
    assert "cannot be reached" in sentence(generate(collection, "http://127.0.0.1:9/v1", "--concurrency", 1))


def test_usage_errors(collection: Path) -> None:
    required = ["--collection", collection, "--output", collection.parent / "q.jsonl"]
    assert "no key: export API_KEY" in sentence(run(SCRIPT, *required, "--engine", "curie"), 2)
    assert "--engine" in sentence(run(SCRIPT, *required), 2)
    with_url = [*required, "--engine", "m", "--base_url", "http://127.0.0.1:9/v1"]
    assert "--api completions" in sentence(run(SCRIPT, *with_url, "--include_doc_probs", "--api", "chat"), 2)
    assert "No such file" in sentence(run(SCRIPT, *with_url, "--collection", "absent.tsv"))
    assert not (collection.parent / "q.jsonl").read_bytes()


def test_prompts_have_three_examples_and_the_slot_once() -> None:
    for name, label in (("vanilla_prompt.txt", "Relevant Query:"), ("gbq_prompt.txt", "Good Question:")):
        text = (ROOT / "prompts" / name).read_text()
        assert text.count("{document_text}") == 1
        assert text.count(label) == text.count("Document:") == 4
        assert text.rstrip().endswith(label)
        assert text.count("Bad Question:") == (3 if "gbq" in name else 0)
