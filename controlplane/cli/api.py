"""`novacron api`: one request as it is typed, for what no other command does."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from controlplane.cli.client import BASE, Answer
from controlplane.cli.errors import CliError
from controlplane.cli.invocation import Invocation, pass_invocation

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


@click.command()
@click.argument("method", type=click.Choice(METHODS, case_sensitive=False))
@click.argument("path")
@click.argument("body", required=False)
@pass_invocation
def api(invocation: Invocation, method: str, path: str, body: str | None) -> None:
    """Send one request and print the answer.

    PATH is taken as it is when it starts with a slash, and below /api/v1 otherwise. BODY is JSON,
    @FILE, or - for stdin.
    """
    target = path if path.startswith("/") else f"{BASE}/{path}"
    if not target.isascii() or not target.isprintable() or " " in target:
        raise click.UsageError(f"{path!r} is no path; write special characters as %XX")
    data = None if body is None else _read_body(body)
    if method.upper() == "GET":
        if data is not None:
            raise click.UsageError("a GET has no body")
        answer = invocation.client.get(target)
    else:
        answer = invocation.client.write(method.upper(), target, data)
    _print(invocation, answer)


def _read_body(text: str) -> bytes:
    try:
        if text == "-":
            return sys.stdin.buffer.read()
        return Path(text[1:]).read_bytes() if text.startswith("@") else text.encode()
    except OSError as error:
        raise CliError(f"cannot read the body: {error}") from error


def _print(invocation: Invocation, answer: Answer) -> None:
    if "json" not in answer.headers.get("content-type", ""):
        invocation.terminal.print_bytes(answer.body)
        return
    try:
        invocation.terminal.print(msgspec.json.format(answer.body, indent=2).decode())
    except msgspec.DecodeError:
        invocation.terminal.print_bytes(answer.body)
