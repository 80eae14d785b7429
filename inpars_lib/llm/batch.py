"""OpenAI's Batch API: requests in files, half the price, answers within a day.

The batches of an output are recorded in OUTPUT.batches.json before and after each step. A kill at any moment costs
nothing: the same command finds the batches by their ids and submits no request twice.

Limits and fields: https://platform.openai.com/docs/api-reference/batch
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import msgspec

from inpars_lib.cli import InputError, printable, report, shorten, warn
from inpars_lib.files import atomic_write, json_line
from inpars_lib.formats.records import Doc
from inpars_lib.llm.access import public_url
from inpars_lib.llm.errors import RESUME, Action, classify_error, error_message, error_within, status_within
from inpars_lib.llm.prompt import PromptTemplate
from inpars_lib.llm.protocol import AnswerError, ModelApi
from inpars_lib.llm.query_store import QueryStore, RequestKey, request_key
from inpars_lib.llm.server import ClientConfig
from inpars_lib.llm.usage import read_usage
from inpars_lib.resume import FORMAT_VERSION, read_state

MAX_FILE_BYTES = 200_000_000  # OpenAI's limit for a request file
MAX_RETRIES = 8  # of requests to the server's batch endpoints
MAX_TRIES = 3  # batches in which a request may fail by itself
TOO_MANY = "too many requests"  # a limit of the account is no failure of the request
ENDED = ("completed", "failed", "expired", "cancelled", "canceled")


class Batch(msgspec.Struct, omit_defaults=True):
    """A batch that has not been collected.

    Attributes:
        number: From 1, part of the names of its files.
        doc_ids: Documents of its requests, or None with several queries per document.
        requests: Names of its requests, with several queries per document.
        input_file_id: Its request file on the server, once uploaded.
        uploaded_at: When, in seconds since 1970 by the server's clock.
        batch_id: Its name on the server, once submitted.
    """

    number: int
    doc_ids: list[str] | None = None
    requests: list[str] | None = None
    input_file_id: str | None = None
    uploaded_at: float = 0.0
    batch_id: str | None = None


class BatchFile(msgspec.Struct):
    """Content of OUTPUT.batches.json."""

    number: int
    open: list[Batch]
    tries: dict[str, int] = {}
    format_version: int = FORMAT_VERSION


class BatchState:
    """OUTPUT.batches.json: the batches of an output that have not been collected.

    Attributes:
        open: The batches.
        tries: By the name of a request, the batches in which it failed although the batch was processed.
    """

    def __init__(self, output: str) -> None:
        self.output, self.path = output, f"{output}.batches.json"
        self.open: list[Batch] = []
        self.tries: dict[str, int] = {}
        self.number = 0
        if os.path.exists(self.path):
            state = read_state(self.path, BatchFile, "Cancel the batches that the server lists, and delete this file.")
            self.open, self.tries, self.number = state.open, state.tries, state.number

    def save(self) -> None:
        """Write the file."""
        with atomic_write(self.path, "wb") as file:
            file.write(msgspec.json.encode(BatchFile(self.number, self.open, self.tries)))

    def add(self, names: list[str], requests: list[bytes], numbered: bool) -> Batch:
        """Write the request file of a new batch and record the batch. The names are numbered, or ids of documents."""
        self.number += 1
        batch = Batch(self.number, requests=names) if numbered else Batch(self.number, doc_ids=names)
        with atomic_write(self.file_of(batch, "requests"), "wb") as file:
            file.writelines(requests)
        self.open.append(batch)
        self.save()
        return batch

    def remove(self, batch: Batch) -> None:
        """Forget a batch."""
        self.open.remove(batch)
        self.save()

    def file_of(self, batch: Batch, kind: str) -> str:
        """Return the name of a batch's file of requests or results."""
        return f"{self.output}.batch-{batch.number}.{kind}.jsonl"


def requests_of(batch: Batch) -> dict[str, RequestKey]:
    """Return the requests of a batch by their names, which are the custom ids on the server."""
    if batch.doc_ids is not None:
        return {doc_id: RequestKey(doc_id) for doc_id in batch.doc_ids}
    return {name: request_key(name.rpartition("#")[0], name) for name in batch.requests or ()}


