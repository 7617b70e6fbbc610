"""The command line that agent and control plane have in common.

novacron-agent [--config FILE]      run, until asked to stop
novacron-agent config check [FILE]  say what is wrong with a configuration, and run nothing

A daemon may have verbs of its own, which take the configuration as its run does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from msgspec import Struct

from shared.errors import NovacronError
from shared.version import VERSION

C = TypeVar("C")


class Verb(Struct, Generic[C], frozen=True, kw_only=True):
    """What a daemon's command does instead of running."""

    name: str
    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[C, argparse.Namespace], None]


def run_daemon(
    program: str,
    about: str | None,
    default_config: Path,
    load: Callable[[Path], C],
    run: Callable[[C, Callable[[], C]], None],
    verbs: tuple[Verb[C], ...] = (),
) -> None:
    """Do what the command line asks for; ends the process with status 1 for a NovacronError.

    ``run`` is given the configuration, and what reads it again.
    """
    arguments = _parser(program, about, default_config, verbs).parse_args()
    verb = next((each for each in verbs if each.name == arguments.command), None)
    try:
        if arguments.command is None:
            run(load(arguments.config), lambda: load(arguments.config))
        elif verb is not None:
            verb.run(load(arguments.config), arguments)
        else:
            load(arguments.file)
            sys.stdout.write(f"{arguments.file}: valid\n")
    except NovacronError as error:
        sys.exit(f"{program}: {error}")


def _parser(
    program: str, about: str | None, default_config: Path, verbs: tuple[Verb[C], ...]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("--version", action="version", version=f"{program} {VERSION}")
    parser.add_argument(
        "--config", type=Path, default=default_config, help="the configuration (%(default)s)"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    config = commands.add_parser("config", help="say what is wrong with a configuration")
    actions = config.add_subparsers(dest="action", required=True)
    check = actions.add_parser("check", help="read it as a start would, and run nothing")
    check.add_argument("file", type=Path, nargs="?", default=default_config)
    for verb in verbs:
        verb.add_arguments(commands.add_parser(verb.name, help=verb.about))
    return parser
