"""What one run of `novacron` is given: environment, terminal, the client; and shared options.

Commands get an ``Invocation`` and nothing from globals. The connection is opened when a command
first needs it, so that `--help` and `init` work without one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from controlplane.cli.client import Client
from controlplane.cli.context import effective_context
from controlplane.cli.errors import CliError, Several
from controlplane.cli.output import Format, Output
from controlplane.cli.terminal import Terminal

DEFAULT_INTERVAL_S = 2.0
_DURATIONS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Function = TypeVar("Function", bound=Callable[..., Any])


class Invocation:
    """One run of the command."""

    def __init__(self, environ: Mapping[str, str], terminal: Terminal, rng: random.Random) -> None:
        self.environ = environ
        self.terminal = terminal
        self.rng = rng
        self.context_name: str | None = None
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        if self._client is None:
            context = effective_context(self.environ, self.context_name)
            self._client = Client(context, self.terminal, self.rng)
        return self._client

    def output(self, form: str | None) -> Output:
        return Output(self.terminal, self._format(form))

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def _format(self, form: str | None) -> Format:
        asked = form or self.environ.get("NOVACRON_OUTPUT") or Format.TABLE
        if asked not in set(Format):
            raise click.UsageError(f"NOVACRON_OUTPUT is {asked!r}; use {', '.join(Format)}")
        return Format(asked)


class Duration(click.ParamType[float]):
    """Seconds, or a number with s, m, h or d."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        text = str(value)
        number, unit = (text[:-1], text[-1]) if text[-1:] in _DURATIONS_S else (text, "s")
        try:
            seconds = float(number) * _DURATIONS_S[unit]
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < float("inf"):
            self.fail(f"{text!r} is no duration; write 90, 90s, 5m, 2h or 1d", param, ctx)
        return seconds


class KeyValue(click.ParamType[tuple[str, str]]):
    """``KEY=VALUE``."""

    name = "key=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, rest = str(value).partition("=")
        if not key or not equals:
            self.fail(f"{value!r} is not of the form key=value", param, ctx)
        return key, rest


pass_invocation = click.make_pass_decorator(Invocation)

output_option = click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice([f.value for f in Format]),
    help="table, json (what the API sent) or name.",
)
label_option = click.option(
    "-l", "--label", "labels", type=KeyValue(), multiple=True, help="Only with this label."
)


def watch_options(function: Function) -> Function:
    """Add ``-w`` and ``--interval``; the command receives ``watch`` and ``interval``."""
    interval = click.option(
        "--interval",
        type=Duration(),
        default=DEFAULT_INTERVAL_S,
        show_default="2s",
        help="How often --watch looks.",
    )
    watch = click.option("-w", "--watch", is_flag=True, help="Show it again until Ctrl-C.")
    return watch(interval(function))


def wait_options(function: Function) -> Function:
    """Add ``--no-wait`` and ``--timeout``; the command receives ``no_wait`` and ``timeout``."""
    timeout = click.option(
        "--timeout", type=Duration(), help="Stop waiting after this long; the operation goes on."
    )
    no_wait = click.option("--no-wait", is_flag=True, help="Print the operation and return.")
    return no_wait(timeout(function))


def confirm(invocation: Invocation, question: str, *, yes: bool) -> None:
    """Ask before something is destroyed; raises UsageError where nobody can answer."""
    if yes:
        return
    if not invocation.terminal.stdin_is_tty:
        raise click.UsageError(f"{question} Nobody can answer here: give --yes.")
    if not click.confirm(question, err=True):
        raise click.Abort


def for_each(names: tuple[str, ...], action: Callable[[str], None]) -> None:
    """Do one thing to several targets, all of them, then raise what failed.

    One target's failure is raised as it is; of several, ``Several`` tells all.
    """
    failures: list[tuple[str, CliError]] = []
    for name in names:
        try:
            action(name)
        except CliError as error:
            if len(names) == 1:
                raise
            failures.append((name, error))
    if failures:
        raise Several(failures, len(names))
