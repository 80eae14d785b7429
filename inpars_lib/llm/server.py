"""OpenAI-compatible servers: settings, clients and concurrency limits."""

import re
from dataclasses import dataclass

from inpars_lib.cli import InputError, report, shorten, warn
from inpars_lib.llm.access import Access, public_url

FIRST_WAIT = 0.5  # seconds before the second try; doubles with each further failure
FIRST_GAP = 0.02  # seconds between two requests after the first that came too fast
SHORTEST_WAIT = 0.25  # seconds after status 429, even if the server asks for none
LONGEST_WAIT = 60.0  # seconds: the longest pause of a server and of a failed request, unless the server asks for more
DOWN = 3  # failures without an answer in between after which a server gets one request at a time


@dataclass(frozen=True)
class ClientConfig:
    """Servers and limits.

    Attributes:
        urls: Base URLs, one per server; empty for OpenAI.
        access: API key and headers.
        concurrency: Upper bound of requests in flight.
        timeout: Seconds for one answer.
        patience: Seconds without an answer after which the run stops.
        sleep_time: Seconds to sleep after each answer.
        max_total_tokens: Stop when the tokens of all runs reach this number.
        api_settled: The user has named the API, so no other is tried.
        batch_size: Requests per batch.
        batch_poll: Seconds between two status requests of a batch.
    """

    urls: tuple[str, ...]
    access: Access
    concurrency: int = 8
    timeout: float = 120.0
    patience: float = 3600.0
    sleep_time: float = 0.0
    max_total_tokens: int | None = None
    api_settled: bool = False
    batch_size: int = 50_000
    batch_poll: float = 30.0


class Server:
    """A server with a limit of requests in flight and a gap between two requests. Both follow its answers.

    The limit: additive increase, multiplicative decrease, as in TCP (Jacobson, 1988). The gap grows with each refusal
    for too many requests and shrinks with each answer, so the rate stays near what a rate limiter allows.

    Attributes:
        failures: Failures since the last answer. Failures of requests that were in flight together count once.
        reached: The server has responded to a request, however it did.
        trouble: The reason of the last failure or refusal, empty after an answer.
    """

    def __init__(self, url: str | None, access: Access, max_limit: int, timeout: float) -> None:
        import openai

        try:
            # aiohttp: the time that httpx needs per request grows with the number of connections.
            options = access.client_options(url, openai.DefaultAioHttpClient, timeout)
            # The client's own retries are off, because every failure must be seen here to lower the limit.
            self.client = openai.AsyncOpenAI(**options, max_retries=0)
        except (ImportError, ValueError) as error:  # a SOCKS proxy without its package, a malformed address
            raise InputError(f"{public_url(url)}: {shorten(error)}. Check --base_url and the proxy settings.") from None
        self.name = public_url(url)
        self.max_limit = self.limit = float(max_limit)
        self.in_flight = self.failures = 0
        self.reached = False
        self.trouble = ""
        self.gap = self.pause = 0.0  # seconds between two requests; seconds after the last status 429
        self.resume_at = self.lowered_at = 0.0
        self.told: set[str] = set()  # kinds of trouble that were reported

    def free_capacity(self, now: float) -> float:
        """Return the free share of the limit, 0 to 1. A server that is down gets one request at a time."""
        if now < self.resume_at or self.in_flight >= (1 if self.failures >= DOWN else int(self.limit)):
            return 0.0
        return 1 - self.in_flight / self.limit

    def on_send(self, now: float) -> None:
        """Count a request, and keep the gap before the next one."""
        self.in_flight += 1
        self.resume_at = max(self.resume_at, now + self.gap)

    def on_answer(self) -> None:
        """Raise the limit and shrink the gap."""
        if self.failures >= DOWN:
            report(f"{self.name} is back")
            self.told.clear()
        self.reached, self.failures, self.trouble = True, 0, ""
        self.limit = min(self.max_limit, self.limit + 0.1)
        if self.pause:
            self.gap = max(self.gap * 1.3, self.pause / 2)
            self.pause = 0.0
        else:
            self.gap = self.gap * 0.96 if self.gap > FIRST_GAP / 20 else 0.0

    def on_failure(self, now: float, sent_at: float, wait: float | None = None, too_fast: bool = False) -> None:
        """Lower the limit after a failure: status 5xx, a timeout, a broken connection.

        A server with DOWN failures in a row is down. Each further failure doubles the pause before its next request.

        Args:
            now: The time.
            sent_at: When the failed request was sent.
            wait: Seconds that the server asks to wait, or None.
            too_fast: The failure may come from a rate limiter, as status 503 does.
        """
        if self._lower_limit(now, sent_at):
            self.failures += 1
            if self.failures >= DOWN:
                self.wait(now, backoff(self.failures - DOWN + 1))
            elif too_fast:
                self._lengthen_pause()
        self.wait(now, wait or self.pause)

    def on_rate_limit(self, now: float, sent_at: float, wait: float | None) -> None:
        """Lower the limit after status 429. Pause as long as the server asks, else twice as long as last time."""
        if self._lower_limit(now, sent_at):
            self._lengthen_pause()
        self.wait(now, self.pause if wait is None else max(wait, SHORTEST_WAIT))

    def wait(self, now: float, seconds: float) -> None:
        """Send nothing for some seconds."""
        self.resume_at = max(self.resume_at, now + seconds)

    def _lower_limit(self, now: float, sent_at: float) -> bool:
        """Lower the limit once for all requests that were in flight together. Return whether this was the first."""
        if sent_at < self.lowered_at:
            return False
        self.limit = max(1.0, self.limit * 0.7)
        self.lowered_at = now
        return True

    def _lengthen_pause(self) -> None:
        self.pause = min(LONGEST_WAIT, max(FIRST_GAP, self.gap, 2 * self.pause))

    def tell(self, reason: str, stops_at: str) -> None:
        """Report a failure if it is the first of its kind since the server last came back."""
        self.trouble = reason
        kind = re.sub(r"(?<!\()\b[\w-]*\d[\w-]*", "", reason)  # without request ids and times, with the status
        if kind not in self.told:
            self.told.add(kind)
            warn(f"{self.name}: {reason}. Trying again; the run stops at {stops_at} if no answer comes (--patience).")


def backoff(failures: int) -> float:
    """Return the seconds to wait after this many failures in a row."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(failures - 1, 10))
