"""Async OpenAI client with adaptive concurrency (AIMD) and retries.

Each answer is saved as it arrives. After 429 and 5xx the client waits as long as the server's headers ask, lowers the
number of requests in flight, then raises it again.
"""

import asyncio
import heapq
import math
import os
import random
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from inpars_lib.cli import InputError, report, shorten, warn
from inpars_lib.formats.records import Doc
from inpars_lib.llm.errors import RESUME, Action, Verdict, classify_error
from inpars_lib.llm.prompt import PromptTemplate
from inpars_lib.llm.protocol import AnswerError, ModelApi, NoLogProbs
from inpars_lib.llm.query_store import QueryStore, RequestKey
from inpars_lib.llm.server import ClientConfig, Server, backoff
from inpars_lib.llm.usage import NO_TOKENS, TokenBudget, Usage, read_usage

TRIES = 7  # failures of its own after which a request is given up
GRACE = 60.0  # seconds without an answer at the end of a run, in which an outage fails no document
TIMEOUT_TRIES = 2  # a timeout counts this often, because each costs the whole timeout
MAX_FAILURES_IN_A_ROW = 10  # given up without an answer in between: the cause is not the documents
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
SHOWN_FAILURES = 3  # failures that are printed


class Job:
    """A request on its way to an answer."""

    def __init__(self, doc: Doc, number: int, answered: int) -> None:
        self.doc, self.key = doc, RequestKey(doc.doc_id, number)
        self.tries = 0  # failures that count against the document
        self.failures = 0  # all failures, for the exponential backoff
        self.answered_at_failure = answered  # requests answered when this one last failed
        self.ready_at = 0.0

    def __lt__(self, other: "Job") -> bool:
        return self.ready_at < other.ready_at


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
        self.queue: list[Job] = []  # heap of documents to try again, by the time of the next try
        self.in_flight = 0
        self.budget = TokenBudget(config.max_total_tokens, api.config.max_tokens)
        self.failed_in_a_row: set[str] = set()  # documents
        self.first_answer_at = self.steady_until = 0.0  # between them, --concurrency requests were in flight
        self.steady_answers = 0
        self.accepting, self.all_sent = True, False
        self.error: BaseException | None = None

    def run(self, docs: Iterator[tuple[Doc, int]], total: int, left: int, only_first: bool = False) -> None:
        """Run until every document is answered or given up, or until there is a reason to stop.

        Args:
            docs: The documents, each with the number of the request, from 1.
            total: Requests in all, for the progress bar.
            left: Those of them that earlier runs have not finished.
            only_first: Stop after the first answer.

        Raises:
            InputError: The reason to stop. Answers in flight were awaited.
            KeyboardInterrupt: Ctrl-C, likewise.
        """
        from tqdm import tqdm

        self.docs, self.only_first = docs, only_first
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
        self.latest_answered = -math.inf  # when the latest answered request was sent
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                loop.add_signal_handler(number, self._interrupt, number)
        tasks: set[asyncio.Task[None]] = set()
        while True:
            self.wake.clear()
            pause = self._send(tasks)
            if not self.in_flight and (not self.accepting or (self.all_sent and not self.queue)):
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), pause)
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

    def _send(self, tasks: set[asyncio.Task[None]]) -> float | None:
        """Send what can be sent now. Return the seconds until more can be sent, None for after the next answer."""
        while self.accepting:
            now = self.now()
            server = max(self.servers, key=lambda server: server.free_capacity(now))
            if not server.free_capacity(now):
                return min((s.resume_at - now for s in self.servers if s.resume_at > now), default=None)
            if self.in_flight >= self.config.concurrency:
                return None
            job = self._next_job(now)
            if job is None:
                return self.queue[0].ready_at - now if self.queue and self.queue[0].ready_at > now else None
            server.in_flight += 1
            self.in_flight += 1
            self.budget.reserved[id(job)] = self.budget.bound(self._prompt_bytes(job))
            task = asyncio.create_task(self._attempt(job, server))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        return None

    def _next_job(self, now: float) -> Job | None:
        answered, waiting = self.store.answered, self.in_flight + len(self.queue)
        if not answered and self.in_flight:
            return None
        if self.queue and self.queue[0].ready_at <= now:
            return self._within_limit(heapq.heappop(self.queue))
        if self.all_sent or waiting >= (self.config.concurrency if answered else 1):
            return None
        if self.only_first and answered:
            self.all_sent = True
            return None
        try:
            found = next(self.docs, None)
        except (InputError, OSError) as error:
            self._stop(error)
            return None
        self.all_sent = found is None
        return self._within_limit(Job(*found, answered)) if found else None

    def _within_limit(self, job: Job) -> Job | None:
        """Return the job if the token limit allows its request now."""
        spent = self.store.usage.total
        if self.budget.allows(spent, self._prompt_bytes(job)):
            return job
        heapq.heappush(self.queue, job)
        if not self.in_flight:
            limit = self.config.max_total_tokens
            warn(f"stopping at {spent:,} tokens: one more document might exceed --max_total_tokens {limit:,}.")
            self.accepting = False
        return None

    def _prompt_bytes(self, job: Job) -> int:
        return len((self.api.config.system_prompt + self.template.fill(job.doc)).encode(errors="replace"))

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
            del self.budget.reserved[id(job)]
            self.bar.set_postfix_str(f"tokens {self.store.usage_now}, {self.in_flight} in flight", refresh=False)
            self.wake.set()

    async def _request(self, job: Job, server: Server) -> None:
        """Send one request and act on the outcome."""
        import httpx2
        import openai

        prompt = self.template.fill(job.doc)
        request, path, sent_at, usage = self.api.request(prompt, job.key.number), self.api.path, self.now(), NO_TOKENS
        try:
            async with asyncio.timeout(self.config.timeout):  # the client's own limit is for each read
                answer = await server.client.post(path, body=request, cast_to=object)
            usage = self.budget.count(read_usage(answer), self._prompt_bytes(job))
            row = self.api.read_answer(answer, prompt, self.template.truncate(job.doc)) | {"doc_text": job.doc.text}
        except (openai.APIConnectionError, TimeoutError) as error:
            # The transport calls every broken connection a timeout of connecting.
            broken = not isinstance(error, openai.APITimeoutError | TimeoutError)
            if broken or isinstance(error.__cause__, httpx2.ConnectTimeout):
                server.on_connection_failure(self.now())
                reason = shorten(error.__cause__ or error)
                return self._on_connection_error(job, server, reason)
            server.on_overload(self.now(), sent_at)
            # An overloaded server times out for all. If a later request was answered, the document is the cause.
            tries = TIMEOUT_TRIES if self.latest_answered > sent_at or self._at_the_end() else 0
            self._retry(job, server, f"no answer in {self.config.timeout:g} s", tries=tries, wait=1.0, overload=True)
        except openai.APIStatusError as error:
            server.on_contact()
            verdict = classify_error(
                error.status_code,
                error.body,
                error.response.headers,
                request=request,
                server=server.name,
                can_switch_api=not (self.config.api_settled or self.store.answered or self.api_switched),
                answered=bool(self.store.done),
            )
            verdict = verdict._replace(message=verdict.message or shorten(error))
            self._act_on(verdict, job, server, request, path, sent_at)
        except NoLogProbs as error:
            if not self.store.done:
                self._stop(self.api.no_log_probs_error())
            else:
                self._retry(job, server, str(error), usage=usage, answer=error.answer)
        except AnswerError as error:
            server.on_contact()
            self._give_up(job, str(error), usage, error.answer)
        except ValueError as error:  # not JSON, or not the JSON of an answer
            server.on_contact()
            reason = f"the answer is malformed ({shorten(error)})"
            if not self.store.done:
                problem = f"{server.name}: {reason}. Check --engine, and that --base_url ends in /v1."
                return self._stop(InputError(problem))
            self._retry(job, server, reason, usage=usage)
        else:
            server.on_contact()
            server.on_answer()
            self.last_answer_at = self.now()
            self.latest_answered = max(self.latest_answered, sent_at)
            self._save(job, row, usage)

    def _act_on(
        self, verdict: Verdict, job: Job, server: Server, request: Mapping[str, Any], path: str, sent_at: float
    ) -> None:
        match verdict.action:
            case Action.STOP:
                self._stop(InputError(verdict.message))
            case Action.SWITCH_API:
                self.api.use_api("completions" if self.api.api == "chat" else "chat")
                self.api_switched = True
                heapq.heappush(self.queue, job)
            case Action.ADAPT if verdict.parameter in self.api.config.extra_body and self.store.done:
                self._give_up(job, verdict.message)
            case Action.ADAPT:
                try:
                    if path == self.api.path and verdict.parameter:
                        self.api.adapt(verdict.parameter, request, verdict.message)
                except InputError as error:
                    return self._stop(error)
                heapq.heappush(self.queue, job)
            case Action.BACK_OFF:
                server.on_overload(self.now(), sent_at)
                server.on_rate_limit(self.now(), verdict.wait)
                self._retry(job, server, verdict.message, tries=0, wait=0.0)
            case Action.RETRY:
                server.on_overload(self.now(), sent_at)
                server.resume_at = max(server.resume_at, self.now() + (verdict.wait or 0.0))
                self._retry(job, server, verdict.message, wait=verdict.wait or None, overload=True)
            case Action.GIVE_UP:
                self._give_up(job, verdict.message, too_long=verdict.too_long)

    def _on_connection_error(self, job: Job, server: Server, reason: str) -> None:
        if not self.store.answered and all(s.connection_failures for s in self.servers):
            problem = f"{server.name}: the server cannot be reached ({reason})"
            proxy = next((name for name in PROXIES if os.environ.get(name) or os.environ.get(name.lower())), None)
            hint = f" The environment has a proxy, {proxy}: set NO_PROXY for this host." if proxy else ""
            return self._stop(InputError(f"{problem}. Check --base_url and that the server runs.{hint} {RESUME}"))
        if server.connection_failures == 2:
            warn(f"{server.name} is unreachable. Waiting up to {self.config.patience:.0f} s for it (--patience).")
        self._retry(job, server, "the connection broke", wait=0.0)  # any server may take the document at once

    def _retry(
        self,
        job: Job,
        server: Server,
        reason: str,
        *,
        tries: int = 1,
        wait: float | None = None,
        usage: Usage = NO_TOKENS,
        answer: str | None = None,
        overload: bool = False,
    ) -> None:
        """Queue a document again, or give it up after TRIES failures of its own.

        A failure counts against the document only if another one was answered since its last failure. Otherwise the
        server is at fault (`overload`: probably), which --patience bounds.
        """
        self.store.add_usage(usage)
        at_the_end = self._at_the_end() if overload else self.all_sent
        if self.store.answered > job.answered_at_failure or at_the_end:
            job.tries += tries
        job.answered_at_failure = self.store.answered
        job.failures += 1
        if job.tries >= TRIES:
            self._give_up(job, f"{reason}, {job.failures} times", answer=answer)
        elif self.now() - self.last_answer_at > self.config.patience:
            self._stop(InputError(f"{server.name}: {reason}, and no answer for {self.config.patience:.0f} s. {RESUME}"))
        else:
            wait = backoff(job.failures) if wait is None else wait
            job.ready_at = self.now() + wait * random.uniform(0.75, 1.25)
            heapq.heappush(self.queue, job)

    def _at_the_end(self) -> bool:
        """Return whether a failure counts although no other document was answered, because none may be left."""
        last = self.in_flight == 1 and not self.queue
        return self.all_sent and (last or self.now() - self.last_answer_at > GRACE)

    def _give_up(
        self, job: Job, reason: str, usage: Usage = NO_TOKENS, answer: str | None = None, too_long: bool = False
    ) -> None:
        """Record why a document has no query. Stop if too many fail in a row."""
        self.store.add_failure(job.key, reason, answer, usage)
        if len(self.store.failed) <= SHOWN_FAILURES:
            warn(f"document {self.store.name(job.key)}: {reason}.")
        self.failed_in_a_row |= set() if too_long else {job.doc.doc_id}
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
