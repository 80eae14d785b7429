"""Access to a server: key, headers, addresses, redirects, and what of them is secret."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from inpars_lib.cli import InputError

MIN_SECRET = 6  # characters; shorter keys and words of a header are no secrets
NO_SECRETS = ("api-version",)  # fields of a query string


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


def check_redirect(response: Any) -> None:
    """Check that a redirect leads to the same server and repeats the request, which may hold secrets and documents.

    Raises:
        InputError: It leads elsewhere, or turns POST into GET.
    """
    if not response.has_redirect_location:
        return
    here, there = response.url, response.url.join(response.headers["Location"])
    upgrade = (here.scheme, there.scheme) == ("http", "https") and here.port is None and there.port is None
    same = (here.scheme, here.host, here.port) == (there.scheme, there.host, there.port)
    if not (same or (upgrade and here.host == there.host)):
        problem = "redirects to another server"
    elif response.request.method != "GET" and response.status_code not in (307, 308):
        problem = "redirects, and the redirect drops the request"
    else:
        return
    raise InputError(
        f"{public_url(str(here))}: {problem} ({response.status_code}), {public_url(str(there))}. If you trust this "
        "address, use it in --base_url."
    )


def find_secrets(access: "Access", urls: Sequence[str]) -> set[str]:
    """Return what may not be written or printed: key, words of headers, users, passwords and query strings of URLs."""
    found = {access.key or ""}
    for _, value in access.headers:
        found |= {value, *value.split()}
    for url in urls:
        parts = urlsplit(url)
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        found |= {user, password, f"{user}:{password}"} if user else set()
        found |= {value for name, value in parse_qsl(parts.query) if name not in NO_SECRETS}
    found = {secret for secret in found if len(secret) >= MIN_SECRET}
    encoded = {base64.b64encode(secret.encode()).decode() for secret in found}
    return found | encoded | {quote(secret, safe="") for secret in found}


class Access(NamedTuple):
    """API key and HTTP headers of every request. Both may hold secrets."""

    key: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def client_options(self, url: str | None, http_client: type, timeout: float) -> dict[str, Any]:
        """Return the arguments of an OpenAI client for this address, which may have a user and a query string."""
        import httpx2

        def without_key(request: httpx2.Request) -> httpx2.Request:
            del request.headers["Authorization"]
            return request

        async def check_redirect_async(response: httpx2.Response) -> None:
            check_redirect(response)

        hook = check_redirect_async if issubclass(http_client, httpx2.AsyncClient) else check_redirect
        address, headers = httpx2.URL(url or ""), dict(self.headers)
        made_up = headers and not self.key and "authorization" not in map(str.lower, headers)
        user = (address.username, address.password) if address.username else None  # aiohttp refuses these in a URL
        return {
            "base_url": str(address.copy_with(userinfo=b"", query=None)) if url else None,
            "default_query": dict(address.params),
            "default_headers": headers,
            "api_key": self.key or "none",  # a local server needs no key, but the client insists on one
            "timeout": timeout,
            "http_client": http_client(
                timeout=timeout, auth=user or (without_key if made_up else None), event_hooks={"response": [hook]}
            ),
        }
