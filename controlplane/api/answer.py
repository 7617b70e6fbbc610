"""An answer and how it is sent, whole or as it is made; and what the layers know of one request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from msgspec import Struct
from starlette.types import Receive, Send

from shared.codec import to_json

JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"
BYTES = b"application/octet-stream"
EXCHANGE = "novacron.exchange"

Headers = tuple[tuple[bytes, bytes], ...]


class Answer(Struct, frozen=True):
    status: int
    content_type: bytes
    body: bytes
    headers: Headers = ()


class Streamed(Struct, frozen=True):
    """An answer that is sent as it is made; ``pieces`` may fail, and then it is cut off."""

    content_type: bytes
    pieces: AsyncGenerator[bytes]


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


async def send_streamed(
    send: Send, receive: Receive, streamed: Streamed, *, with_body: bool, piece_limit_s: float
) -> None:
    """Send an answer piece by piece, until its client goes away.

    What goes wrong before the first piece is raised before the answer has begun; later, whoever
    reads sees the answer end before its end. Raises TimeoutError when nothing is taken for so long.
    """
    gone: asyncio.Future[Any] = asyncio.ensure_future(until_gone(receive))
    try:
        async with aclosing(streamed.pieces) as pieces:
            piece = await anext(pieces, b"")
            headers = [(b"content-type", streamed.content_type)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while piece and with_body and not gone.done():
                async with asyncio.timeout(piece_limit_s):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                piece = await anext(pieces, b"")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        gone.cancel()


async def until_gone(receive: Receive) -> None:
    """Return once the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
