"""Async OpenAI client with adaptive concurrency (AIMD) and retries.

Each answer is saved as it arrives. `jobs.py` says when a failure counts against a document.
"""

import asyncio
import math
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from inpars_lib.cli import InputError, duration, printable, report, shorten, warn
from inpars_lib.formats.records import Doc
from inpars_lib.llm.errors import (
    RESUME,
    Action,
    Verdict,
    classify_error,
    error_within,
    find_advice,
    status_within,
)
from inpars_lib.llm.jobs import Job, JobQueue
from inpars_lib.llm.prompt import PromptTemplate
from inpars_lib.llm.protocol import AnswerError, ModelApi, NoLogProbs, read_json
from inpars_lib.llm.query_store import QueryStore
from inpars_lib.llm.server import ClientConfig, Server
from inpars_lib.llm.usage import NO_TOKENS, Usage, estimate_usage, read_usage

MAX_FAILURES_IN_A_ROW = 10  # given up without an answer in between: the cause is not the documents
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
SAME_REFUSALS = 3  # documents that are refused with the same words before the first answer
SHOWN_FAILURES = 3  # failures that are printed


class GenerationClient:
    """Requests queries for many documents, concurrently.

    The first request goes alone: its answer shows which API and which parameters the model takes.

    Args:
        config: Servers and limits.
        api: The model.
        template: The prompt.
        store: Where answers and failures go.
    """

    def __init__(self, config: ClientConfig, api: ModelApi, template: PromptTemplate, store: QueryStore) -> None:
        self.config, self.api, self.template, self.store = config, api, template, store
        self.api_switched = False
        self.jobs = JobQueue()
        self.servers: list[Server] = []
        self.in_flight = 0
        self.failed_in_a_row: set[str] = set()  # documents
        self.refusals: Counter[str] = Counter()  # documents by the server's words
        self.first_answer_at = self.steady_until = 0.0  # between them, --concurrency requests were in flight
        self.steady_answers = 0
        self.accepting, self.all_sent = True, False
        self.error: BaseException | None = None

    def run(
        self,
        docs: Iterator[tuple[Doc, int]],
        answered: Iterator[tuple[Doc, int]],
        total: int,
        left: int,
        only_first: bool = False,
    ) -> None:
        """Run until every document is answered or given up, or until there is a reason to stop.

        Args:
            docs: The documents, each with the number of the request, from 1.
            answered: Requests that earlier runs answered, likewise. One is sent again to see whether the server works.
            total: Requests in all, for the progress bar.
            left: Requests without an answer or a recorded failure.
            only_first: Stop after the first answer.

        Raises:
            InputError: The reason to stop. Answers in flight were awaited.
            KeyboardInterrupt: Ctrl-C, likewise.
        """
        from tqdm import tqdm

        self.docs, self.answered, self.only_first = docs, answered, only_first
        unit = f" {self.store.unit}"
        self.bar = tqdm(desc="Generating", total=total, initial=total - left, unit=unit, smoothing=0.05)
        asyncio.run(self._run())

    async def _run(self) -> None:
        urls = self.config.urls or (None,)
        limit = max(1, math.ceil(self.config.concurrency / len(urls)))
        self.servers = [Server(url, self.config.access, limit, self.config.timeout) for url in urls]
        loop = asyncio.get_running_loop()
        self.now, self.wake = loop.time, asyncio.Event()
        self.last_answer_at = self.now()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                loop.add_signal_handler(number, self._interrupt, number)
        tasks: set[asyncio.Task[None]] = set()
        while True:
            self.wake.clear()
            pause = self._send(tasks)
            if not self.in_flight and not self.accepting:
                break
            if self.in_flight or self.jobs.waiting or not self.all_sent:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.wake.wait(), pause)
            elif not self._queue_last_tries():
                break
        if self.error and not self.store.done:
            self.store.discard_failures()
        self.bar.close()
        for server in self.servers:
            await server.client.close()
        self.store.save_meta()
        if self.error:
            raise self.error

    def rate(self, seconds: float) -> float:
        """Return the answers per second between the first answer and the last request, or else of all `seconds`."""
        if self.steady_answers > 1 and self.steady_until > self.first_answer_at:
            return self.steady_answers / (self.steady_until - self.first_answer_at)
        return max(1, self.store.answered) / seconds

    @property
    def trouble(self) -> str:
        """Why servers do not answer at the moment, empty if all do."""
        return "; ".join(f"{server.name}: {server.trouble}" for server in self.servers if server.trouble)

    def _send(self, tasks: set[asyncio.Task[None]]) -> float | None:
        """Send what can be sent now. Return the seconds until more can be sent, None for after the next answer."""
        while self.accepting:
            now = self.now()
            healthy = [server for server in self.servers if not server.failures]
            servers = healthy if healthy and self.jobs.last_tries else self.servers
            server = max(servers, key=lambda server: server.free_capacity(now))
            if not server.free_capacity(now):
                return min((s.resume_at - now for s in servers if s.resume_at > now), default=None)
            # Overload must not be what fails a last try, so it goes out among half as many requests.
            limit = math.ceil(server.limit / 2) if self.jobs.last_tries else self.config.concurrency
            if self.in_flight >= limit:
                return None
            job = self._next_job(now)
            if job is None:
                return self.jobs.seconds_left(now)
            server.on_send(now)
            self.in_flight += 1
            task = asyncio.create_task(self._attempt(job, server))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        return None

    def _next_job(self, now: float) -> Job | None:
        answered, waiting = self.store.answered, self.in_flight + len(self.jobs.waiting)
        if not answered and self.in_flight:
            return None
        limit, spent = self.config.max_total_tokens, self.store.usage.total
        if limit and spent >= limit:
            said = f"stopping at {spent:,} tokens (--max_total_tokens {limit:,})"
            warn(f"{said}. The answers to {self.in_flight} requests in flight are still added.")
            self.accepting = False
            return None
        if job := self.jobs.pop(now):
            return job
        if self.all_sent or waiting >= (self.config.concurrency if answered else 1):
            return None
        if self.only_first and answered:
            self.all_sent = True
            return None
        found = self._read(self.docs)
        self.all_sent = found is None
        return Job(*found) if found else None

    def _read(self, docs: Iterator[tuple[Doc, int]]) -> tuple[Doc, int] | None:
        """Return the next document. An error of the collection stops the run."""
        try:
            return next(docs, None)
        except (InputError, OSError) as error:
            self._stop(error)
            return None

    def _queue_last_tries(self) -> bool:
        """Queue the last tries, once all other documents are settled. Return whether there are any."""
        if not self.jobs.known and (self.jobs.put_aside or self.jobs.in_doubt):
            self.jobs.known = self._read(self.answered)
        return self.jobs.queue_last_tries()

    def _interrupt(self, number: int) -> None:
        if isinstance(self.error, KeyboardInterrupt):
            if number == signal.SIGINT:
                os._exit(130)
            return
        report("Stopping: waiting for the requests in flight. A second Ctrl-C stops at once and loses their answers.")
        self._stop(KeyboardInterrupt())

    def _stop(self, error: BaseException) -> None:
        self.accepting = False
        self.error = self.error or error
        self.wake.set()

    # ------------------------------------------------------------------------------------------------ one document

    async def _attempt(self, job: Job, server: Server) -> None:
        answered = self.store.answered
        try:
            await self._request(job, server)
            if self.config.sleep_time and self.store.answered > answered:
                await asyncio.sleep(self.config.sleep_time)
        except Exception as error:  # a full disk, or a bug, which must end the run and not vanish in a task
            self._stop(error)
        finally:
            server.in_flight -= 1
            self.in_flight -= 1
            state = self.trouble or f"tokens {self.store.usage_now}, {self.in_flight} in flight"
            self.bar.set_postfix_str(printable(state)[:80], refresh=bool(self.trouble))
            self.wake.set()

    async def _request(self, job: Job, server: Server) -> None:
        """Send one request and act on the outcome."""
        import httpx2
        import openai

        prompt = self.template.fill(job.doc)
        request = self.api.request(prompt, job.key.number)
        path = self.api.path
        sent_at = self.now()
        usage = NO_TOKENS
        try:
            async with asyncio.timeout(self.config.timeout):  # the client's own limit is for each read
                answer = read_json(await server.client.post(path, body=request, cast_to=object))
            usage = self._count_tokens(read_usage(answer), prompt)
            error_body = error_within(answer)
            if status := status_within(error_body):
                self.store.add_usage(usage)
                verdict = self._classify(server, request, status, error_body, {})
                return self._act_on(verdict, job, server, request, path, sent_at)
            row = self.api.read_answer(answer, prompt, self.template.truncate(job.doc)) | {"doc_text": job.doc.text}
        except (openai.APIConnectionError, TimeoutError) as error:
            # The transport calls every broken connection a timeout of connecting.
            late = isinstance(error, openai.APITimeoutError | TimeoutError)
            if late and not isinstance(error.__cause__, httpx2.ConnectTimeout):
                return self._on_failure(job, server, sent_at, f"no answer in {self.config.timeout:g} s")
            reason = shorten(error.__cause__ or error)
            server.reached = server.reached or not isinstance(error.__cause__, httpx2.ConnectTimeout)
            others = [other for other in self.servers if other is not server]
            if not server.reached and all(other.failures and not other.reached for other in others):
                return self._stop(self._unreachable_error(server, reason))
            self._on_failure(job, server, sent_at, f"the connection broke ({reason})")
        except openai.APIStatusError as error:
            verdict = self._classify(server, request, error.status_code, error.body, error.response.headers)
            verdict = verdict._replace(message=verdict.message or shorten(error))
            self._act_on(verdict, job, server, request, path, sent_at)
        except NoLogProbs as error:
            if not self.store.done:
                self._stop(self.api.no_log_probs_error(str(error)))
            else:
                self.store.add_usage(usage)
                self._on_failure(job, server, sent_at, str(error), answer=error.answer)
        except AnswerError as error:
            self._on_answer(job, server)
            self._give_up(job, str(error), error.answer, usage)
        except ValueError as error:  # not JSON, or not the JSON of an answer
            reason = f"the answer is malformed ({shorten(error)})"
            self.store.add_usage(usage)
            if not self.store.done:
                problem = f"{server.name}: {reason}. Check --engine, and that --base_url ends in /v1."
                return self._stop(InputError(problem))
            self._on_failure(job, server, sent_at, reason)
        else:
            self._on_answer(job, server)
            self.store.note_model(answer)
            if job.is_probe:
                self.store.add_usage(usage)
            else:
                self._save(job, row, usage)

    def _classify(
        self, server: Server, request: Mapping[str, Any], status: int, body: Any, headers: Mapping[str, str]
    ) -> Verdict:
        """Return what an error of a server means."""
        server.reached = True
        return classify_error(
            status,
            body,
            headers,
            request=request,
            server=server.name,
            can_switch_api=not (self.config.api_settled or self.store.answered or self.api_switched),
            answered=bool(self.store.done),
        )

    def _act_on(
        self, verdict: Verdict, job: Job, server: Server, request: Mapping[str, Any], path: str, sent_at: float
    ) -> None:
        match verdict.action:
            case Action.STOP:
                self._stop(InputError(verdict.message))
            case Action.SWITCH_API:
                self.api.use_api("completions" if self.api.api == "chat" else "chat")
                self.api_switched = True
                self.jobs.push(job)
            case Action.ADAPT if verdict.parameter in self.api.config.extra_body and self.store.done:
                self._give_up(job, verdict.message)
            case Action.ADAPT:
                try:
                    if path == self.api.path and verdict.parameter:
                        self.api.adapt(verdict.parameter, request, verdict.message)
                except InputError as error:
                    return self._stop(error)
                self.jobs.push(job)
            case Action.BACK_OFF:
                server.on_rate_limit(self.now(), sent_at, verdict.wait)
                self.jobs.push(job)
                self._on_trouble(server, verdict.message, verdict.wait)
            case Action.RETRY:
                self._on_failure(job, server, sent_at, verdict.message, verdict.wait, too_fast=verdict.too_fast)
            case Action.GIVE_UP:
                self._give_up(job, verdict.message, document_only=verdict.document_only)
                self._check_refusals(server, verdict)

    def _check_refusals(self, server: Server, verdict: Verdict) -> None:
        """Stop if the server refuses different documents with the same words before its first answer."""
        if verdict.document_only or self.store.done:
            return
        words = re.sub(r"\d+", "", verdict.message)
        self.refusals[words] += 1
        if self.refusals[words] >= SAME_REFUSALS:
            problem = f"{server.name}: refused {SAME_REFUSALS} documents ({verdict.message})"
            self._stop(InputError(f"{problem}. {find_advice(verdict.message, 'request')}"))

    def _count_tokens(self, usage: Usage, prompt: str) -> Usage:
        """Return the tokens of an answer. With a limit they are estimated if the server does not count them."""
        if usage.total or self.config.max_total_tokens is None:
            return usage
        if not self.store.usage_now.total:
            warn("The server does not count tokens. They are estimated from the length of the prompt.")
        config = self.api.config
        return estimate_usage(config.system_prompt + prompt, config.max_tokens, usage.cut_answers)

    def _unreachable_error(self, server: Server, reason: str) -> InputError:
        proxy = next((name for name in PROXIES if os.environ.get(name) or os.environ.get(name.lower())), None)
        hint = f" The environment has a proxy, {proxy}: set NO_PROXY for this host." if proxy else ""
        problem = f"{server.name}: the server cannot be reached ({reason})"
        return InputError(f"{problem}. Check --base_url and that the server runs.{hint} {RESUME}")

    def _on_answer(self, job: Job, server: Server) -> None:
        """Note that the server answers. If the request was a probe, the documents in doubt are at fault."""
        server.on_answer()
        self.last_answer_at = self.now()
        for other in self.jobs.on_answer(job):
            self._give_up(other, f"{other.reason}, {other.failures} times", other.answer)

    def _on_failure(
        self,
        job: Job,
        server: Server,
        sent_at: float,
        reason: str,
        wait: float | None = None,
        answer: str | None = None,
        too_fast: bool = False,
    ) -> None:
        """Slow the server down after a failure, and try the request again."""
        server.on_failure(self.now(), sent_at, wait, too_fast)
        self.jobs.on_failure(job, self.now(), reason, answer)
        self._on_trouble(server, reason, wait)

    def _on_trouble(self, server: Server, reason: str, wait: float | None) -> None:
        """Report why the server does not answer, or stop if that has lasted for --patience seconds."""
        now, patience = self.now(), self.config.patience
        if wait and wait > patience and all(other.resume_at > now + patience for other in self.servers):
            problem = (
                f"{reason}, and the server asks to wait {duration(wait)}, longer than --patience {duration(patience)}"
            )
            return self._stop(InputError(f"{server.name}: {problem}. {RESUME}"))
        left = self.last_answer_at + patience - now
        if left < 0:
            problem = f"{reason}, and no answer for {duration(patience)} (--patience)"
            return self._stop(InputError(f"{server.name}: {problem}. {RESUME}"))
        server.tell(reason, time.strftime("%H:%M:%S", time.localtime(time.time() + left)))

    def _give_up(
        self, job: Job, reason: str, answer: str | None = None, usage: Usage = NO_TOKENS, document_only: bool = False
    ) -> None:
        """Record why a document has no query. Stop if too many fail in a row."""
        self.store.add_failure(job.key, reason, answer, usage)
        if len(self.store.failed) <= SHOWN_FAILURES:
            warn(f"document {self.store.name(job.key)}: {reason}.")
        if not document_only:
            self.failed_in_a_row.add(job.doc.doc_id)
        if len(self.failed_in_a_row) >= MAX_FAILURES_IN_A_ROW:
            problem = f"{MAX_FAILURES_IN_A_ROW} documents in a row failed, the last one because: {reason}"
            self._stop(InputError(f"{problem}. Check the engine, the prompt and the server. {RESUME}"))

    def _save(self, job: Job, row: dict[str, Any], usage: Usage) -> None:
        store = self.store
        if not store.answered:
            store.request, store.settings["api"] = self.api.state(), self.api.api
            if not self.config.api_settled:
                report(f"{self.api.config.engine} is used through the {self.api.api} API")
            store.save_meta()
        store.add_answer(job.key, row, usage)
        self.failed_in_a_row.clear()
        if store.answered == 1:
            self.first_answer_at = self.now()
        elif not self.all_sent:
            self.steady_answers, self.steady_until = self.steady_answers + 1, self.now()
        self.bar.update()
        # All of a dry run, else at powers of two, as the paper's script
        if store.path is None or store.answered & (store.answered - 1) == 0:
            report(f"\nDocument: {row['doc_text'][:500]}\nQuestion: {row['question']}\n")
