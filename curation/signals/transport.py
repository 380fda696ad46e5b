"""One question to an HTTP service: what comes back, or which of three ways it failed.

`Unanswered` may pass by itself, `Refused` is about the content that was sent, and
a UserError is a mistake in the recipe. Redirects are not followed: they would
carry the credentials to another host.
"""

import base64
import json
import socket
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from curation.errors import UserError

CONTENT = (400, 413, 422)  # statuses that are about what was sent
PASSING = (408, 425, 429)  # and those, beside 5xx, after which it is worth trying again
MOST_BYTES = 64 << 20  # of an answer


class Unanswered(Exception):
    """No answer this time; `wait`: seconds that the service asks to be left alone."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Refused(Exception):
    """The service will not take what was sent."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


def reachable(url: str, name: str, timeout: float) -> None:
    """Raises: UserError: nothing accepts a connection at the url's host and port. A proxy's word is taken unasked."""
    parts = urlsplit(url)
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or ""):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout).close()
    except OSError as reason:
        raise UserError(
            f"service {name}: nothing answers at {parts.hostname}:{port} ({reason}); start it or mend url"
        ) from None


class HttpService:
    def __init__(self, url: str, name: str, timeout: float, token: str | None, header: str) -> None:
        self._url, self._name, self._timeout = url, name, timeout
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token is not None:
            self._headers[header] = f"Bearer {token}" if header.lower() == "authorization" else token
        self._opener = urllib.request.build_opener(_NoRedirects)

    def __call__(self, items: list[dict[str, Any]]) -> list[Any]:
        """The "items" of the answer.

        Raises:
            Unanswered: no answer in time, or one that is not to be had now.
            Refused: the service does not take these items.
            UserError: it does not take questions of this kind at all.
        """
        body = json.dumps({"items": [_plain(item) for item in items]}).encode()
        request = urllib.request.Request(self._url, body, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                text = response.read(MOST_BYTES)
        except urllib.error.HTTPError as reason:
            with reason:
                raise self._failure(reason) from None
        except (OSError, HTTPException, TimeoutError) as reason:
            raise Unanswered(f"{type(reason).__name__}: {reason}") from None
        try:
            answer = json.loads(text)
        except ValueError as reason:
            raise Unanswered(f"its answer is no JSON ({reason})") from None
        if not isinstance(answer, dict) or not isinstance(answer.get("items"), list):
            raise Unanswered('its answer has no list "items"')
        return answer["items"]

    def _failure(self, reason: urllib.error.HTTPError) -> Exception:
        if reason.code in CONTENT:
            return Refused(f"status {reason.code}")
        if reason.code in PASSING or reason.code >= 500:
            asked = reason.headers.get("Retry-After", "")
            return Unanswered(f"status {reason.code}", float(asked) if asked.isascii() and asked.isdigit() else 0.0)
        hint = "mend the variable that token_env names" if reason.code in (401, 403) else "mend url"
        return UserError(f"service {self._name}: {self._url} answers with status {reason.code}; {hint}")


def _plain(item: dict[str, Any]) -> dict[str, Any]:
    """The item as JSON holds it: bytes in base64."""
    return {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in item.items()}