class BatchRunner:
    """Submits, awaits and collects the batches of an output.

    Args:
        config: The server.
        api: The model.
        template: The prompt.
        state: The batches in progress.
        store: Where answers and failures go.
        wanted: Requests that need an answer or a failure.
        read_docs: Function that yields the document and number of each of given requests.
    """

    def __init__(
        self,
        config: ClientConfig,
        api: ModelApi,
        template: PromptTemplate,
        state: BatchState,
        store: QueryStore,
        wanted: Set[RequestKey],
        read_docs: Callable[[Set[RequestKey]], Iterable[tuple[Doc, int]]],
    ) -> None:
        self.config, self.api, self.template, self.state = config, api, template, state
        self.store, self.wanted, self.read_docs = store, wanted, read_docs
        self.url = config.urls[0] if config.urls else None
        self.server = public_url(self.url)
        self.drops_missing = False  # what to do with batches and files that the server lacks: drop them or stop
        self.fatal: InputError | None = None  # why the account cannot go on, found in results

    @cached_property
    def client(self) -> Any:
        """The OpenAI client."""
        import openai

        options = self.config.access.client_options(self.url, openai.DefaultHttpxClient, self.config.timeout)
        return openai.OpenAI(**options, max_retries=MAX_RETRIES)

    @property
    def left(self) -> set[RequestKey]:
        """Requests without answer or failure."""
        return set(self.wanted) - self.store.done - self.store.failed

    def run(self) -> None:
        """Submit the requests that are in no batch, wait, collect. Submit again what expired or failed.

        Raises:
            InputError: The server refuses, or a whole round of batches brought no answer.
        """
        with self._errors():
            self._submit_interrupted()
            while self.left or self.state.open:
                before, unit = len(self.left), self.store.unit
                tries = dict(self.state.tries)
                self._prepare(self.left - {key for batch in self.state.open for key in requests_of(batch).values()})
                reasons = self._collect_all()
                if self.fatal:
                    raise self.fatal
                # A request that fails by itself while others are answered gets further tries.
                hopeful = self.store.answered and self.state.tries != tries
                if self.left and len(self.left) == before and not hopeful:
                    raise InputError(
                        f"{self.server}: the last batches answered none of {before:,} {unit} ({reasons}). {RESUME}"
                    )
                if self.left:
                    warn(f"{len(self.left):,} {unit} were not answered ({reasons}). They are submitted again.")

    def cancel(self) -> None:
        """Cancel the batches in progress and collect the answers that they have. Drop batches that the server lacks."""
        import openai

        self.drops_missing = True
        with self._errors():
            self._submit_interrupted(cancel=True)
            for batch in self.state.open:
                # ended in the meantime, or unknown
                with suppress(openai.ConflictError, openai.BadRequestError, openai.NotFoundError):
                    self.client.batches.cancel(batch.batch_id)
            self._collect_all()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of the OpenAI client into `InputError`."""
        import openai

        server = self.server
        try:
            yield
        except openai.APIConnectionError as error:
            problem = f"{server}: the server cannot be reached ({shorten(error.__cause__ or error)})"
            raise InputError(f"{problem}. Its batches continue; run the same command again to collect them.") from None
        except openai.APIStatusError as error:
            request, headers = {"model": self.api.config.engine}, error.response.headers
            body = error.body
            verdict = classify_error(error.status_code, body, headers, request=request, server=server)
            said = verdict.message or shorten(error)
            if verdict.action is not Action.STOP:
                said = f"{server}: a batch request failed ({error.status_code}: {said}). {RESUME}"
            raise InputError(said) from None

    # ------------------------------------------------------------------------------------------------------- submit

    def _submit_interrupted(self, cancel: bool = False) -> None:
        """Submit the batches that a kill left between two steps, or drop them if the server has none."""
        for batch in [batch for batch in self.state.open if batch.batch_id is None]:
            if cancel and self._find(batch) is None:
                self.state.remove(batch)
                os.remove(self.state.file_of(batch, "requests"))
            else:
                self._submit(batch, interrupted=True)

    def _prepare(self, keys: set[RequestKey]) -> None:
        """Write the request files, and submit each when it is complete."""
        requests: list[bytes] = []
        names: list[str] = []
        size, numbered = 0, self.store.queries_per_doc > 1
        for doc, number in self.read_docs(keys):
            name = self.store.name(RequestKey(doc.doc_id, number))
            body = self.api.request(self.template.fill(doc), number)
            request = {"custom_id": name, "method": "POST", "url": f"/v1{self.api.path}", "body": body}
            line = json_line(request).encode(errors="replace")
            if names and (len(names) == self.config.batch_size or size + len(line) > MAX_FILE_BYTES):
                self._submit(self.state.add(names, requests, numbered))
                requests, names, size = [], [], 0
            names.append(name)
            requests.append(line)
            size += len(line)
        if names:
            self._submit(self.state.add(names, requests, numbered))

    def _submit(self, batch: Batch, interrupted: bool = False) -> None:
        import openai

        path = self.state.file_of(batch, "requests")
        if batch.input_file_id is None:  # an upload that was not recorded only leaves an unused file
            with open(path, "rb") as file:
                uploaded = self.client.files.create(file=file, purpose="batch")
            batch.input_file_id, batch.uploaded_at = uploaded.id, uploaded.created_at
            self.state.save()
        # The one request that must not be sent twice: if its arrival is unknown, the server's list tells.
        batch_id = self._find(batch) if interrupted else None
        tries = 0
        while batch_id is None:
            try:
                client = self.client.with_options(max_retries=0)
                endpoint: Any = f"/v1{self.api.path}"
                created = client.batches.create(
                    input_file_id=batch.input_file_id, endpoint=endpoint, completion_window="24h"
                )
                batch_id = created.id
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                code = getattr(error, "code", None)
                tries += 1
                if tries > MAX_RETRIES or (isinstance(code, str) and "quota" in code):
                    raise
                time.sleep(min(30.0, 0.25 * 2**tries))
                batch_id = self._find(batch)
        batch.batch_id = batch_id
        self.state.save()
        with suppress(FileNotFoundError):
            os.remove(path)

    def _find(self, batch: Batch) -> str | None:
        """Return the id of the batch that the server made of this batch's file, if any. It lists the newest first."""
        if batch.input_file_id is None:
            return None
        for listed in self.client.batches.list(limit=100):
            if listed.input_file_id == batch.input_file_id:
                return listed.id
            if listed.created_at < batch.uploaded_at - 3600:
                return None
        return None

    # ------------------------------------------------------------------------------------------------------ collect

    def _collect_all(self) -> str:
        """Wait for all batches and collect each that ends. Return why requests have no answer."""
        from tqdm import tqdm

        reasons: Counter[str] = Counter()
        total = sum(len(requests_of(batch)) for batch in self.state.open)
        ended = 0  # requests of collected batches
        with tqdm(desc="Waiting for batches", total=total, unit=f" {self.store.unit}") as bar:
            while self.state.open:
                counts, collected = 0, 0
                states: Counter[str] = Counter()
                for batch in list(self.state.open):
                    status = self._retrieve(batch)
                    state = str(status.status).lower() if status else "unknown"
                    if status is None or state in ENDED:
                        if status:
                            self._collect(batch, status, reasons)
                        ended += len(requests_of(batch))
                        collected += 1
                        continue
                    states[state] += 1
                    if status.request_counts:
                        counts += status.request_counts.completed + status.request_counts.failed
                bar.update(max(0, ended + counts - bar.n))
                bar.set_postfix_str(printable(", ".join(f"{count} {state}" for state, count in states.items())))
                if self.state.open and not collected:
                    time.sleep(self.config.batch_poll)
        return ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items()) or "no reason given"

    def _retrieve(self, batch: Batch) -> Any:
        """Return the status of a batch, after waiting up to --patience for a server that cannot answer.

        Return None for a batch that the server does not know and that is forgotten.
        """
        import openai

        started, client = time.monotonic(), self.client.with_options(max_retries=0)
        while True:
            try:
                return client.batches.retrieve(str(batch.batch_id))
            except openai.NotFoundError as error:
                self._check_missing(f"batch {batch.batch_id}", error)
                self.state.remove(batch)
                return None
            except (openai.APIConnectionError, openai.InternalServerError) as error:
                if time.monotonic() - started > self.config.patience:
                    raise
                report(f"{self.server}: no status of the batch ({shorten(error)}). Waiting ...")
                time.sleep(self.config.batch_poll)

    def _check_missing(self, what: str, error: Exception) -> None:
        """Warn that the server lacks a batch or a file, whose requests are then submitted again.

        Raises:
            InputError: This run does not drop what the server lacks.
        """
        problem = f"{self.server}: {what} is not there ({shorten(error)})"
        if not self.drops_missing:
            raise InputError(
                f"{problem}. Use the API_KEY and the --base_url that submitted it, or forget it with --batch_cancel: "
                "its requests are then sent and paid again."
            )
        warn(f"{problem}. It is forgotten.")

    def _collect(self, batch: Batch, status: Any, reasons: Counter[str]) -> None:
        """Download and read the results of a batch that has ended, however it did."""
        path = self.state.file_of(batch, "results")
        self._download(batch, status, path)
        # Every answer was paid for, so it is kept even if this run wants fewer.
        self._read_results(path, requests_of(batch), reasons)
        self.store.save_meta()
        self.state.remove(batch)
        os.remove(path)
        if str(status.status).lower() == "failed":
            self._check_refusal(status)
            reasons["too many tokens at a time"] += len(requests_of(batch))

    def _download(self, batch: Batch, status: Any, path: str) -> None:
        """Write the results of a batch, answers and errors, to a file."""
        import openai

        with atomic_write(path, "wb") as file:
            for file_id in (status.output_file_id, status.error_file_id):
                if not file_id:
                    continue
                try:
                    with self.client.files.with_streaming_response.content(file_id) as response:
                        for chunk in response.iter_bytes(1 << 20):
                            file.write(chunk)
                except openai.NotFoundError as error:
                    self._check_missing(f"file {file_id} with results of batch {batch.batch_id}", error)
                file.write(b"\n")

    def _check_refusal(self, status: Any) -> None:
        """Check why the server refused a batch as a whole: its file, the model, or too many tokens.

        Raises:
            InputError: The batch would be refused again. One with too many tokens is accepted when others have ended.
        """
        errors = (status.errors.data if status.errors else None) or []
        if self.state.open and any(error.code == "token_limit_exceeded" for error in errors):
            return
        problems = []
        for error in errors[:3]:
            place = f" (request {error.line})" if error.line else ""
            problems.append(f"{error.message}{place}")
        said = shorten("; ".join(problems)) or "no reason given"
        raise InputError(
            f"{self.server}: batch {status.id} was not accepted: {said}. If it has too many tokens at a time, use a "
            f"smaller --batch_size or --max_examples. {RESUME}"
        )

    def _read_results(self, path: str, requests: dict[str, RequestKey], reasons: Counter[str]) -> None:
        """Store the answers and failures of a results file; count why other requests are to be submitted again."""
        wanted = set(requests.values()) - self.store.done
        offsets: dict[RequestKey, int] = {}  # in the file: the results may exceed the memory
        with open(path, "rb") as results:
            offset = 0
            for line in results:
                with suppress(ValueError, KeyError, TypeError):
                    offsets[requests[json.loads(line)["custom_id"]]] = offset
                offset += len(line)
            for doc, number in self.read_docs(wanted & offsets.keys()):
                key = RequestKey(doc.doc_id, number)
                results.seek(offsets[key])
                if reason := self._read_result(json.loads(results.readline()), key, doc):
                    self._retry(key, reason, reasons)
            if missing := len(wanted - offsets.keys()):
                reasons["not among the results"] += missing

    def _retry(self, key: RequestKey, reason: str, reasons: Counter[str]) -> None:
        """Count why a request is to be submitted again, or give it up after MAX_TRIES batches that processed it."""
        name = self.store.name(key)
        if reason != TOO_MANY and not reason.startswith("batch_"):  # such as batch_expired: not processed
            self.state.tries[name] = self.state.tries.get(name, 0) + 1
        if self.state.tries.get(name, 0) < MAX_TRIES:
            reasons[reason] += 1
            return
        del self.state.tries[name]
        self.store.add_failure(key, f"{reason}, in {MAX_TRIES} batches", "")

    def _read_result(self, result: dict[str, Any], key: RequestKey, doc: Doc) -> str | None:
        """Store the result of one request. Return the reason if it is to be submitted again."""
        response, error = result.get("response") or {}, result.get("error") or {}
        status, answer = response.get("status_code"), response.get("body")
        prompt, usage = self.template.fill(doc), read_usage(answer)
        body = error_within(answer)
        if status == 200:
            status = status_within(body) or 200
        if status == 200:
            try:
                row = self.api.read_answer(answer, prompt, self.template.truncate(doc))
                self.store.note_model(answer)
                self.store.add_answer(key, row | {"doc_text": doc.text}, usage)
            except AnswerError as failure:
                self.store.add_failure(key, str(failure), failure.answer, usage)
            except ValueError as failure:
                return shorten(failure)
            return None
        reason = shorten(error_message(error) or error_message(body) or f"status {status}")
        if status is not None:
            verdict = classify_error(status, body, {}, request=self.api.request(prompt), server=self.server)
            if verdict.action is Action.STOP:
                self.fatal = InputError(verdict.message)
            if verdict.action in (Action.BACK_OFF, Action.STOP):
                return TOO_MANY
            if verdict.action in (Action.GIVE_UP, Action.ADAPT):
                self.store.add_failure(key, reason, "", usage)
                return None
        return shorten(error.get("code") or reason)
