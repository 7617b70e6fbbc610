"""A finished answer and how it is sent; and what the layers know of one request."""

from __future__ import annotations

from msgspec import Struct
from starlette.types import Send

from shared.codec import to_json

JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"
EXCHANGE = "novacron.exchange"

Headers = tuple[tuple[bytes, bytes], ...]


class Answer(Struct, frozen=True):
    status: int
    content_type: bytes
    body: bytes
    headers: Headers = ()


class Exchange(Struct):
    """One request as it goes through the layers; ``route`` is the template of the path.

    ``status`` is 0 until an answer has begun.
    """

    request_id: str
    route: str = "unmatched"
    principal: str = ""
    status: int = 0
    sent_bytes: int = 0


def json_answer(status: int, view: object, headers: Headers = ()) -> Answer:
    return Answer(status, JSON, to_json(view), headers)


async def send_answer(send: Send, answer: Answer, *, with_body: bool = True) -> None:
    """Send an answer; without its body the header still tells its length (HEAD).

    One without a type has no body to tell of (304).
    """
    headers = list(answer.headers)
    if answer.content_type:
        headers.append((b"content-type", answer.content_type))
        headers.append((b"content-length", b"%d" % len(answer.body)))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body if with_body else b""})
