"""Requests of a server that may be busy, starting or away: tried again, timed out, refused in the server's words."""

import json
import re
from collections.abc import Callable
from threading import TIMEOUT_MAX
from typing import Any

import urllib3

from topk_rkl import checks

CONNECT_SECONDS, BACKOFF_SECONDS = 10, 0.5  # to connect; half the wait before the second retry
PASSING = (429, 500, 502, 503, 504)  # statuses of a server that is busy or starting
TOLD = 600  # characters of a server's own words
REMEDIES = {
    **dict.fromkeys((301, 302, 307, 308), "pass the url to which it leads"),  # a key may not be sent on by itself
    401: "pass api_key", 403: "pass an api_key that may use this server", 413: "score shorter prompts",
}  # fmt: skip
OTHERWISE = "change what it names, or raise retries where the server is busy or starting"
Remedy = Callable[[int, str], str | None]  # of a status and the server's words; None where it knows none


class Http:
    """A server's connections, which any thread may use."""

    def __init__(self, url: str, connections: int, retries: int, timeout: float, api_key: str | None) -> None:
        self.url = require_url(url).removesuffix("/v1")  # with which clients of OpenAI's API begin
        retries = checks.require_integer("retries", retries)
        checks.require_not_negative("retries", retries)
        checks.require_positive("timeout", timeout)
        if timeout > TIMEOUT_MAX:
            raise ValueError(f"timeout is {timeout}; it must be at most {TIMEOUT_MAX:.0f} seconds")
        if api_key is not None:
            require_word("api_key", api_key)
        self._pool = urllib3.PoolManager(
            maxsize=connections,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=float(timeout)),
            retries=urllib3.Retry(
                retries, allowed_methods={"POST"}, status_forcelist=PASSING, backoff_factor=BACKOFF_SECONDS,
                raise_on_status=False,
            ),
        )  # fmt: skip

    def post(self, path: str, body: dict[str, Any], remedy: Remedy) -> Any:
        """The decoded answer.

        Raises:
            ValueError: there is none.
        """
        try:
            answer = self._pool.request("POST", self.url + path, json=body, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise ValueError(
                f"{path} gave no whole answer: {reason}; see that the server runs and that url is right, or raise "
                "retries or timeout"
            ) from error
        if answer.status != 200:
            words = answer.headers.get("Location") or words_of(answer.data)
            todo = remedy(answer.status, words) or REMEDIES.get(answer.status, OTHERWISE)
            raise ValueError(f"{path} answered {answer.status}: {words}; {todo}")
        try:
            return answer.json()
        except ValueError as error:
            raise ValueError(
                f"{path} answered {answer.data[:40]!r}, which is not JSON; see that url is that of the server"
            ) from error

    def close(self) -> None:
        self._pool.clear()


def words_of(data: bytes) -> str:
    """An error's message, which servers put in JSON of several kinds."""
    text = data.decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error", found)
        text = found if isinstance(found, str) else found.get("message") or found.get("detail") or text
    except (ValueError, AttributeError):
        pass
    return str(text)[:TOLD].strip().rstrip(".") or "nothing"


def require_url(url: object) -> str:
    if not isinstance(url, str) or not re.match(r"https?://[^/]", url):
        raise ValueError(f"url is {checks.seen(url)}; it must begin with http:// or https://, and name a host")
    return url.rstrip("/")


def require_word(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name} is {checks.seen(value)}; it must be a str that is not empty")
    return value
