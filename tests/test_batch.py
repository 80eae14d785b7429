"""The Batch API: nothing is submitted twice and nothing is lost, whatever breaks and whenever."""

import json
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
from conftest import error_line, ok
from generation import EVERY, errors, generate, meta, queries, start, written
from stand_in import StandIn, completion, document_of, error

QUICK = ["--batch", "--batch_poll", 0.05]


def names(collection: Path) -> set[str]:
    return {path.name for path in collection.parent.iterdir()} - {"collection.tsv"}


def asked(server: StandIn) -> Counter:
    """Count the requests for each document, direct or in a batch."""
    return Counter(document_of(request) for request in server.requests)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_the_batch_api_answers_a_collection(collection: Path, openai_server: StandIn, api: str) -> None:
    openai_server.api = api
    done = ok(generate(collection, openai_server.url, *QUICK, "--batch_size", 8))
    assert {row["question"] for row in written(collection).values()} == {f"what is number{i} about?" for i in range(20)}
    assert set(written(collection)) == EVERY
    assert "20 of 20 documents have one" in done.stderr
    # One document is asked for by itself: it tells the API and the parameters. The others go in files of 8.
    sizes = [len(openai_server.files[batch["input_file_id"]].splitlines()) for batch in openai_server.batches.values()]
    assert sizes == [8, 8, 3]
    path = "/v1/completions" if api == "completions" else "/v1/chat/completions"
    for batch in openai_server.batches.values():
        assert (batch["endpoint"], batch["completion_window"]) == (path, "24h")
        for line in openai_server.files[batch["input_file_id"]].splitlines():
            request = json.loads(line)
            assert (request["method"], request["url"]) == ("POST", path)
            assert set(request) == {"custom_id", "method", "url", "body"}
    assert all(count == 1 for document, count in asked(openai_server).items() if document != "number0")
    assert meta(collection)["usage"]["completion_tokens"] == 20 * 6
    assert names(collection) == {"queries.jsonl", "queries.jsonl.meta.json", "queries.jsonl.batches.json"}
    ok(generate(collection, openai_server.url, *QUICK))  # nothing is left to do
    assert len(openai_server.batches) == 3


def test_a_batch_on_azures_address(collection: Path, openai_server: StandIn) -> None:
    server = openai_server.url.removesuffix("/v1") + "/openai/v1?api-version=preview"
    done = ok(generate(collection, server, *QUICK, "--api", "chat", "--header", "api-key=azure-secret"))
    assert set(written(collection)) == EVERY
    paths = {(method, path.split("/")[3].partition("?")[0]) for method, path, _ in openai_server.received}
    assert paths >= {("POST", "chat"), ("POST", "files"), ("POST", "batches"), ("GET", "batches"), ("GET", "files")}
    for _, path, headers in openai_server.received:
        assert path.startswith("/openai/v1/")
        assert path.endswith("?api-version=preview")
        assert headers["api-key"] == "azure-secret"
        assert "authorization" not in headers
    assert "azure-secret" not in done.stderr
    assert not any(b"azure-secret" in data for data in openai_server.files.values())


def test_several_queries_per_document_in_a_batch(collection: Path, openai_server: StandIn) -> None:
    """A run that wants more queries collects the batch of one that wanted fewer, and the other way round."""
    several = [*QUICK, "--temperature", 0.7, "--batch_poll", 0]
    collection.write_text("a\tone word\na#2\ttwo words\nb\tthree words\n")
    openai_server.respond = lambda request: (
        200,
        completion(f" what is {document_of(request)} in {'12234'[request['seed'] - 1]}?"),
    )
    openai_server.look_fails = lambda: True
    error_line(generate(collection, openai_server.url, *several, "--patience", 0))
    assert len(queries(collection)) == 1
    error_line(generate(collection, openai_server.url, *several, "--patience", 0, "--queries_per_doc", 5))
    openai_server.look_fails = lambda: False
    state = json.loads((collection.parent / "queries.jsonl.batches.json").read_text())
    assert [len(batch.get("doc_ids", batch.get("requests"))) for batch in state["open"]] == [2, 12]
    assert {"a#2", "a#2#2", "a#2#5", "b#3"} < set(state["open"][1]["requests"])
    done = ok(generate(collection, openai_server.url, *several, "--queries_per_doc", 2))  # keeps what was paid for
    assert "3 of 3 documents have one; of 6 requests, 6 are answered (0 duplicates dropped)" in done.stderr
    expected = {word: {f"what is {word} in {i}?" for i in (1, 2, 3, 4)} for word in ("one", "two", "three")}
    assert {found[0].split()[2]: set(found) for found in queries(collection).values()} == expected
    assert set(map(len, queries(collection).values())) == {4}
    assert len(errors(collection)) == 3
    assert len(openai_server.requests) == 15
    assert len(openai_server.batches) == 2


