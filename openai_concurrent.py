"""Requests one by one, as many at a time as the servers bear.

`Generation` sends the documents, tries again what failed, and hands each answer on as soon as it is here. On 429 and
5xx it waits as the server's headers ask, lowers the number of requests under way, then raises it again.
"""

import argparse
import asyncio
import heapq
import math
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from engine import (
    KEPT,
    NO_TOKENS,
    SLOT,
    AnswerError,
    Engine,
    NoLogProbs,
    Usage,
    hopeless,
    message_of,
    public_url,
    read_usage,
    without_key,
)
from formats import Doc, InputError, in_short, warn
from generation_output import Output

TRIES = 7  # for a document whose request fails, or whose answer is broken
HOPELESS = 5  # documents that fail one after the other, and none answered, before we take it that none will be
LONGEST_PAUSE = 60.0  # seconds between two tries, unless the server asks for more


class Server:
    """A server, and how many requests at a time it bears: fewer after each sign that it is too many, then more again.

    Additive increase, multiplicative decrease, as in TCP (Jacobson, 1988).
    """

    def __init__(self, url: str | None, key: str | None, most: int, timeout: float) -> None:
        import openai

        # A local server wants no key, but the client does. Without ours it would look for one of its own. It does not
        # try again by itself: every failure has to be seen here, to lower the level.
        self.client = openai.AsyncOpenAI(api_key=key or "none", base_url=url, max_retries=0, timeout=timeout)
        self.name = public_url(url)
        self.most = self.level = float(most)
        self.under_way = 0
        self.away = 0  # connections that failed one after the other
        self.busy = 0  # answers of 429 without another between them
        self.resume_at = self.lowered_at = 0.0

    def room(self, now: float) -> float:
        """How much of the level is free, 0 to 1. A server that was away gets one request, to see."""
        if now < self.resume_at or self.under_way >= (1 if self.away else int(self.level)):
            return 0.0
        return 1 - self.under_way / self.level

    def bears(self) -> None:
        self.busy = 0
        self.level = min(self.most, self.level + 0.1)

    def lower(self, now: float, sent_at: float) -> None:
        if sent_at >= self.lowered_at:  # once for all that were under way together
            self.level = max(1.0, self.level * 0.7)
            self.lowered_at = now


class Job:
    """A document on its way."""

    def __init__(self, doc: Doc, answers: int) -> None:
        self.doc = doc
        self.tries = 0
        self.answers = self.answers_at_last = answers  # of the whole run when it was first sent; when it last failed
        self.ready_at = 0.0

    def __lt__(self, other: "Job") -> bool:
        return self.ready_at < other.ready_at


