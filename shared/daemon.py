"""The command line that agent and control plane have in common.

novacron-agent [--config FILE]      run, until asked to stop
novacron-agent config check [FILE]  say what is wrong with a configuration, and run nothing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shared.errors import NovacronError
from shared.version import VERSION

C = TypeVar("C")


def run_daemon(
    program: str,
    about: str | None,
    default_config: Path,
    load: Callable[[Path], C],
    run: Callable[[C], None],
) -> None:
    """Do what the command line asks for; ends the process with status 1 for a NovacronError."""
    arguments = _parser(program, about, default_config).parse_args()
    try:
        if arguments.command is None:
            run(load(arguments.config))
        else:
            load(arguments.file)
            sys.stdout.write(f"{arguments.file}: valid\n")
    except NovacronError as error:
        sys.exit(f"{program}: {error}")


def _parser(program: str, about: str | None, default_config: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("--version", action="version", version=f"{program} {VERSION}")
    parser.add_argument(
        "--config", type=Path, default=default_config, help="the configuration (%(default)s)"
    )
    commands = parser.add_subparsers(dest="command", metavar="config check [FILE]")
    config = commands.add_parser("config", help="say what is wrong with a configuration")
    verbs = config.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("check", help="read it as a start would, and run nothing")
    check.add_argument("file", type=Path, nargs="?", default=default_config)
    return parser
