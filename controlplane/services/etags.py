"""ETags: which answer is the same as one seen before, and which record a change was meant for.

An ETag is an object's revision, then, behind a hyphen, a mark of what the answer holds besides the
record (a node's sums, an operation's progress). Answers are compared by all of it, records by the
revision alone: what a node's VMs take does not stand in the way of a change of the node.
"""

from __future__ import annotations

import hashlib
import re

from msgspec import Struct

from controlplane.commands.terms import Expected
from controlplane.services.context import Context, Principal
from controlplane.services.revisions import epoch_of, object_revision
from controlplane.services.scope import find_node, find_vm
from controlplane.services.views import NodeView, OperationView, VmView
from controlplane.state import ClusterState
from shared.codec import to_json
from shared.errors import FieldError, ValidationFailed

IF_MATCH = "If-Match"
# Nobody has seen more versions of one object than these at a time.
TAGS_MAX = 32
ANY = "*"
_TAG = r'(?:W/)?"[\x21\x23-\x7e]*"'
_TAGS = re.compile(rf"\s*{_TAG}\s*(?:,\s*{_TAG}\s*)*\Z")
_REVISION = re.compile(r'"([0-9]{1,18})\.([0-9]{1,18})(?:-[^"]*)?"')
_MARK_BYTES = 6


def etag_of(state: ClusterState, view: object) -> str | None:
    """Return the ETag of an answer, quotes included; None for what is no object of its own."""
    if isinstance(view, VmView):
        return f'"{view.revision}"'
    if isinstance(view, NodeView):
        return f'"{view.revision}-{_mark(view.allocated)}"'
    if isinstance(view, OperationView):
        stored = state.operations.get(view.id)
        revision = 0 if stored is None else stored.revision
        return f'"{object_revision(epoch_of(state), revision) or "ended"}-{_mark(view)}"'
    return None


def is_known(etag: str, if_none_match: str) -> bool:
    """Tell whether a client has an answer already. What it sends is compared, never trusted."""
    if if_none_match.strip() == ANY:
        return True
    return etag in re.findall(r'"[^"]*"', if_none_match)


def expectation(
    context: Context, principal: Principal, path: dict[str, str], if_match: str
) -> Expected:
    """Return which revisions of the path's object a client has seen and means to change.

    A path without one has nothing that could match. Raises NotFound, ValidationFailed.
    """
    target = _object_id(context, principal, path)
    if if_match.strip() == ANY:
        return Expected(object=target, whatever=True)
    if _TAGS.match(if_match) is None or if_match.count('"') > 2 * TAGS_MAX:
        message = f"must be * or at most {TAGS_MAX} ETags, each in quotes"
        raise ValidationFailed((FieldError(f"/{IF_MATCH}", "bad_format", message),))
    epoch = epoch_of(context.state)
    # A weak tag stands for no version in particular.
    strong = (tag for tag in re.findall(_TAG, if_match) if not tag.startswith("W/"))
    seen = [match for match in map(_REVISION.fullmatch, strong) if match is not None]
    revisions = tuple(int(match[2]) for match in seen if int(match[1]) == epoch)
    return Expected(object=target, revisions=revisions)


def _object_id(context: Context, principal: Principal, path: dict[str, str]) -> str:
    if "vm" in path:
        return find_vm(context, principal, path["vm"]).record.id
    if "node" in path:
        return find_node(context, path["node"]).record.id
    return path.get("operation", "")


def _mark(part: Struct) -> str:
    return hashlib.blake2b(to_json(part), digest_size=_MARK_BYTES).hexdigest()