class Generation:
    """Asks for a query for each of many documents, as many at a time as the servers bear.

    The first document goes alone: its answer tells which API and which parameters the engine takes.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        engine: Engine,
        template: str,
        docs: Iterator[Doc],
        output: Output,
        total: int,
        initial: int,
    ) -> None:
        from tqdm import tqdm

        self.args, self.engine, self.template, self.docs, self.output = args, engine, template, docs, output
        urls = args.base_url or [None]
        most = max(1, math.ceil(args.concurrency / len(urls)))
        self.servers = [Server(url, args.key, most, args.timeout) for url in urls]
        self.bar = tqdm(desc="Generating", total=total, initial=initial, unit=" docs", smoothing=0.05)
        self.apis = [engine.api]  # tried so far
        self.again: list[Job] = []  # a heap: documents to be tried again, by the time for it
        self.held: list[dict[str, Any]] = []  # failures before the first answer; perhaps they are all of one cause
        self.under_way = 0
        self.sending, self.all_sent = True, False
        self.error: BaseException | None = None

    async def run(self, only_first: bool = False) -> None:
        """Until every document has its row or its error, or there is a reason to stop.

        Raises:
            InputError: why it stopped. What was under way was waited for.
        """
        loop = asyncio.get_running_loop()
        self.now, self.wake, self.only_first = loop.time, asyncio.Event(), only_first
        self.last_sign = self.now()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.interrupt)
        tasks: set[asyncio.Task] = set()
        while True:
            self.wake.clear()
            pause = self.send(tasks)
            if not self.under_way and (not self.sending or (self.all_sent and not self.again)):
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), pause)
        if self.error is None or self.output.answers:
            self.release()
        self.bar.close()
        self.output.save()
        if self.error:
            raise self.error

    def send(self, tasks: set[asyncio.Task]) -> float | None:
        """Send what can be sent now. Returns the seconds until there may be more, None for after the next answer."""
        while self.sending:
            now = self.now()
            server = max(self.servers, key=lambda server: server.room(now))
            if not server.room(now):
                waits = [server.resume_at - now for server in self.servers if server.resume_at > now]
                return min(waits, default=None)
            if self.under_way >= self.args.concurrency:
                return None
            job = self.next_job(now)
            if job is None:
                return self.again[0].ready_at - now if self.again and self.again[0].ready_at > now else None
            server.under_way += 1
            self.under_way += 1
            task = asyncio.create_task(self.attempt(job, server))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        return None

    def next_job(self, now: float) -> Job | None:
        waiting = self.under_way + len(self.again)
        if not self.output.answers and self.under_way:
            return None
        if self.again and self.again[0].ready_at <= now:
            return heapq.heappop(self.again)
        if self.all_sent or waiting >= (self.args.concurrency if self.output.answers else 1):
            return None
        if self.only_first and self.output.answers:
            self.all_sent = True
            return None
        if (most := self.args.max_total_tokens) is not None:
            spent = self.output.usage.total
            asked = len(self.output.done) + len(self.output.failed) + self.output.answers + self.output.failures
            mean = spent / max(1, asked)
            if spent >= most or spent + (waiting + 1) * mean > most:
                warn(f"stopping at {spent:,} tokens: another document might exceed --max_total_tokens {most:,}")
                self.sending = False
                return None
        try:
            doc = next(self.docs, None)
        except (InputError, OSError) as error:
            self.stop(error)
            return None
        self.all_sent = doc is None
        return Job(doc, self.output.answers) if doc else None

    def interrupt(self) -> None:
        if isinstance(self.error, KeyboardInterrupt):  # the second time
            os._exit(130)
        warn("Stopping: waiting for the answers under way. Ctrl-C again leaves at once and loses them.")
        self.stop(KeyboardInterrupt())

    def stop(self, error: BaseException) -> None:
        self.sending = False
        self.error = self.error or error
        self.wake.set()

    # ------------------------------------------------------------------------------------------------ one document

    async def attempt(self, job: Job, server: Server) -> None:
        try:
            if await self.ask(job, server) and self.args.sleep_time:
                await asyncio.sleep(self.args.sleep_time)
        except Exception as error:  # a full disk, say; or a fault of ours, which must end the run and not vanish
            self.stop(error)
        finally:
            server.under_way -= 1
            self.under_way -= 1
            self.bar.set_postfix_str(f"tokens {self.output.usage_now}, {self.under_way} under way", refresh=False)
            self.wake.set()

    async def ask(self, job: Job, server: Server) -> bool:
        """Ask once; gives True if the document is done with, else it waits in `self.again`, or the run is stopping."""
        import openai

        prompt = self.template.replace(SLOT, job.doc.text)
        sent, path, sent_at, usage = self.engine.request(prompt), self.engine.path, self.now(), NO_TOKENS
        try:
            answer = await server.client.post(path, body=sent, cast_to=object)
            usage = read_usage(answer)
            row = self.engine.read(answer, prompt, job.doc)
        except openai.APITimeoutError:
            server.lower(self.now(), sent_at)
            self.try_again(job, server, f"no answer in {self.args.timeout:g} s", cost=3, pause=1.0)
        except openai.APIConnectionError as error:
            self.try_again_when_back(job, server, error)
        except openai.APIStatusError as error:
            self.now_here(server)
            self.refusal(job, server, error, sent, path, sent_at)
        except NoLogProbs as error:
            if not self.output.done and not self.output.answers:
                self.stop(InputError(self.engine.no_log_probs()))
            else:
                self.try_again(job, server, str(error), usage=usage, answer=error.answer)
        except AnswerError as error:
            self.now_here(server)
            self.fail(job, str(error), usage, error.answer)
            return True
        except ValueError as error:  # no JSON, or not that of an answer
            self.now_here(server)
            self.try_again(job, server, f"the answer is broken ({error})", usage=usage)
        else:
            self.now_here(server)
            server.bears()
            self.last_sign = self.now()
            self.append(row, usage)
            return True
        return False

    def append(self, row: dict[str, Any], usage: Usage) -> None:
        output = self.output
        if not output.answers:
            output.request, output.settings["api"] = self.engine.as_dict(), self.engine.api
            if self.args.api is None:
                warn(f"{self.engine.name} is asked through the {self.engine.api} API")
        output.answer(row, usage)
        self.bar.update()
        self.release()
        if output.answers & (output.answers - 1) == 0:  # at powers of two, as upstream
            warn(f"\nDocument: {row['doc_text'][:500]}\nQuestion: {row['question']}\n")

    def release(self) -> None:
        """Write the failures that were held back: they are not all of one cause."""
        for row in self.held:
            self.output.failure(row)
        self.held = []

    def now_here(self, server: Server) -> None:
        if server.away > 1:
            warn(f"{server.name} is back")
        server.away = 0

    def fail(self, job: Job, reason: str, usage: Usage = NO_TOKENS, answer: str | None = None) -> None:
        """The document is given up: its row goes into the file of errors."""
        row = {"doc_id": job.doc.doc_id, "reason": reason} | ({} if answer is None else {"answer": answer})
        if self.output.answers:
            self.output.failure(row, usage)
        else:
            self.held.append(row)
            self.output.count(usage)
        if self.output.failures + len(self.held) <= 3:
            warn(f"document {job.doc.doc_id}: {reason}")
        if len(self.held) >= HOPELESS:
            self.stop(InputError(f"the first {HOPELESS} documents failed, so the others will too: {reason}"))

    def try_again(
        self,
        job: Job,
        server: Server,
        reason: str,
        *,
        cost: int = 1,
        pause: float | None = None,
        usage: Usage = NO_TOKENS,
        answer: str | None = None,
    ) -> None:
        """After a failure that may be the document's or the server's: the server's, if no other was answered since."""
        self.output.count(usage)
        job.tries += TRIES if self.held else cost
        job.answers_at_last = self.output.answers
        if job.tries >= TRIES and not self.output.answers:
            self.fail(job, f"{reason}, {TRIES} times", answer=answer)
        elif job.tries >= TRIES and (self.all_sent or self.output.answers > job.answers):
            self.fail(job, f"{reason}, and so on {TRIES} tries", answer=answer)
        elif self.now() - self.last_sign > self.args.patience:
            self.stop(InputError(f"{server.name}: {reason}, and no answer for {self.args.patience:.0f} s; {KEPT}"))
        else:
            if pause is None:
                pause = min(LONGEST_PAUSE, 0.25 * 2 ** min(job.tries, 10))
            job.ready_at = self.now() + pause * random.uniform(0.75, 1.25)
            heapq.heappush(self.again, job)

    def try_again_when_back(self, job: Job, server: Server, error: Exception) -> None:
        server.away += 1
        server.level = max(1.0, server.level * 0.7)
        server.resume_at = self.now() + min(LONGEST_PAUSE / 2, 0.25 * 2 ** min(server.away, 10))
        if not self.output.answers and all(s.away for s in self.servers):
            why = self.clean(error.__cause__ or error)
            return self.stop(
                InputError(f"{server.name} cannot be reached ({why}); check --base_url and that it runs; {KEPT}")
            )
        if self.now() - self.last_sign > self.args.patience:
            return self.stop(InputError(f"{server.name} has been away for {self.args.patience:.0f} s; {KEPT}"))
        if server.away == 2:
            warn(f"{server.name} is away; waiting for it, {self.args.patience:.0f} s at most (--patience)")
        # A document that brings the server down each time is its own fault: others are answered between its failures.
        if self.output.answers > job.answers_at_last:
            job.tries += 1
            job.answers_at_last = self.output.answers
        if job.tries >= TRIES:
            return self.fail(job, f"the connection broke, {TRIES} times")
        heapq.heappush(self.again, job)  # any server may take it at once

    def refusal(self, job: Job, server: Server, error: Any, sent: dict[str, Any], path: str, sent_at: float) -> None:
        """An answer with an error's status: what it means for the document, the server, and the run."""
        status, body = error.status_code, error.body
        fatal = hopeless(error, self.engine.name, server.name, self.args.key)
        if self.takes_other_api(error, path):
            heapq.heappush(self.again, job)
        elif fatal:
            self.stop(fatal)
        elif status in (408, 409, 429) or status >= 500:
            server.lower(self.now(), sent_at)
            asked = retry_after(error.response.headers)
            if asked is not None:
                server.resume_at = max(server.resume_at, self.now() + asked)
            if status == 429:  # nothing is wrong with the document: it waits, as all do
                server.busy += 1
                if asked is None:
                    server.resume_at = self.now() + min(LONGEST_PAUSE, 0.5 * 2 ** min(server.busy, 10))
                if asked and asked > LONGEST_PAUSE:
                    warn(f"{server.name} asks to wait {asked:.0f} s")
                if self.now() - self.last_sign > self.args.patience:
                    self.stop(InputError(f"{server.name} has been too busy for {self.args.patience:.0f} s; {KEPT}"))
                heapq.heappush(self.again, job)
            else:
                self.try_again(job, server, f"the server failed ({status} {self.clean(error)})", pause=asked)
        else:  # 400, 413, 422
            try:
                adapted = path != self.engine.path or self.engine.adapt(sent, body)
            except InputError as error:
                return self.stop(InputError(without_key(str(error), self.args.key)))
            if adapted:
                heapq.heappush(self.again, job)
            else:
                self.fail(job, self.clean(error))

    def takes_other_api(self, error: Any, path: str) -> bool:
        """Whether to try the other API, where the user named none and nothing was answered through this one yet."""
        if self.args.api or self.args.include_doc_probs or self.output.answers or self.output.request:
            return False
        message = message_of(error.body)
        wrong = error.status_code in (404, 405, 501) or "chat model" in message or "chat template" in message
        if not wrong or len(self.apis) > 1:
            return False
        self.engine.ask_through("completions" if self.engine.api == "chat" else "chat")
        self.apis.append(self.engine.api)
        return True

    # -------------------------------------------------------------------------------------------- words for the user

    def clean(self, error: Exception) -> str:
        """What the server said, in one line."""
        said = message_of(getattr(error, "body", None)) or in_short(error)
        return without_key(said, self.args.key)


def retry_after(headers: Any) -> float | None:
    """The seconds that an answer asks to wait for (RFC 9110, 10.2.3; `retry-after-ms` is OpenAI's)."""
    from email.utils import parsedate_to_datetime

    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with suppress(KeyError, ValueError):
            seconds = float(headers[name]) * unit
            return seconds if 0 <= seconds < math.inf else None
    with suppress(KeyError, ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    return None
