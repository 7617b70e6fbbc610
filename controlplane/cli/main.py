"""`novacron`, the command: what sub-commands there are, and how a run ends.

Sub-commands are imported when they are used: start-up stays short, and `--help` needs none of
them. Nothing here may import gRPC, an HTTP framework or cryptography. Every way out of a run
passes `run`, which turns errors into words on stderr and an exit code.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Mapping, Sequence

import click

from controlplane.cli.errors import CliError, Exit
from controlplane.cli.invocation import Invocation
from controlplane.cli.output import printable
from controlplane.cli.terminal import Terminal
from shared.errors import FieldErrors, NovacronError

# name: (module, its click command, one line of help)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "init": ("init", "init", "Make a cell's CA, certificates and first admin token."),
    "login": ("login", "login", "Check an endpoint and a token, and remember them."),
    "vm": ("vm", "vm", "Virtual machines."),
    "node": ("node", "node", "The nodes that run them."),
    "migration": ("migration", "migration", "VMs on the move."),
    "op": ("op", "op", "Operations: what was accepted, and how it goes."),
    "cluster": ("cluster", "cluster", "The control plane itself."),
    "events": ("events", "events", "What happened."),
    "doctor": ("doctor", "doctor", "What is wrong with the cell, and what to do."),
    "top": ("top", "top", "What nodes and VMs use."),
    "explain": ("vm_explain", "explain", "Why a VM is where it is, or nowhere (vm explain)."),
    "api": ("api", "api", "Send one request as it is."),
    "version": ("version", "version", "The version of this command."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and imports a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(f"controlplane.cli.{module}"), attribute)
        assert isinstance(command, click.Command), "the table names click commands"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--context", "context_name", metavar="NAME", help="Which login to use.")
@click.pass_obj
def novacron(invocation: Invocation, context_name: str | None) -> None:
    """Turn a rack of KVM nodes into one machine.

    Exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4 conflict, 5 authentication, 6 waited too
    long (the operation goes on), 7 no node fits, 8 nobody answers or leads, 9 done for some.
    """
    invocation.context_name = context_name


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:], os.environ, Terminal(), random.SystemRandom()))


def run(
    arguments: Sequence[str], environ: Mapping[str, str], terminal: Terminal, rng: random.Random
) -> int:
    """Run one command line and return its exit code; every error has been told by then."""
    invocation = Invocation(environ, terminal, rng)
    try:
        novacron.main(list(arguments), prog_name="novacron", standalone_mode=False, obj=invocation)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        error.show(file=terminal.err)
        return Exit.USAGE
    except CliError as error:
        _tell(terminal, error.lines())
        return error.exit_with()
    except NovacronError as error:
        _tell(terminal, _lines(error))
        return Exit.ERROR
    except (KeyboardInterrupt, click.Abort):
        terminal.tell("interrupted")
        return Exit.INTERRUPTED
    except BrokenPipeError:
        terminal.abandon_stdout()
        return Exit.ERROR
    except OSError as error:
        terminal.tell(f"error: {error}")
        return Exit.ERROR
    finally:
        invocation.close()
    return Exit.OK


def _tell(terminal: Terminal, lines: Sequence[str]) -> None:
    for line in lines:
        for part in line.splitlines():
            terminal.tell(printable(part))


def _lines(error: NovacronError) -> list[str]:
    if isinstance(error, FieldErrors):
        return ["error:", *(f"  {e.pointer}: {e.message} ({e.code})" for e in error.errors)]
    return [f"error: {error}"]


if __name__ == "__main__":
    main()
