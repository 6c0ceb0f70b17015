"""One connection to the control routes of a backend, and the workflows that it was told of.

`http.client`, not httpx: it costs a quarter of the time, and this runs beside the app. It takes no
notice of proxies.
"""

from __future__ import annotations

from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Final
from urllib.parse import quote, urlsplit

from ._log import warn_once
from ._settings import Settings
from .protocol import HEADER_WORKFLOW, MAX_WORKFLOW_BYTES, RunEvent, RunEvents, Workflow

TIMEOUT_S: Final = 2.0

_KEPT_BYTES = 64 * 1024
_PASSING = {502, 503, 504}
_OF_THIS_WORKFLOW = {400, 413, 422}


class Unreached(Exception):
    """Nothing was taken, as far as can be told: the same may be sent again."""


class Refused(Exception):
    """The backend will not take it, or may have taken it: the same must not be sent again."""


class Link:
    """A connection that has failed once is of no use. All it was told is forgotten with it: who
    takes the next one may have been started anew."""

    def __init__(self, backend: Settings) -> None:
        parts = urlsplit(backend.control_url)
        connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self.backend = backend
        self._path = parts.path
        self._http = connect(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
        self._known: set[str] = set()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def send(self, workflow: Workflow, run: str | None, events: tuple[RunEvent, ...]) -> None:
        """Send the events of one run, and before that the workflow, if it is not known yet.

        Raises:
            Unreached: nothing was taken.
            Refused: it was not taken, or may have been.
        """
        self._ensure_known(workflow)
        if run is None or not events:
            return
        body = RunEvents(events=events).model_dump_json(by_alias=True, exclude_none=True)
        reply = self._request("POST", f"/runs/{quote(run, safe='')}/events", body.encode())
        self._check(reply.status)
        if reply.headers.get(HEADER_WORKFLOW) == "unknown":
            self._known.discard(workflow.id)
            with suppress(Unreached, Refused):  # the events were taken: the next ones bring it
                self._ensure_known(workflow)

    def _ensure_known(self, workflow: Workflow) -> None:
        name = workflow.id
        if name in self._known:
            return
        body = workflow.model_dump_json(exclude_none=True).encode()
        if len(body) > MAX_WORKFLOW_BYTES:
            warn_once(f"size:{name}", "workflow %s not sent: %d bytes", name, len(body))
        else:
            reply = self._request("PUT", f"/workflows/{quote(name, safe='')}", body)
            if reply.status in _OF_THIS_WORKFLOW:
                why = reply.text.partition("\n")[0][:500]
                warn_once(f"refused:{name}", "workflow %s refused: %s", name, why)
            else:
                self._check(reply.status)
        self._known.add(name)

    def _check(self, status: int) -> None:
        if status in _PASSING:
            raise Unreached(f"HTTP {status}")
        if status >= 300:
            raise Refused(f"HTTP {status}")

    def _request(self, method: str, path: str, body: bytes) -> _Reply:
        headers = {"content-type": "application/json"}
        if self.backend.api_key:
            headers["authorization"] = f"Bearer {self.backend.api_key}"
        try:
            if self._http.sock is None:
                self._http.connect()
        except OSError as error:
            raise Unreached(_said(error)) from error
        try:
            self._http.request(method, self._path + path, body, headers)
            with self._http.getresponse() as reply:
                said = _Reply(reply)
            if not said.whole:
                self._http.close()  # what is left of it is in the way of the next
            return said
        except TimeoutError as error:
            # Events that are told twice are counted twice; a workflow is not.
            failure = Refused if method == "POST" else Unreached
            raise failure(f"no reply in {TIMEOUT_S:g} s") from error
        except (OSError, HTTPException) as error:
            raise Unreached(_said(error)) from error


class _Reply:
    def __init__(self, reply: HTTPResponse) -> None:
        self.status = reply.status
        self.headers = reply.headers
        self.text = reply.read(_KEPT_BYTES).decode(errors="replace")
        # Without a length nobody knows whether the server means to go on: it is asked anew.
        self.whole = reply.isclosed() and reply.headers.get("content-length") is not None


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]