def test_requests_of_a_batch_keep_their_names(collection: Path, openai_server: StandIn) -> None:
    """A run that wants one query per document collects a batch of several, which must count as answered later."""
    several = [*QUICK, "--temperature", 0.7, "--batch_poll", 0]
    three = [*several, "--queries_per_doc", 3]
    openai_server.respond = lambda request: (200, completion(f" what is {document_of(request)} in {request['seed']}?"))
    openai_server.look_fails = lambda: True
    error_line(generate(collection, openai_server.url, *three, "--patience", 0))
    openai_server.look_fails = lambda: False
    ok(generate(collection, openai_server.url, *several))
    assert len(openai_server.requests) == 60
    done = ok(generate(collection, openai_server.url, *three))
    assert "60 of 60 requests were finished by earlier runs" in done.stderr
    assert len(openai_server.requests) == 60
    assert set(map(len, queries(collection).values())) == {3}


def kill_at(moment: str, collection: Path, server: StandIn) -> None:
    """SIGKILL after the server has processed a step and before its answer arrives."""
    reached, killed = threading.Event(), threading.Event()

    def step(name: str) -> None:
        if name == moment and not killed.is_set():
            reached.set()
            killed.wait(60)

    server.step = step
    process = start(collection, server.url, *QUICK)
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    killed.set()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["upload", "create", "look", "download"])
def test_a_kill_at_any_step_submits_nothing_twice(collection: Path, openai_server: StandIn, moment: str) -> None:
    kill_at(moment, collection, openai_server)
    ok(generate(collection, openai_server.url, *QUICK))
    assert set(written(collection)) == EVERY
    assert len(openai_server.batches) == 1
    assert set(asked(openai_server).values()) == {1}
    assert not [name for name in names(collection) if ".batch-" in name]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["upload", "create"])
def test_cancel_after_a_kill_submits_nothing(collection: Path, openai_server: StandIn, moment: str) -> None:
    kill_at(moment, collection, openai_server)
    ok(generate(collection, openai_server.url, "--batch_cancel", "--batch_poll", 0.05))
    assert len(openai_server.batches) == (0 if moment == "upload" else 1)
    assert len(written(collection)) == (1 if moment == "upload" else 10)
    assert not [name for name in names(collection) if ".batch-" in name]
    ok(generate(collection, openai_server.url, *QUICK))
    assert set(written(collection)) == EVERY
    assert set(asked(openai_server).values()) == {1}


def test_a_submission_without_an_answer_is_found_in_the_list(collection: Path, openai_server: StandIn) -> None:
    """The connection breaks after the server has created the batch, which is then found in the server's list."""
    lost = []

    def create_batch(wanted: dict) -> dict:
        batch = StandIn.create_batch(openai_server, wanted)
        if not lost:
            lost.append(batch)
            raise ConnectionAbortedError  # the handler dies, and the connection with it
        return batch

    openai_server.create_batch = create_batch
    ok(generate(collection, openai_server.url, *QUICK))
    assert len(lost) == len(openai_server.batches) == 1
    assert set(written(collection)) == EVERY


def test_expired_requests_are_submitted_again(collection: Path, openai_server: StandIn) -> None:
    openai_server.batch_end = lambda batch, number: "expired" if number == 1 else "completed"
    done = ok(generate(collection, openai_server.url, *QUICK))
    assert "documents were not answered (batch_expired: 10). They are submitted again" in done.stderr
    assert len(openai_server.batches) == 2
    assert set(written(collection)) == EVERY
    assert set(asked(openai_server).values()) == {1}  # those that were answered are not asked for again


def test_requests_that_fail_in_a_batch(collection: Path, openai_server: StandIn) -> None:
    """A failure of the document is recorded; a failure of the server is retried."""
    tries = Counter()

    def respond(request: dict) -> tuple[int, object]:
        document = document_of(request)
        tries[document] += 1
        if document == "number3":
            return error(400, "maximum context length is 10 tokens")
        if document == "number4" and tries[document] == 1:
            return error(500, "The server had an error")
        return openai_server.answer(request)

    openai_server.respond = respond
    openai_server.fault = lambda request: "empty" if document_of(request) == "number5" else None
    done = ok(generate(collection, openai_server.url, *QUICK))
    assert set(written(collection)) == EVERY - {"d3", "d5"}
    assert errors(collection) == {"d3": "maximum context length is 10 tokens", "d5": "the answer is empty"}
    assert "The server had an error: 1" in done.stderr
    assert tries["number4"] == 2
    openai_server.respond, openai_server.fault = openai_server.answer, lambda request: None
    ok(generate(collection, openai_server.url, *QUICK, "--retry_errors"))
    assert set(written(collection)) == EVERY


