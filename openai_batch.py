"""OpenAI's Batch API: requests by the file, half the price, answers within a day.

`Batches` writes the request files, submits them, waits, and collects the answers. What it has done stands in
OUTPUT.batches.json before and after each step, so that a kill at any moment costs nothing: the same command finds the
batches again by their ids, and submits no request twice.

Limits and fields: https://platform.openai.com/docs/api-reference/batch
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from engine import (
    KEPT,
    SLOT,
    AnswerError,
    Engine,
    hopeless,
    message_of,
    public_url,
    read_usage,
    without_key,
)
from formats import Doc, InputError, json_line, warn, whole_file
from generation_output import Output

MAX_BYTES = 200_000_000  # of a request file; OpenAI's limit
MAX_RETRIES = 8  # of a request that may be sent twice without harm, by the client
ENDED = ("completed", "failed", "expired", "cancelled")


class Batches:
    """The batches of one output. Each is a dict with

    number         from 1, in the names of its files
    doc_ids        what it asks for
    input_file_id  once its request file is uploaded, with uploaded_at in seconds since 1970, by the server's clock
    batch_id       once it is submitted
    """

    def __init__(self, output: str) -> None:
        self.output, self.path = output, f"{output}.batches.json"
        self.open: list[dict[str, Any]] = []
        self.number = 0
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                state = json.load(file)
            self.open, self.number = state["open"], state["number"]

    def save(self) -> None:
        with whole_file(self.path) as file:
            json.dump({"number": self.number, "open": self.open}, file, ensure_ascii=False)

    def file_of(self, batch: dict[str, Any], what: str) -> str:
        return f"{self.output}.batch-{batch['number']}.{what}.jsonl"

    def run(
        self,
        args: argparse.Namespace,
        engine: Engine,
        store: Output,
        documents: Callable[[set[str]], Iterator[Doc]],
        template: str,
    ) -> None:
        """Submit what is not under way, wait for it, collect it; what expired or failed is submitted again.

        Args:
            store: where answers go; its `left` are the ids of the documents to ask for.
            documents: the documents of the collection with these ids.

        Raises:
            InputError: the server refuses, or a whole round of batches brought nothing.
        """
        import openai

        self.args, self.engine, self.store, self.documents, self.template = args, engine, store, documents, template
        url = args.base_url[0] if args.base_url else None
        self.server = public_url(url)
        self.client = openai.OpenAI(
            api_key=args.key or "none", base_url=url, max_retries=MAX_RETRIES, timeout=args.timeout
        )
        try:
            for batch in [b for b in self.open if "batch_id" not in b]:  # a kill came between two steps
                if args.batch_cancel and self.find(batch) is None:
                    self.open.remove(batch)
                    self.save()
                    os.remove(self.file_of(batch, "requests"))
                else:
                    self.submit(batch, resumed=True)
            if args.batch_cancel:
                for batch in self.open:
                    with suppress(openai.ConflictError, openai.BadRequestError):  # it has ended meanwhile
                        self.client.batches.cancel(batch["batch_id"])
                return self.collect_all()
            while store.left or self.open:
                before = len(store.left)
                self.prepare(store.left - {doc_id for batch in self.open for doc_id in batch["doc_ids"]})
                reasons = self.collect_all()
                if store.left and len(store.left) == before:
                    raise InputError(f"the last batches answered none of {before:,} documents ({reasons}); {KEPT}")
                if store.left:
                    warn(f"{len(store.left):,} documents were not answered ({reasons}); they are submitted again")
        except openai.APIConnectionError as error:
            raise InputError(
                f"{self.server} cannot be reached ({error.__cause__ or error}); the batches go on there, and the same "
                "command goes on here"
            ) from None
        except openai.APIStatusError as error:
            said = without_key(message_of(error.body) or str(error), args.key)
            raise hopeless(error, engine.name, self.server, args.key) or InputError(
                f"{self.server} refuses a batch ({error.status_code}: {said}); {KEPT}"
            ) from None

    # ------------------------------------------------------------------------------------------------------- submit

    def prepare(self, doc_ids: set[str]) -> None:
        """Write the request files of these documents, and submit each when it is whole."""
        requests: list[bytes] = []
        ids: list[str] = []
        size = 0

        def close() -> None:
            self.number += 1
            batch = {"number": self.number, "doc_ids": list(ids)}
            with whole_file(self.file_of(batch, "requests"), "wb") as file:
                file.writelines(requests)
            self.open.append(batch)
            self.save()
            ids.clear()
            requests.clear()
            self.submit(batch)

        for doc in self.documents(doc_ids) if doc_ids else ():
            body = self.engine.request(self.template.replace(SLOT, doc.text))
            request = {"custom_id": doc.doc_id, "method": "POST", "url": f"/v1{self.engine.path}", "body": body}
            line = json_line(request).encode(errors="replace")
            if ids and (len(ids) == self.args.batch_size or size + len(line) > MAX_BYTES):
                close()
                size = 0
            ids.append(doc.doc_id)
            requests.append(line)
            size += len(line)
        if ids:
            close()

    def submit(self, batch: dict[str, Any], resumed: bool = False) -> None:
        import openai

        path = self.file_of(batch, "requests")
        if "input_file_id" not in batch:  # an upload that was not noted is only a file too many
            with open(path, "rb") as file:
                uploaded = self.client.files.create(file=file, purpose="batch")
            batch |= {"input_file_id": uploaded.id, "uploaded_at": uploaded.created_at}
            self.save()
        # The one request that must not be sent twice. Where it is not known whether it arrived, the server's list is.
        known = self.find(batch) if resumed else None
        tries = 0
        while known is None:
            try:
                known = (
                    self.client.with_options(max_retries=0)
                    .batches.create(
                        input_file_id=batch["input_file_id"], endpoint=f"/v1{self.engine.path}", completion_window="24h"
                    )
                    .id
                )
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                code = getattr(error, "code", None)
                tries += 1
                if tries > MAX_RETRIES or (isinstance(code, str) and "quota" in code):
                    raise
                time.sleep(min(30.0, 0.25 * 2**tries))
                known = self.find(batch)
        batch["batch_id"] = known
        self.save()
        with suppress(FileNotFoundError):
            os.remove(path)

    def find(self, batch: dict[str, Any]) -> str | None:
        """The id of the batch that was made of this one's file, if the server has one. It lists the newest first."""
        for known in self.client.batches.list(limit=100) if "input_file_id" in batch else ():
            if known.input_file_id == batch["input_file_id"]:
                return known.id
            if known.created_at < batch["uploaded_at"] - 3600:
                return None
        return None

    # ------------------------------------------------------------------------------------------------------ collect

    def collect_all(self) -> str:
        """Wait for the batches under way and collect each that ends. Returns what kept documents from an answer."""
        from tqdm import tqdm

        reasons: Counter[str] = Counter()
        total = sum(len(batch["doc_ids"]) for batch in self.open)
        ended = 0  # requests of batches that were collected
        with tqdm(desc="Waiting for batches", total=total, unit=" docs") as bar:
            while self.open:
                counts, collected = 0, 0
                for batch in list(self.open):
                    now = self.client.batches.retrieve(batch["batch_id"])
                    if now.status in ENDED:
                        size = len(batch["doc_ids"])
                        self.collect(batch, now, reasons)
                        ended += size
                        collected += 1
                    elif now.request_counts:
                        counts += now.request_counts.completed + now.request_counts.failed
                bar.update(max(0, ended + counts - bar.n))
                bar.set_postfix_str(f"{len(self.open)} batches under way")
                if self.open and not collected:
                    time.sleep(self.args.batch_poll)
        return ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items()) or "no reason given"

    def collect(self, batch: dict[str, Any], ended: Any, reasons: Counter[str]) -> None:
        """Take in the answers of a batch that has ended, however it did."""
        path = self.file_of(batch, "results")
        with whole_file(path, "wb") as file:
            for file_id in (ended.output_file_id, ended.error_file_id):
                if file_id:
                    with self.client.files.with_streaming_response.content(file_id) as response:
                        for chunk in response.iter_bytes(1 << 20):
                            file.write(chunk)
                    file.write(b"\n")
        self.take_in(path, self.store.left.intersection(batch["doc_ids"]), reasons)
        self.open.remove(batch)
        self.store.save()
        self.save()
        os.remove(path)
        if ended.status == "failed":  # as a whole, before it began: its file, the engine, or too much at a time
            errors = (ended.errors.data if ended.errors else None) or []
            said = "; ".join(f"{e.message}{f' (request {e.line})' if e.line else ''}" for e in errors[:3])
            if not (self.open and any(e.code == "token_limit_exceeded" for e in errors)):
                said = without_key(said, self.args.key) or "no reason given"
                raise InputError(
                    f"{self.server} did not accept batch {ended.id}: {said}; too many tokens at a time go through with "
                    f"a smaller --batch_size or --max_examples; {KEPT}"
                )
            reasons["too many tokens at a time"] += len(batch["doc_ids"])

    def take_in(self, path: str, wanted: set[str], reasons: Counter[str]) -> None:
        places: dict[str, int] = {}  # of each result in the file: a batch of them may be larger than the memory
        with open(path, "rb") as results:
            place = 0
            for line in results:
                with suppress(ValueError, KeyError, TypeError):
                    places[json.loads(line)["custom_id"]] = place
                place += len(line)
            for doc in self.documents(wanted & places.keys()) if wanted & places.keys() else ():
                results.seek(places[doc.doc_id])
                result = json.loads(results.readline())
                response, error = result.get("response") or {}, result.get("error") or {}
                status, answer = response.get("status_code"), response.get("body")
                usage = read_usage(answer)
                try:
                    if status == 200:
                        prompt = self.template.replace(SLOT, doc.text)
                        self.store.answer(self.engine.read(answer, prompt, doc), usage)
                        continue
                    body = answer.get("error") if isinstance(answer, dict) else None
                    reason = without_key(message_of(error) or message_of(body) or f"status {status}", self.args.key)
                    if status in (400, 413, 422):
                        raise AnswerError(reason)
                except AnswerError as failure:
                    row = {"doc_id": doc.doc_id, "reason": str(failure), "answer": failure.answer}
                    self.store.failure(row, usage)
                    continue
                except ValueError as failure:
                    reason = str(failure)
                # The server's, or the day was over: to be submitted again.
                reasons[error.get("code") or reason] += 1
            if missing := len(wanted - places.keys()):
                reasons["not among the results"] += missing
