"""Talks to NovaCron's HTTP API: any replica, each write under one idempotency key."""

from __future__ import annotations

import json
import time
import uuid
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode

from ansible.module_utils.basic import env_fallback
from ansible.module_utils.urls import open_url

ARGUMENTS = {
    "endpoint": {
        "type": "list",
        "elements": "str",
        "fallback": (env_fallback, ["NOVACRON_ENDPOINT"]),
    },
    "ca": {"type": "path", "fallback": (env_fallback, ["NOVACRON_CA"])},
    "token": {"type": "str", "no_log": True, "fallback": (env_fallback, ["NOVACRON_TOKEN"])},
}

# While nobody leads a write waits for up to 6 s; a replica that is gone is noticed sooner.
REQUEST_TIMEOUT_S = 30
# Leadership comes back within seconds; what takes longer is an outage, and told as one.
RETRY_FOR_S = 60
RETRY_PERIOD_S = 1
# The longest that the API itself waits at a time.
WAIT_S = 30


class ApiError(Exception):
    """What the API refused, or why it was not reached; ``status`` is 0 then."""

    def __init__(self, message, status=0, problem=None):
        super().__init__(message)
        self.status = status
        self.problem = problem or {}


class Api:
    """``endpoints`` are base URLs without a path."""

    def __init__(self, endpoints, ca, token):
        self._endpoints = [url.rstrip("/") for url in endpoints]
        self._ca = ca
        self._token = token

    def find(self, kind, name):
        """Return an object by its name or id; None when there is none."""
        try:
            return self.request("GET", f"/{kind}/{quote(name)}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def items(self, kind):
        """Return every object of a kind, of one moment."""
        found, cursor = [], None
        while True:
            page = self.request("GET", f"/{kind}", query={"limit": 500, "cursor": cursor})
            found += page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                return found

    def request(self, method, path, body=None, query=None, if_match=None):
        """Return the answer's JSON. Raises ApiError.

        What failed on its way, or may succeed later, is sent again, to the next replica: under one
        key a write is done once, however often it is sent.
        """
        words = {key: value for key, value in (query or {}).items() if value is not None}
        path = f"/api/v1{path}" + (f"?{urlencode(words)}" if words else "")
        headers = {"Authorization": f"Bearer {self._token}", "Accept": "application/json"}
        if method != "GET":
            headers["Idempotency-Key"] = str(uuid.uuid4())
        if if_match is not None:
            headers["If-Match"] = if_match
        data = None
        if body is not None:
            patch = method == "PATCH"
            headers["Content-Type"] = f"application/{'merge-patch+' if patch else ''}json"
            data = json.dumps(body)
        until = time.monotonic() + RETRY_FOR_S
        while True:
            for endpoint in list(self._endpoints):
                try:
                    return self._send(endpoint, method, path, data, headers)
                except ApiError as error:
                    if error.status and not error.problem.get("retryable"):
                        raise
                    last = error
                    # The next request begins with one that may answer.
                    self._endpoints.append(self._endpoints.pop(0))
            if time.monotonic() > until:
                raise last
            time.sleep(RETRY_PERIOD_S)

    def wait(self, operation, timeout_s):
        """Return an operation once it has ended. Raises ApiError when it fails or takes longer."""
        until = time.monotonic() + timeout_s
        while operation["state"] in ("pending", "running", "cancelling"):
            left = until - time.monotonic()
            if left <= 0:
                raise ApiError(f"{operation['id']} goes on, and has not ended in {timeout_s} s")
            query = {"wait": int(min(max(left, 1), WAIT_S))}
            operation = self.request("GET", f"/operations/{operation['id']}", query=query)
        if operation["state"] != "succeeded":
            problem = operation.get("error") or {}
            reason = problem.get("detail") or problem.get("title") or operation["state"]
            raise ApiError(f"{operation['kind']} did not succeed: {reason}", problem=problem)
        return operation

    def _send(self, endpoint, method, path, data, headers):
        try:
            answer = open_url(
                endpoint + path,
                method=method,
                data=data,
                headers=headers,
                ca_path=self._ca,
                timeout=REQUEST_TIMEOUT_S,
                http_agent="novacron-ansible",
            )
            text = answer.read()
        except HTTPError as error:
            raise _refusal(error) from error
        except (URLError, OSError) as error:
            raise ApiError(f"{endpoint} does not answer: {error}") from error
        return json.loads(text) if text else None


def connect(module):
    """Return the API that a module's options name; fails the module where one is missing."""
    missing = [name for name in ARGUMENTS if not module.params[name]]
    if missing:
        module.fail_json(
            msg="; ".join(f"{name} is missing (or NOVACRON_{name.upper()})" for name in missing)
        )
    return Api(module.params["endpoint"], module.params["ca"], module.params["token"])


def _refusal(error):
    try:
        problem = json.loads(error.read())
    except ValueError:
        problem = {}
    told = [problem.get("detail") or problem.get("title") or f"HTTP {error.code}"]
    told += [f"{fault['pointer']}: {fault['message']}" for fault in problem.get("errors", [])]
    return ApiError("; ".join(told), error.code, problem)
