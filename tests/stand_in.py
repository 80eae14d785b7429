"""A stand-in for OpenAI on loopback: completions, chat, files and batches over real HTTP, and every way to misbehave.

    python tests/stand_in.py --latency 0.3 --faults 0.2        # prints its address

As a fixture: `server.respond = lambda request: (200, body)` decides each answer, or, left as it is, `server.fault`
says what goes wrong with a request, one of `FAULTS` or None.
"""

import argparse
import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "429_wait", "500", "503", "cut", "broken", "no_logprobs", "refused")


def pieces(text: str) -> list[str]:
    """Return `text` in tokens as language models have them: whitespace goes with the word after it."""
    return re.findall(r"\n|[^\S\n]*[^\s]+|[^\S\n]+", text)


def usage(prompt: str, tokens: int) -> dict:
    return {
        "prompt_tokens": len(prompt.split()),
        "completion_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": len(prompt.split()) // 2},
    }


def completion(text: str, prompt: str = "", log_prob: float = -0.5, asked: str = "") -> dict:
    """Return an answer of the completions API; its i-th token has the log-probability log_prob * (i + 1).

    The answer repeats `prompt`, as with `echo`. The prompt tokens are counted from `asked`.
    """
    tokens = pieces(text)
    log_probs = [log_prob * (i + 1) for i in range(len(tokens))]
    counts = usage(asked, len(tokens))
    if prompt:
        prompt_tokens = pieces(prompt)
        tokens = prompt_tokens + tokens
        log_probs = [None] + [-9.0] * (len(prompt_tokens) - 1) + log_probs
    choice = {"index": 0, "text": prompt + text, "finish_reason": "stop"}
    choice["logprobs"] = {"tokens": tokens, "token_logprobs": log_probs, "top_logprobs": None, "text_offset": []}
    return {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice], "usage": counts}


