"""`novacron node join-token` and what belongs to it: who is let in as a node, and who no more."""

from __future__ import annotations

from collections.abc import Sequence

import click

from controlplane.cli import output as out
from controlplane.cli.client import path_of
from controlplane.cli.invocation import (
    Duration,
    Invocation,
    confirm,
    for_each,
    output_option,
    pass_invocation,
)
from controlplane.cli.listing import show_list
from controlplane.cli.output import Format, Table
from controlplane.cli.views import AdmissionView, JoinTokenView


@click.command("join-token")
@click.option(
    "--node",
    "nodes",
    metavar="NAME",
    multiple=True,
    help="Who may join with it, by name or pattern (rack1-*); any node if left out.",
)
@click.option(
    "--needs-approval", is_flag=True, help="Have the node wait for `novacron node approve`."
)
@click.option("--ttl", type=Duration(), help="How long it is good; 15 minutes if left out.")
@output_option
@pass_invocation
def join_token(
    invocation: Invocation,
    nodes: tuple[str, ...],
    needs_approval: bool,
    ttl: float | None,
    form: str | None,
) -> None:
    """Make a token that lets one node join, and print it.

    It is told this one time. On the node: novacron-agent join --token-file FILE
    """
    body: dict[str, object] = {"nodes": list(nodes), "needs_approval": needs_approval}
    if ttl is not None:
        body["lifetime_s"] = ttl
    output = invocation.output(form)
    answer = invocation.client.post(path_of("join-tokens"), body)
    if output.form is Format.JSON:
        output.json(answer.body)
        return
    made = answer.decode(JoinTokenView)
    output.line(made.token)
    invocation.terminal.tell(
        f"{made.id} lets {_whom(made)} join until {out.stamp(made.expires_at)}, once"
    )


@click.command("join-tokens")
@output_option
@pass_invocation
def join_tokens(invocation: Invocation, form: str | None) -> None:
    """List join tokens, those of the last day included."""
    output = invocation.output(form)
    show_list(invocation, output, "join-tokens", (), JoinTokenView, _token_table)


@click.command("withdraw-token")
@click.argument("tokens", metavar="TOKEN-ID...", nargs=-1, required=True)
@pass_invocation
def withdraw_token(invocation: Invocation, tokens: tuple[str, ...]) -> None:
    """Have nobody join with a token any more."""

    def withdraw(token: str) -> None:
        invocation.client.delete(path_of("join-tokens", token))
        invocation.terminal.print(f"{token} is withdrawn")

    for_each(tokens, withdraw)


@click.command("admissions")
@output_option
@pass_invocation
def admissions(invocation: Invocation, form: str | None) -> None:
    """List which nodes were let in, wait for it, or are revoked."""
    output = invocation.output(form)
    show_list(
        invocation,
        output,
        "admissions",
        (),
        AdmissionView,
        lambda found: _admission_table(invocation, found),
    )


@click.command("approve")
@click.argument("nodes", metavar="NODE...", nargs=-1, required=True)
@pass_invocation
def approve(invocation: Invocation, nodes: tuple[str, ...]) -> None:
    """Let nodes in that wait for it."""

    def let_in(name: str) -> None:
        invocation.client.post(path_of("admissions", name, "actions", "approve"))
        invocation.terminal.print(f"{name} is admitted")

    for_each(nodes, let_in)


@click.command("revoke")
@click.argument("name", metavar="NODE")
@click.option("--reason", default="", help="Why, for whoever wonders later.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_invocation
def revoke(invocation: Invocation, name: str, reason: str, yes: bool) -> None:
    """Have no certificate speak for a node any more.

    Its VMs run on, and nobody hears of them. The node comes back with a new join token.
    """
    confirm(invocation, f"Refuse all that comes from node {name}?", yes=yes)
    invocation.client.post(path_of("admissions", name, "actions", "revoke"), {"reason": reason})
    invocation.terminal.print(f"{name} is revoked")


COMMANDS = (join_token, join_tokens, withdraw_token, admissions, approve, revoke)


def _whom(token: JoinTokenView) -> str:
    return ", ".join(token.nodes) or "any node"


def _token_table(tokens: Sequence[JoinTokenView]) -> Table:
    return Table(
        ("ID", "FOR", "APPROVAL", "UNTIL", "USED BY", "MADE BY"),
        tuple(
            (
                each.id,
                _whom(each),
                "needed" if each.needs_approval else "no",
                out.stamp(each.expires_at),
                each.used_by or out.NOTHING,
                each.created_by,
            )
            for each in tokens
        ),
    )


def _admission_table(invocation: Invocation, found: Sequence[AdmissionView]) -> Table:
    now = invocation.terminal.now()
    return Table(
        ("NAME", "STATE", "ADDRESS", "CERTIFICATE UNTIL", "AGE", "REASON"),
        tuple(
            (
                each.name,
                _state(each),
                each.address,
                out.NOTHING if each.expires_at is None else out.stamp(each.expires_at),
                out.age(each.created_at, now),
                each.reason or out.NOTHING,
            )
            for each in found
        ),
    )


def _state(each: AdmissionView) -> str:
    if each.revoked_at is not None:
        return "revoked"
    return "admitted" if each.approved else "waits for approval"
