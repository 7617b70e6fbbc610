"""`novacron vm explain`, and plans as text: which node, why, and why not the others."""

from __future__ import annotations

import click

from controlplane.cli.client import path_of
from controlplane.cli.invocation import Invocation, output_option, pass_invocation
from controlplane.cli.output import NOTHING, Format, Output, Table
from controlplane.cli.views import CandidateView, PlanView, VmView


@click.command()
@click.argument("name", metavar="VM")
@output_option
@pass_invocation
def explain(invocation: Invocation, name: str, form: str | None) -> None:
    """Say why a VM is where it is, or why no node can run it, as of now."""
    output = invocation.output(form)
    answer = invocation.client.get(path_of("vms", name, "placement"))
    plan = answer.decode(PlanView)
    if output.form is not Format.TABLE:
        show_plan(output, answer.body, plan, name)
        return
    seen = invocation.client.get_as(VmView, path_of("vms", name))
    fitting = sum(each.fits for each in plan.candidates)
    where = f" on {seen.status.where}" if seen.status.where else ""
    output.line(
        f"{seen.name} is {seen.status.phase}{where}: "
        f"{fitting} of {len(plan.candidates)} nodes can run it"
    )
    show_plan(output, answer.body, plan, name)
    if seen.status.node is None and plan.node is not None:
        output.line(f"It would go to {plan.node_name or plan.node} now.")


def show_plan(output: Output, body: bytes, plan: PlanView, name: str) -> None:
    """Print a plan in the format asked for; as a name it is the node's."""
    if output.form is Format.JSON:
        output.json(body)
    elif output.form is Format.NAME:
        output.names([plan.node_name or plan.node] if plan.node else [])
    elif plan.candidates:
        output.table(_plan_table(plan))
    else:
        output.line(f"No node is known that could run {name}.")


def refusal_summary(plan: PlanView) -> str:
    """Return how often each reason refused a node, the most frequent first."""
    counted = sorted(plan.refusals.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {_words(code)}" for code, count in counted) or "no node is known"


def _plan_table(plan: PlanView) -> Table:
    ordered = sorted(plan.candidates, key=lambda c: (not c.fits, -(c.score or 0.0), c.node_name))
    rows = tuple(
        (
            each.node_name or each.node,
            "fits" if each.fits else ", ".join(_words(r.code) for r in each.reasons) or "refused",
            f"{each.score:.3f}" if each.fits and each.score is not None else NOTHING,
            _detail(each, plan),
        )
        for each in ordered
    )
    return Table(("NODE", "RESULT", "SCORE", "DETAIL"), rows, states=("RESULT",))


def _detail(candidate: CandidateView, plan: PlanView) -> str:
    if not candidate.fits:
        return "; ".join(r.message for r in candidate.reasons if r.message) or NOTHING
    scores = ", ".join(f"{_words(n)} {v:.2f}" for n, v in sorted(candidate.scores.items()))
    chosen = ["chosen"] if candidate.node == plan.node else []
    return "; ".join([*chosen, *([scores] if scores else [])]) or NOTHING


def _words(code: str) -> str:
    return code.replace("_", " ")