def test_a_rejected_batch(collection: Path, openai_server: StandIn) -> None:
    openai_server.batch_end = lambda batch, number: "failed:invalid_model"
    said = error_line(generate(collection, openai_server.url, *QUICK))
    assert "batch batch_1 was not accepted: refused: invalid_model" in said
    openai_server.batch_end = lambda batch, number: "completed"
    ok(generate(collection, openai_server.url, *QUICK))
    assert set(written(collection)) == EVERY


def test_a_batch_over_the_token_limit_waits_for_the_others(collection: Path, openai_server: StandIn) -> None:
    openai_server.batch_end = lambda batch, number: "failed:token_limit_exceeded" if number == 1 else "completed"
    done = ok(generate(collection, openai_server.url, *QUICK, "--batch_size", 10))
    assert "too many tokens at a time: 10" in done.stderr
    assert set(written(collection)) == EVERY
    assert set(asked(openai_server).values()) == {1}


def test_a_batch_that_the_server_does_not_know(collection: Path, openai_server: StandIn) -> None:
    """The key of another project, or another server: the batch may still be answered and paid."""
    openai_server.look = lambda batch: openai_server.batches.clear() or batch
    assert "batch batch_1 is not there" in error_line(generate(collection, openai_server.url, *QUICK))
    said = error_line(generate(collection, openai_server.url, *QUICK))
    assert "Use the API_KEY and the --base_url that submitted it, or forget it with --batch_cancel" in said
    done = ok(generate(collection, openai_server.url, "--batch_cancel", "--batch_poll", 0.05))
    assert "batch batch_1 is not there (Error code: 404" in done.stderr
    assert "It is forgotten" in done.stderr
    ok(generate(collection, openai_server.url))
    assert set(written(collection)) == EVERY


def test_results_that_the_server_has_deleted(collection: Path, openai_server: StandIn) -> None:
    def delete_results(name: str) -> None:
        if name == "download":
            for file in [file for file in openai_server.files if file.startswith("file-batch")]:
                del openai_server.files[file]

    openai_server.step = delete_results
    said = error_line(generate(collection, openai_server.url, *QUICK))
    assert "with results of batch batch_1 is not there" in said
    assert "forget it with --batch_cancel" in said
    ok(generate(collection, openai_server.url, "--batch_cancel", "--batch_poll", 0.05))
    openai_server.step = lambda name: None
    ok(generate(collection, openai_server.url, *QUICK))
    assert set(written(collection)) == EVERY


def test_states_in_capitals(collection: Path, openai_server: StandIn) -> None:
    look = openai_server.look

    def look_in_capitals(batch: dict) -> dict:
        return {**look(batch), "status": batch["status"].upper()}

    openai_server.look = look_in_capitals
    ok(generate(collection, openai_server.url, *QUICK))
    assert set(written(collection)) == EVERY


def test_a_request_that_always_fails_is_given_up(collection: Path, openai_server: StandIn) -> None:
    openai_server.fault = lambda request: "500" if document_of(request) == "number4" else None
    done = ok(generate(collection, openai_server.url, *QUICK))
    assert set(written(collection)) == EVERY - {"d4"}
    assert errors(collection) == {"d4": "The server had an error, in 3 batches"}
    assert len(openai_server.batches) == 3
    assert "1 failed, 0 are left" in done.stderr


def test_requests_beyond_a_rate_limit_are_not_given_up(collection: Path, openai_server: StandIn) -> None:
    """The server answers five requests of each batch, and refuses the others with status 429."""
    batch_of = dict[str, int]()

    def limited(request: dict) -> str | None:
        number = len(openai_server.batches)
        if number == 0:
            return None  # the first document, by itself
        answered = [document for document, batch in batch_of.items() if batch == number]
        if len(answered) == 5:
            return "429"
        batch_of[document_of(request)] = number
        return None

    openai_server.fault = limited
    done = ok(generate(collection, openai_server.url, *QUICK))
    assert "(too many requests: 14). They are submitted again" in done.stderr
    assert set(written(collection)) == EVERY
    assert len(openai_server.batches) == 4
    assert not errors(collection)


