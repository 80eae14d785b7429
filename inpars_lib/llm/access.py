"""Access to a server: key, headers, addresses, and the removal of secrets from messages."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from inpars_lib.cli import InputError, shorten

MIN_SECRET = 6  # characters; shorter keys and words of a header are no secrets


def public_url(url: str | None) -> str:
    """Return a server's address without user, password and query string, which may hold keys."""
    if not url:
        return "OpenAI"
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check_url(url: str) -> None:
    """Check that a server's address can be used.

    Raises:
        InputError: The address has no scheme, no host or no valid port.
    """
    example = "Write it like http://127.0.0.1:8000/v1 (an IPv6 address in brackets: http://[::1]:8000/v1)."
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or (parts.netloc.rpartition("@")[2].count(":") > 1 and "[" not in parts.netloc):
        shown = url.rpartition("@")[2].partition("?")[0]  # user, password and query string may be secrets
        raise InputError(f"--base_url {shown}: not a server URL. {example}")


def read_key(environment: Mapping[str, str], urls: Sequence[str]) -> str | None:
    """Return the API key: API_KEY, or for OpenAI's own servers also OPENAI_API_KEY.

    Raises:
        InputError: The key cannot be sent in an HTTP header.
    """
    names = ["API_KEY"]
    if all(f".{urlsplit(url).hostname}".endswith(".openai.com") for url in urls):
        names.append("OPENAI_API_KEY")
    for name in names:
        if key := environment.get(name, "").strip():
            if not (key.isascii() and key.isprintable() and " " not in key):
                raise InputError(f"{name}: the key has characters that no key has. Copy it again.")
            return key
    return None


class Access(NamedTuple):
    """API key and HTTP headers of every request. Both may hold secrets."""

    key: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def client_options(self, url: str | None, http_client: Callable[..., Any], timeout: float) -> dict[str, Any]:
        """Return the arguments of an OpenAI client for this address, which may have a user and a query string."""
        import httpx2

        def without_key(request: httpx2.Request) -> httpx2.Request:
            del request.headers["Authorization"]
            return request

        address, headers = httpx2.URL(url or ""), dict(self.headers)
        made_up = headers and not self.key and "authorization" not in map(str.lower, headers)
        user = (address.username, address.password) if address.username else None  # aiohttp refuses these in a URL
        return {
            "base_url": str(address.copy_with(userinfo=b"", query=None)) if url else None,
            "default_query": dict(address.params),
            "default_headers": headers,
            "api_key": self.key or "none",  # a local server needs no key, but the client insists on one
            "timeout": timeout,
            "http_client": http_client(timeout=timeout, auth=user or (without_key if made_up else None)),
        }

    def quote(self, message: object) -> str:
        """Return a message, shortened, without the key and the words of the headers, which the server may quote."""
        return shorten(self.redact(str(message)))  # in this order: the first half of a key is a secret too

    def redact(self, body: Any) -> Any:
        """Return a message or an `error` object without secrets."""
        if isinstance(body, dict):
            return {name: self.redact(value) for name, value in body.items()}
        if not isinstance(body, str):
            return [self.redact(value) for value in body] if isinstance(body, list) else body
        words = {word for _, value in self.headers for word in (value, *value.split())} | {self.key or ""}
        for secret in sorted(words, key=len, reverse=True):
            body = body.replace(secret, "<key>") if len(secret) >= MIN_SECRET else body
        return body
