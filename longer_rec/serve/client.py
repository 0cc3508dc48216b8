"""A client in the standard library: one connection, kept open."""

import http.client
import json
from collections.abc import Mapping
from typing import Any, Self
from urllib.parse import quote, urlsplit

from longer_rec.errors import ServeError


class Refused(ServeError):
    """An answer that is none: ``status`` and the server's one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the server answers {status}: {message}")
        self.status = status


class Client:
    """``Client("http://127.0.0.1:8000").score({...})``; not for several threads at once."""

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 30.0) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServeError(f"{url!r} is no address of a server; give such as http://127.0.0.1:8000")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=timeout_s)
        self._url = url
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def score(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """``logits`` by task, and where they came from."""
        return self._call("POST", "/v1/score", request)

    def add_events(self, user: str | int, events: Mapping[str, Any]) -> dict[str, Any]:
        """Append to a user's stored history."""
        return self._call("POST", f"/v1/users/{quote(str(user), safe='')}/events", {"events": events})

    def delete(self, user: str | int) -> dict[str, Any]:
        """Forget a user."""
        return self._call("DELETE", f"/v1/users/{quote(str(user), safe='')}")

    def model(self) -> dict[str, Any]:
        """What is served, and what it takes."""
        return self._call("GET", "/v1/model")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            self._connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            reply = self._connection.getresponse()
            content = reply.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ServeError(f"no answer from {self._url}: {error or type(error).__name__}; is it running?") from None
        try:
            answer: dict[str, Any] = json.loads(content)
        except ValueError:
            answer = {"error": content[:200].decode(errors="replace")}
        if reply.status != 200:
            raise Refused(reply.status, str(answer.get("error", answer)))
        return answer
