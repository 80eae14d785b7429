"""Requests that wait for another try, and the rule that decides whether the server or a document is at fault.

A failure of the server (5xx, timeout, broken connection) fails no document at first:

1. After TRIES failures the document is put aside, and the others go on.
2. When the others are settled, each document that was put aside is tried once more.
3. When a last try fails, a document that already has an answer is requested again, as a probe. If the server answers
   the probe, the failure is a strike against the document. If not, the server is at fault, and all documents wait.

A document is given up after STRIKES strikes: an outage may end between a last try and its probe.
"""

import heapq
import random

from inpars_lib.formats.records import Doc
from inpars_lib.llm.query_store import RequestKey
from inpars_lib.llm.server import backoff

TRIES = 3
STRIKES = 2


class Job:
    """A request on its way to an answer.

    Attributes:
        is_probe: The document was answered before; the request shows whether the server answers at all.
        failures: Failures of the server for this request.
        strikes: Last tries that failed although the server answered the probe that followed.
        reason: Reason of the last failure.
        answer: The answer that was useless, if there was one.
        ready_at: Time of the next try.
    """

    def __init__(self, doc: Doc, number: int, is_probe: bool = False) -> None:
        self.doc, self.key, self.is_probe = doc, RequestKey(doc.doc_id, number), is_probe
        self.failures = self.strikes = 0
        self.reason = ""
        self.answer: str | None = None
        self.ready_at = 0.0

    def __lt__(self, other: "Job") -> bool:
        return self.ready_at < other.ready_at


class JobQueue:
    """Requests that wait for another try.

    Attributes:
        waiting: Heap by the time of the next try.
        known: A document that was answered, with the number of its request, or None.
        last_tries: All documents are settled but those that were put aside.
    """

    def __init__(self) -> None:
        self.waiting: list[Job] = []
        self.put_aside: list[Job] = []
        self.in_doubt: list[Job] = []  # failed in their last try, perhaps because of the server
        self.known: tuple[Doc, int] | None = None
        self.last_tries = False

    def push(self, *jobs: Job) -> None:
        """Queue requests by the time of their next try."""
        for job in jobs:
            heapq.heappush(self.waiting, job)

    def pop(self, now: float) -> Job | None:
        """Return a request whose time has come, or None."""
        return heapq.heappop(self.waiting) if self.waiting and self.waiting[0].ready_at <= now else None

    def seconds_left(self, now: float) -> float | None:
        """Return the seconds until the next request's time comes, or None if none waits for it."""
        return self.waiting[0].ready_at - now if self.waiting and self.waiting[0].ready_at > now else None

    def on_failure(self, job: Job, now: float, reason: str, answer: str | None) -> None:
        """Queue a request again after a failure of the server, or put it aside."""
        job.failures += 1
        job.reason, job.answer = reason, answer
        job.ready_at = now + backoff(job.failures) * random.uniform(0.75, 1.25)
        if job.is_probe:  # the server is at fault
            self.push(*self.in_doubt)
            self.in_doubt.clear()
        elif self.last_tries:
            self.in_doubt.append(job)
        elif job.failures < TRIES:
            self.push(job)
        else:
            self.put_aside.append(job)

    def on_answer(self, job: Job) -> list[Job]:
        """Note an answer. Return the requests that are to be given up because the server answers others."""
        if not job.is_probe:
            self.known = (job.doc, job.key.number)
            return []
        for other in self.in_doubt:
            other.strikes += 1
        self.push(*(other for other in self.in_doubt if other.strikes < STRIKES))
        given_up = [other for other in self.in_doubt if other.strikes >= STRIKES]
        self.in_doubt.clear()
        return given_up

    def queue_last_tries(self) -> bool:
        """Queue what is to be tried when all others are settled. Return whether there is anything."""
        self.last_tries = True
        if self.in_doubt and self.known:
            self.push(Job(*self.known, is_probe=True))
            return True
        self.push(*self.put_aside, *self.in_doubt)
        self.put_aside.clear()
        self.in_doubt.clear()
        return bool(self.waiting)
