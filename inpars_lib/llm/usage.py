"""Numbers of tokens as the server counts them, and the limit of --max_total_tokens."""

from typing import Any

import msgspec

from inpars_lib.cli import warn


class Usage(msgspec.Struct, frozen=True):
    """Numbers of tokens as the server counts them.

    Attributes:
        prompt_tokens: Tokens of the prompts.
        cached_tokens: Those of them that came from the server's prefix cache.
        completion_tokens: Tokens of the answers.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, other: "Usage") -> "Usage":
        """Return the sum."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )

    @property
    def total(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens

    def __str__(self) -> str:
        return f"{self.prompt_tokens:,} in ({self.cached_tokens:,} cached), {self.completion_tokens:,} out"


NO_TOKENS = Usage()


def read_usage(answer: Any) -> Usage:
    """Return the tokens of an answer, zeros where the server does not count them."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    counts = usage.get("prompt_tokens"), details.get("cached_tokens"), usage.get("completion_tokens")
    return Usage(*(count if isinstance(count, int) else 0 for count in counts))


BYTES_PER_TOKEN = 3  # of a prompt whose tokens the server has not counted yet: fewer than in most languages


class TokenBudget:
    """Upper bound of the tokens of requests in flight, so that a limit is never exceeded.

    Args:
        limit: Limit of the tokens of all runs, or None.
        max_tokens: Tokens per answer.
    """

    def __init__(self, limit: int | None, max_tokens: int) -> None:
        self.limit, self.max_tokens = limit, max_tokens
        self.tokens_per_byte = 1 / BYTES_PER_TOKEN  # the highest ratio so far
        self.reserved: dict[int, float] = {}  # bound of each request in flight, by any key
        self._warned = False

    def bound(self, prompt_bytes: int) -> float:
        """Return an upper bound of the tokens of a request."""
        return prompt_bytes * self.tokens_per_byte + self.max_tokens

    def allows(self, spent: int, prompt_bytes: int) -> bool:
        """Return whether one more request keeps the limit, however long the answers in flight become."""
        return self.limit is None or spent + sum(self.reserved.values()) + self.bound(prompt_bytes) <= self.limit

    def count(self, usage: Usage, prompt_bytes: int) -> Usage:
        """Return the tokens of an answer. With a limit they are estimated if the server does not count them."""
        if usage.prompt_tokens:
            self.tokens_per_byte = max(self.tokens_per_byte, usage.prompt_tokens / prompt_bytes)
        elif self.limit is not None:
            if not self._warned:
                warn(f"The server does not count tokens. They are estimated as bytes / {BYTES_PER_TOKEN}.")
            self._warned = True
            return Usage(prompt_bytes // BYTES_PER_TOKEN + 1, 0, self.max_tokens)
        return usage
