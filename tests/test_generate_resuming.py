"""Stage 1: nothing is lost and nothing is paid twice, after kills, signals and other settings."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, command_of, error_line, ok, rows
from generation import EVERY, SCRIPT, flags, generate, meta, start, written
from stand_in import FAULTS, StandIn, document_of, error


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
        (["--good_bad", "--prompt_template", ROOT / "prompts/gbq_prompt.txt"], "good_bad false, now true"),
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
    assert "refused (401" in error_line(generate(collection, openai_server.url))
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


def test_another_collection_on_the_same_output(collection: Path, openai_server: StandIn) -> None:
    ok(generate(collection, openai_server.url))
    collection.write_text("".join(f"d{i}\tnumber{i} of another\n" for i in range(20)))
    assert "made with other settings (the collection differs)" in error_line(generate(collection, openai_server.url))


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


def test_tokens_are_summed_over_all_runs(collection: Path, openai_server: StandIn) -> None:
    ok(generate(collection, openai_server.url, "--max_examples", 8))
    done = ok(generate(collection, openai_server.url))
    words = sum(len(request["prompt"].split()) for request in openai_server.requests)
    cached = sum(len(request["prompt"].split()) // 2 for request in openai_server.requests)
    total = {"prompt_tokens": words, "cached_tokens": cached, "completion_tokens": 20 * 6, "cut_answers": 0}
    assert meta(collection)["usage"] == total
    assert f"all runs {words:,} in ({cached:,} cached), 120 out" in done.stderr


# --------------------------------------------------------------------------------------- files of the user's and ours


@pytest.mark.parametrize("name", ["queries.jsonl", "queries.jsonl.errors.jsonl"])
@pytest.mark.parametrize(
    "content",
    ["d1\tsome text", "text", '{"id": "1", "contents": "a b"}', '{"doc_id": "1", "text": "a"}', "\n\ntext\nx"],
)
def test_a_file_of_the_users_is_not_touched(collection: Path, openai_server: StandIn, name: str, content: str) -> None:
    """None of these ends with a newline, so a repair would cut its last line off."""
    path = collection.parent / name
    path.write_text(content)
    assert f"{name}: not a file of this script" in error_line(generate(collection, openai_server.url))
    assert path.read_text() == content
    assert not openai_server.requests


def test_an_output_is_no_other_file_of_the_command(collection: Path, openai_server: StandIn) -> None:
    prompt = collection.parent / "prompt.txt"
    prompt.write_text("{document_text}")
    link = collection.parent / "queries.jsonl.meta.json"
    link.symlink_to(prompt)
    before = {path: path.read_bytes() for path in (collection, prompt)}
    common = ["--prompt_template", prompt]
    for more in ([], ["--output", collection], ["--output", prompt]):  # the first: a sidecar is the prompt
        assert "are one file" in error_line(generate(collection, openai_server.url, *common, *more))
    assert {path: path.read_bytes() for path in before} == before


def test_two_names_of_an_output_are_one_output(collection: Path, openai_server: StandIn) -> None:
    """Through a symbolic link the same files are read and locked as through the name itself."""
    folder = collection.parent / "elsewhere"
    folder.mkdir()
    link = collection.parent / "link.jsonl"
    link.symlink_to(folder / "queries.jsonl")
    ok(generate(collection, openai_server.url, "--output", link))
    assert {path.name for path in folder.iterdir()} == {"queries.jsonl", "queries.jsonl.meta.json"}
    ok(generate(collection, openai_server.url, "--output", folder / "queries.jsonl"))
    assert len(openai_server.requests) == 20


@pytest.mark.parametrize("after", ["delete", "delete_folder", "replace"])
def test_an_output_that_vanishes_stops_the_run(
    collection: Path, openai_server: StandIn, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """`rm` and `sed -i` during a run: its paid answers are written back, and no more are bought."""
    monkeypatch.setattr("inpars_lib.llm.query_store.CHECK_INTERVAL", 0)
    folder = collection.parent / "out"
    output = folder / "queries.jsonl"
    args = ["--output", output, "--concurrency", 1]
    ok(generate(collection, openai_server.url, *args, "--max_examples", 3))
    old = output.read_text().splitlines()

    def respond(request: dict) -> tuple[int, object]:
        if len(openai_server.requests) == 9:
            if after == "delete_folder":
                shutil.rmtree(folder)
            elif after == "delete":
                output.unlink()
            else:  # as sed -i: another file with the same name; the user has dropped an old row
                (folder / "new").write_text("".join(output.read_text().splitlines(keepends=True)[1:]))
                (folder / "new").replace(output)
        return openai_server.answer(request)

    openai_server.respond = respond
    said = error_line(generate(collection, openai_server.url, *args))
    assert "queries.jsonl: the file was deleted or replaced during the run" in said
    found = [row["doc_id"] for row in rows(output)]
    assert len(found) == len(set(found)) == (8 if after == "replace" else 9)
    assert (old[0] in output.read_text().splitlines()) == (after != "replace")
    assert len(openai_server.requests) == 9
    ok(generate(collection, openai_server.url, *args))
    assert {row["doc_id"] for row in rows(output)} == EVERY
    assert len(rows(output)) == 20


@pytest.mark.slow
def test_a_kill_loses_no_token_count(collection: Path, openai_server: StandIn) -> None:
    """Each request but the last is answered. A kill comes before any time has passed."""
    reached = threading.Event()

    def respond(request: dict) -> tuple[int, object]:
        if len(openai_server.requests) == 9:
            reached.set()
            openai_server.down.wait(60)
        return openai_server.answer(request)

    openai_server.respond = respond
    process = start(collection, openai_server.url, "--concurrency", 1)
    assert reached.wait(60)
    process.kill()
    process.wait()
    process.stderr.close()
    openai_server.down.set()
    words = sum(len(request["prompt"].split()) for request in openai_server.requests[:8])
    cached = sum(len(request["prompt"].split()) // 2 for request in openai_server.requests[:8])
    counts = {"prompt_tokens": words, "cached_tokens": cached, "completion_tokens": 48, "cut_answers": 0}
    assert meta(collection)["usage"] == counts


def has_pending_signals(pid: int) -> bool:
    """Return whether a signal was sent to a process that has not received it yet."""
    fields = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return any(int(fields[name], 16) for name in ("SigPnd", "ShdPnd"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_loses_no_answer(collection: Path, openai_server: StandIn, number: int) -> None:
    """A shell may send SIGHUP twice, and only a second Ctrl-C stops at once."""
    asked, go = threading.Event(), threading.Event()

    def respond(request: dict) -> tuple[int, object]:
        if len(openai_server.requests) == 5:
            asked.set()
        if len(openai_server.requests) >= 2:
            go.wait(60)
        return openai_server.answer(request)

    openai_server.respond = respond
    process = start(collection, openai_server.url, "--concurrency", 4)
    assert asked.wait(60)
    process.stderr.close()  # the terminal is gone
    for _ in range(2):
        process.send_signal(number)
        while has_pending_signals(process.pid):
            time.sleep(0.001)
    go.set()
    process.wait(60)
    assert len(written(collection)) == 5
    assert len(openai_server.requests) == 5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("meta", "{}"),
        ("meta", '{"settings": {}}'),
        ("meta", '{"settings": {}, "usage": {"prompt_tokens": "many"}}'),
        ("meta", '{"settings": [], "usage": {}}'),
        ("meta", '{"settings": {}, "usage": {}, "request": {"api": "soap", "parameters": {}, "refused": []}}'),
        ("meta", "[" * 100_000),
        ("meta", "\udc80"),
        ("batches", "{}"),
        ("batches", '{"number": 1, "open": [{"number": "x"}]}'),
        ("batches", '{"number": 1, "open": [7]}'),
        ("batches", "[" * 100_000),
    ],
)
def test_damaged_state_files(collection: Path, openai_server: StandIn, name: str, content: str) -> None:
    path = collection.parent / f"queries.jsonl.{name}.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    said = error_line(generate(collection, openai_server.url))
    assert f"{path}: damaged, or not a file of this script" in said
    assert "elete th" in said
    assert not openai_server.requests


def test_a_byte_that_is_no_utf8(collection: Path, openai_server: StandIn) -> None:
    """Its row is no query for any stage, so its document gets another one."""
    ok(generate(collection, openai_server.url))
    for name in ("queries.jsonl", "queries.jsonl.errors.jsonl"):
        path = collection.parent / name
        lines = [*path.read_bytes().splitlines(keepends=True)] if path.exists() else []
        if not lines:
            lines = [b'{"doc_id": "d5", "reason": "x"}\n', b'{"doc_id": "d6", "reason": "what"}\n']
        lines[1] = lines[1].replace(b"what", b"wh\x80t")
        path.write_bytes(b"".join(lines))
    done = ok(generate(collection, openai_server.url))
    assert "queries.jsonl, line 2: not valid UTF-8. The line is skipped" in done.stderr
    assert len(openai_server.requests) == 21
