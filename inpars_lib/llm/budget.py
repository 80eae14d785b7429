"""The token limit of --max_total_tokens, which holds for requests in flight too."""

from inpars_lib.cli import warn
from inpars_lib.llm.tokens import Usage

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