def test_an_account_without_credit_stops_after_the_results(collection: Path, openai_server: StandIn) -> None:
    no_credit = (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}})
    openai_server.respond = lambda request: (
        no_credit if openai_server.batches and document_of(request) > "number3" else openai_server.answer(request)
    )
    said = error_line(generate(collection, openai_server.url, *QUICK))
    assert "the account has no credit left (You exceeded your current quota)" in said
    assert not errors(collection)
    before = len(written(collection))
    assert 1 < before < 20
    openai_server.respond = openai_server.answer
    ok(generate(collection, openai_server.url, *QUICK))
    assert set(written(collection)) == EVERY
    assert len(openai_server.batches) == 2


def test_errors_inside_results_are_classified(collection: Path, openai_server: StandIn) -> None:
    inside = {"error": {"message": "maximum context length is 10 tokens", "code": 400}}
    openai_server.respond = lambda request: (
        (200, inside) if document_of(request) == "number4" else openai_server.answer(request)
    )
    ok(generate(collection, openai_server.url, *QUICK))
    assert errors(collection) == {"d4": "maximum context length is 10 tokens"}


def test_batches_without_answers_stop_the_run(collection: Path, openai_server: StandIn) -> None:
    openai_server.batch_end = lambda batch, number: "cancelled"  # by somebody else, before it began
    collection.write_text("".join(collection.read_text().splitlines(keepends=True)[:2]))
    said = error_line(generate(collection, openai_server.url, *QUICK))
    assert "answered none of 1 documents (batch_cancelled: 1)" in said
    assert len(openai_server.batches) == 1


@pytest.mark.slow
def test_cancelling_keeps_the_answers(collection: Path, openai_server: StandIn) -> None:
    openai_server.batch_waits = 10**9
    looked = threading.Event()
    openai_server.step = lambda name: looked.set() if name == "look" else None
    process = start(collection, openai_server.url, *QUICK)
    assert looked.wait(60)
    process.send_signal(signal.SIGINT)
    assert "Run the same command again to resume" in process.stderr.read()
    assert process.wait() == 130
    said = error_line(generate(collection, openai_server.url))  # it would ask, and pay, for the same documents
    assert "batches in progress: 1." in said
    assert "--batch_cancel" in said
    openai_server.batch_waits = 1
    done = ok(generate(collection, openai_server.url, "--batch_cancel", "--batch_poll", 0.05))
    assert "10 of 20 documents have one, 0 failed, 10 are left" in done.stderr  # the first, and half of the others
    assert len(openai_server.batches) == 1
    ok(generate(collection, openai_server.url))  # the rest one by one
    assert set(written(collection)) == EVERY
    assert set(asked(openai_server).values()) == {1}


@pytest.mark.slow
def test_answers_of_documents_that_are_no_longer_wanted_are_kept(collection: Path, openai_server: StandIn) -> None:
    openai_server.batch_waits = 10**9
    looked = threading.Event()
    openai_server.step = lambda name: looked.set() if name == "look" else None
    process = start(collection, openai_server.url, *QUICK)
    assert looked.wait(60)
    process.send_signal(signal.SIGINT)
    process.wait()
    openai_server.batch_waits = 1
    ok(generate(collection, openai_server.url, *QUICK, "--max_examples", 5))
    assert set(written(collection)) == EVERY  # all were paid for
    assert set(asked(openai_server).values()) == {1}


def test_a_batch_run_waits_for_its_server(collection: Path, openai_server: StandIn) -> None:
    failures = iter([True] * 12)
    openai_server.look_fails = lambda: next(failures, False)
    done = ok(generate(collection, openai_server.url, *QUICK))
    assert "no status of the batch" in done.stderr
    assert set(written(collection)) == EVERY


def test_a_damaged_list_of_batches(collection: Path, openai_server: StandIn) -> None:
    (collection.parent / "queries.jsonl.batches.json").write_text("{")
    assert "batches.json: damaged" in error_line(generate(collection, openai_server.url, *QUICK))


def test_fatal_errors_of_a_batch_run(collection: Path, openai_server: StandIn) -> None:
    openai_server.respond = lambda request: error(401, "wrong key sk-secret")
    done = generate(collection, openai_server.url, *QUICK, API_KEY="sk-secret")
    assert "refused (401 wrong key <key>)" in error_line(done)
    assert "sk-secret" not in done.stderr
    assert not openai_server.files