def chat(text: str, log_prob: float = -0.5, asked: str = "") -> dict:
    """Return an answer of the chat API, with the same log-probabilities."""
    tokens = pieces(text)
    content = [
        {"token": token, "bytes": list(token.encode()), "logprob": log_prob * (i + 1), "top_logprobs": []}
        for i, token in enumerate(tokens)
    ]
    choice = {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}, "finish_reason": "stop"}
    choice["logprobs"] = {"content": content, "refusal": None}
    counts = usage(asked, len(tokens))
    return {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": counts}


def prompt_of(request: dict) -> str:
    return request["prompt"] if "prompt" in request else request["messages"][-1]["content"]


def document_of(request: dict) -> str:
    """Return the first word of the document in a prompt of ours."""
    return prompt_of(request).rpartition("Document: ")[2].split(maxsplit=1)[0]


def error(status: int, message: str, code: str | None = None, param: str | None = None) -> tuple[int, dict]:
    return status, {"error": {"message": message, "type": "invalid_request_error", "code": code, "param": param}}


class StandIn:
    """`respond(request) -> (status, body)` makes the answers; `requests`, `keys` and `received` keep what came.

    A status of 0 cuts the connection, with half the body sent; one of -1 never answers.
    """

    def __init__(self, latency: float = 0.0, faults: float = 0.0, seed: int = 0) -> None:
        self.respond: Callable[[dict], tuple[int, object]] = self.answer
        self.fault: Callable[[dict], str | None] = self.random_fault
        self.api = "both"  # or "completions", "chat": the one that its model speaks
        self.refuses: dict[str, str] = {}  # parameters that are not taken: the message for each
        self.latency, self.faults, self.random = latency, faults, random.Random(seed)
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.received: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers in lower case
        self.headers: dict[str, str] = {}  # of errors and redirects
        self.upload_status = 200  # of a file; a redirect needs `headers`
        self.under_way = self.most_under_way = 0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.batch_waits = 1  # looks at a batch before it ends
        self.batch_end: Callable[[dict, int], str] = lambda batch, number: "completed"
        self.lock = threading.RLock()
        self.down = threading.Event()
        self.step: Callable[[str], None] = lambda name: None  # before the answer to: upload, create, look, download
        self.look_fails: Callable[[], bool] = lambda: False  # the status of a batch cannot be had now
        self.url = ""  # known when it is served

    # ------------------------------------------------------------------------------------------------- one request

    def random_fault(self, _: dict) -> str | None:
        with self.lock:
            return self.random.choice(FAULTS) if self.random.random() < self.faults else None

    def answer(self, request: dict) -> tuple[int, object]:
        time.sleep(self.latency)
        is_chat = "messages" in request
        if self.api not in ("both", "chat" if is_chat else "completions"):
            kind = "not a chat model" if is_chat else "a chat model"
            return error(404, f"This is {kind} and not supported in this endpoint.", param="model")
        for name, message in self.refuses.items():
            if name in request:
                return error(400, message, "unsupported_parameter", name)
        fault = self.fault(request)
        text = f" what is {document_of(request)} about?\n\n"
        body = (chat if is_chat else completion)(text, asked=prompt_of(request))
        if fault in ("429", "429_wait"):
            self.headers = {"Retry-After": "0.05"} if fault == "429_wait" else {}
            return error(429, "Rate limit reached", "rate_limit_exceeded")
        if fault in ("500", "503"):
            return error(int(fault), "The server had an error")
        if fault == "refused":
            return error(400, "maximum context length is 10 tokens")
        if fault == "cut":
            return 0, body
        if fault == "hang":
            return -1, body
        if fault == "drip":
            return -2, body
        if fault == "broken":
            return 200, json.dumps(body).encode()[:-9]
        if fault == "no_logprobs":
            body["choices"][0]["logprobs"] = None
        if fault == "empty":
            return 200, (chat if is_chat else completion)(" \n", asked=prompt_of(request))
        return 200, body

    # ----------------------------------------------------------------------------------------------------- batches

    def create_batch(self, wanted: dict) -> dict:
        number = len(self.batches) + 1
        lines = self.files[wanted["input_file_id"]].splitlines()
        batch = {
            **wanted,
            "id": f"batch_{number}",
            "object": "batch",
            "created_at": int(time.time()),
            "status": "validating",
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "looks": 0,
        }
        self.batches[batch["id"]] = batch
        return batch

    def look(self, batch: dict) -> dict:
        batch["looks"] += 1
        if batch["status"] in ("validating", "in_progress", "cancelling") and batch["looks"] > self.batch_waits:
            end = "cancelled" if batch["status"] == "cancelling" else self.batch_end(batch, int(batch["id"][6:]))
            self.end(batch, end)
        elif batch["status"] == "validating":
            batch["status"] = "in_progress"
        return batch

    def end(self, batch: dict, status: str) -> None:
        """Answer the requests of a batch; half of them if it was expired or cancelled."""
        good, bad = [], []
        lines = self.files[batch["input_file_id"]].splitlines()
        batch["status"] = status
        if status.startswith("failed"):
            code = status.partition(":")[2]
            batch["status"] = "failed"
            batch["errors"] = {"data": [{"code": code, "message": f"refused: {code}", "line": None, "param": None}]}
            return
        for i, line in enumerate(lines):
            request = json.loads(line)
            result = {"id": f"r{i}", "custom_id": request["custom_id"], "response": None, "error": None}
            if status != "completed" and i >= len(lines) // 2:
                bad.append({**result, "error": {"code": f"batch_{status}", "message": "This request was not executed"}})
                continue
            self.requests.append({**request["body"], "path": request["url"], "custom_id": request["custom_id"]})
            code, body = self.respond(request["body"])
            result["response"] = {"status_code": code, "request_id": "q", "body": body}
            (good if code == 200 else bad).append(result)
        for name, results in (("output_file_id", good[::-1]), ("error_file_id", bad)):  # in no order that one may trust
            if results:
                batch[name] = f"file-{batch['id']}-{name}"
                self.files[batch[name]] = "\n".join(map(json.dumps, results)).encode()
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}

    # --------------------------------------------------------------------------------------------------------- HTTP

    def handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and body in one packet

            def log_message(self, *_: object) -> None:
                pass

            def note(self) -> str:
                """Keep path and headers of a request. Return the path without Azure's prefix and without the query."""
                with outer.lock:
                    outer.received.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
                return self.path.partition("?")[0].removeprefix("/openai")

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                with outer.lock:
                    outer.keys.append(self.headers["Authorization"])
                path = self.note()
                if path == "/v1/files":
                    boundary = self.headers["Content-Type"].partition("boundary=")[2].encode()
                    part = next(p for p in data.split(b"--" + boundary) if b'name="file"' in p)
                    with outer.lock:
                        name = f"file-{len(outer.files)}"
                        outer.files[name] = part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
                    outer.step("upload")
                    what = {"id": name, "object": "file", "bytes": len(data), "created_at": int(time.time())}
                    what |= {"filename": "f", "purpose": "batch", "status": "processed"}
                    return self.give(outer.upload_status, what, outer.headers)
                if path == "/v1/batches":
                    with outer.lock:
                        batch = outer.create_batch(json.loads(data))
                    outer.step("create")
                    return self.give(200, batch)
                if path.endswith("/cancel"):
                    batch = outer.batches.get(path.split("/")[-2])
                    if batch is None:
                        return self.give(404, {"error": {"message": "No such batch"}})
                    batch["status"] = "cancelling"
                    return self.give(200, batch)
                request = json.loads(data)
                request["path"] = self.path
                with outer.lock:
                    outer.requests.append(request)
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                try:
                    status, body = outer.respond(request)
                    if status == -2:
                        return self.drip()
                    if status == -1:
                        outer.down.wait()
                        status = 0
                finally:
                    with outer.lock:
                        outer.under_way -= 1
                self.give(status, body, outer.headers if status >= 300 else {})

            def do_GET(self) -> None:
                path = self.note()
                if path == "/v1/batches":
                    newest_first = list(outer.batches.values())[::-1]
                    return self.give(200, {"object": "list", "data": newest_first, "has_more": False})
                if path.startswith("/v1/batches/"):
                    outer.step("look")
                    if outer.look_fails():
                        return self.give(500, {"error": {"message": "try later"}})
                    batch = outer.batches.get(path.rpartition("/")[2])
                    if batch is None:
                        return self.give(404, {"error": {"message": "No such batch"}})
                    with outer.lock:
                        return self.give(200, outer.look(batch))
                if path.startswith("/v1/files/"):
                    outer.step("download")
                    file = outer.files.get(path.split("/")[3])
                    if file is not None:
                        return self.give(200, file)
                self.give(404, {"error": {"message": "no such address"}})

            def drip(self) -> None:
                """Send an answer of which a byte arrives now and then."""
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                with suppress(OSError):
                    while not outer.down.wait(0.1):
                        self.wfile.write(b" ")
                        self.wfile.flush()
                self.close_connection = True

            def give(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status or 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                with suppress(BrokenPipeError, ConnectionResetError):  # the client has given up, or was killed
                    self.end_headers()
                    self.wfile.write(data if status else data[: len(data) // 2])
                    self.wfile.flush()
                if status == 0:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)

        return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that fail")
    args = parser.parse_args()
    stand_in = StandIn(args.latency, args.faults)
    ThreadingHTTPServer.request_queue_size = 1024
    server = ThreadingHTTPServer(("127.0.0.1", args.port), stand_in.handler())
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
