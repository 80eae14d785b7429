"""Stage 1: keys, headers and addresses reach the server, and no message or file."""

import base64
import json
from pathlib import Path

import pytest
from conftest import error_line, ok, serve
from generation import EVERY, generate, written
from stand_in import StandIn, completion, document_of, error


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
    assert "unrecognized arguments: --nonsense" in unknown
    assert "word" not in unknown


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


def test_a_user_in_the_address(collection: Path, openai_server: StandIn) -> None:
    ok(generate(collection, openai_server.url.replace("//", "//me:p%40ss@")))
    assert set(openai_server.keys) == {"Basic " + base64.b64encode(b"me:p@ss").decode()}


QUOTES = [
    (401, {"error": {"message": "not known: SECRET"}}),
    (400, {"error": {"message": "not known: SECRET"}}),
    (500, {"error": {"message": "not known: SECRET"}}),
    (200, {"choices": [{"text": "SECRET", "finish_reason": "content_filter"}]}),
]


@pytest.mark.parametrize(("status", "body"), QUOTES)
@pytest.mark.parametrize("batch", [[], ["--batch", "--batch_poll", 0]])
@pytest.mark.parametrize("first", [True, False])
def test_a_server_that_quotes_the_address(
    collection: Path, openai_server: StandIn, status: int, body: dict, batch: list[object], first: bool
) -> None:
    """User, password and query values, as they are and as they travel, reach neither terminal nor files."""
    url = openai_server.url.replace("//", "//someone:p%40ssword@") + "?code=abcdef%2Fghi"
    secrets = ("someone", "p@ssword", "p%40ssword", "abcdef/ghi", "abcdef%2Fghi", "c29tZW9uZTpwQHNzd29yZA==", "sk-key")
    quoting = json.loads(json.dumps(body).replace("SECRET", " ".join(secrets)))
    openai_server.respond = lambda request: (
        openai_server.answer(request) if document_of(request) == "number0" and not first else (status, quoting)
    )
    done = generate(collection, url, "--patience", 0, *batch, API_KEY="sk-key")
    said = done.stderr + "".join(path.read_text() for path in collection.parent.iterdir())
    assert "<key>" in said or status in (200, 401)
    for secret in secrets:
        assert secret not in said


@pytest.mark.parametrize("batch", [[], ["--batch", "--batch_poll", 0]])
@pytest.mark.parametrize("after", [0, 1])
def test_redirects_to_another_server_are_not_followed(
    collection: Path, openai_server: StandIn, batch: list[object], after: int
) -> None:
    """The first request, or a later one: the upload of a batch."""
    other = StandIn()
    with serve(other.handler()) as url:
        openai_server.headers = {"Location": f"{url}/v1/completions?code=abcdefgh"}
        if batch and after:
            openai_server.upload_status = 307
        else:
            openai_server.respond = lambda request: (
                (307, {}) if len(openai_server.requests) > after else openai_server.answer(request)
            )
        done = generate(collection, openai_server.url, "--header", "X-Key=Header-Secret", *batch)
        said = error_line(done)
    assert f"redirects to another server (307), {url}/v1/completions. If you trust this address" in said
    assert "abcdefgh" not in done.stderr
    assert not other.received


def test_redirects_on_the_same_server(collection: Path, openai_server: StandIn) -> None:
    def respond(request: dict) -> tuple[int, object]:
        return openai_server.answer(request) if request["path"].endswith("?again") else (status, {})

    openai_server.respond = respond
    openai_server.headers = {"Location": f"{openai_server.url}/completions?again"}
    status = 307
    ok(generate(collection, openai_server.url))
    assert set(written(collection)) == EVERY
    status = 302  # clients repeat it as GET, without the prompt
    (collection.parent / "queries.jsonl").unlink()
    said = error_line(generate(collection, openai_server.url))
    assert "redirects, and the redirect drops the request (302)" in said


def test_control_characters_reach_no_terminal(collection: Path, openai_server: StandIn) -> None:
    """Of answers, documents, ids and errors: window title, clipboard, clear screen, direction of writing."""
    bad = "\x1b]0;title\x07\x1b]52;c;cm0=\x1b\\\x1b[2J\x9b1m\u202e\u2066\u200f\r"
    collection.write_text(f"a{bad[:-1]}\tnumber0 {bad[:-1]}word\nb{bad[:-1]}\tnumber1 word\n")
    openai_server.respond = lambda request: (
        (200, completion(f" what{bad}?"))
        if document_of(request).startswith("number0")
        else error(400, f"refused{bad}words")
    )
    done = ok(generate(collection, openai_server.url, "--dry_run", 2, "--sampling", "first", "--no_log_probs"))
    assert "refused" in done.stderr
    assert "what" in done.stderr
    assert not set(done.stderr) & set("\x1b\x07\x9b\u202e\u2066\u200f")
