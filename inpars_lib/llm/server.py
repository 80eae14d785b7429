"""OpenAI-compatible servers: settings, clients and concurrency limits."""

from dataclasses import dataclass

from inpars_lib.cli import InputError, report, shorten, warn
from inpars_lib.llm.access import Access, public_url

FIRST_WAIT = 0.5  # seconds before the second try; doubles with each further failure
SHORTEST_WAIT = 0.25  # seconds after status 429, even if the server asks for none
LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more


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
        max_total_tokens: Stop before the tokens of all runs exceed this number.
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
    """A server and its concurrency limit: lower after each overload, then higher again.

    Additive increase, multiplicative decrease, as in TCP (Jacobson, 1988).
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
        self.in_flight = 0
        self.connection_failures = 0  # in a row
        self.rate_limits = 0  # answers with status 429 in a row
        self.resume_at = self.lowered_at = 0.0

    def free_capacity(self, now: float) -> float:
        """Return the free share of the limit, 0 to 1. An unreachable server gets one request at a time."""
        if now < self.resume_at or self.in_flight >= (1 if self.connection_failures else int(self.limit)):
            return 0.0
        return 1 - self.in_flight / self.limit

    def on_contact(self) -> None:
        """Note that the server is reachable."""
        if self.connection_failures > 1:
            report(f"{self.name} is back")
        self.connection_failures = 0

    def on_answer(self) -> None:
        """Raise the limit."""
        self.rate_limits = 0
        self.limit = min(self.max_limit, self.limit + 0.1)

    def on_overload(self, now: float, sent_at: float) -> None:
        """Lower the limit, once for all requests that were in flight together."""
        if sent_at >= self.lowered_at:
            self.limit = max(1.0, self.limit * 0.7)
            self.lowered_at = now

    def on_rate_limit(self, now: float, wait: float | None) -> None:
        """Pause the server after status 429, for the seconds that it asks for or twice as long as the last time."""
        self.rate_limits += 1
        seconds = backoff(self.rate_limits) if wait is None else max(wait, SHORTEST_WAIT)
        self.resume_at = max(self.resume_at, now + seconds)
        if wait and wait > LONGEST_WAIT:
            warn(f"{self.name} asks to wait {wait:.0f} s.")

    def on_connection_failure(self, now: float) -> None:
        """Pause the server after a failed connection, twice as long as the last time."""
        self.connection_failures += 1
        self.limit = max(1.0, self.limit * 0.7)
        self.resume_at = now + backoff(self.connection_failures) / 2


def backoff(failures: int) -> float:
    """Return the seconds to wait after this many failures in a row."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(failures - 1, 10))
