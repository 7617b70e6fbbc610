"""Who is let in as a node: tokens, approval, renewal and revocation, command by command."""

from __future__ import annotations

from datetime import timedelta

import pytest

from controlplane.commands import admission
from controlplane.commands.admission import (
    APPROVED,
    WAITING,
    ApproveNode,
    Enrol,
    MakeJoinToken,
    RenewCertificate,
    RevokeNode,
    WithdrawJoinToken,
    refusal_of,
)
from controlplane.commands.nodes import RemoveNode
from shared.admission import Admission
from shared.errors import Conflict, Forbidden, NotFound, StateConflict, Unauthenticated
from tests.unit.core_world import BORN, USER, CoreWorld

UNTIL = BORN + timedelta(days=7)
MINUTES_15 = 15 * 60.0


@pytest.fixture
def world() -> CoreWorld:
    return CoreWorld()


def made(world: CoreWorld, *nodes: str, needs_approval: bool = False, number: int = 1) -> str:
    return world.apply(
        MakeJoinToken(
            id=f"join-{number}",
            sha256="00",
            nodes=nodes,
            needs_approval=needs_approval,
            lifetime_s=MINUTES_15,
            by=USER,
        )
    )


def enrol(
    world: CoreWorld,
    token: str = "join-1",
    name: str = "n7",
    key: str = "k1",
    serial: str = "a1",
    address: str = "10.0.0.7",
) -> str:
    return world.apply(
        Enrol(
            token_id=token,
            name=name,
            address=address,
            key_sha256=key,
            serial=serial,
            expires_at=UNTIL,
        )
    )


def renew(world: CoreWorld, shown: str, serial: str, name: str = "n7") -> str:
    return world.apply(
        RenewCertificate(
            name=name, address="10.0.0.7", shown=shown, serial=serial, expires_at=UNTIL
        )
    )


def admitted(world: CoreWorld, name: str = "n7") -> Admission:
    return world.state.admissions[name].record


def test_a_token_lets_one_node_in(world: CoreWorld) -> None:
    made(world)
    assert enrol(world) == APPROVED
    assert admitted(world).serials == ("a1",)
    with pytest.raises(Unauthenticated, match="was used for node 'n7'"):
        enrol(world, name="n8", address="10.0.0.8")
    with pytest.raises(Unauthenticated, match="was used for node 'n7'"):
        enrol(world, key="another machine's")
    assert admitted(world).serials == ("a1",)
    assert "n8" not in world.state.admissions


def test_a_node_whose_answer_was_lost_asks_again_with_the_same_key(world: CoreWorld) -> None:
    made(world)
    enrol(world)
    assert enrol(world, serial="a2") == APPROVED
    assert admitted(world).serials == ("a2",)
    world.clock.at += timedelta(seconds=MINUTES_15)
    with pytest.raises(Unauthenticated, match="ended at"):
        enrol(world, serial="a3")


def test_a_token_that_is_over_lets_nobody_in(world: CoreWorld) -> None:
    made(world)
    world.clock.at += timedelta(seconds=MINUTES_15)
    with pytest.raises(Unauthenticated, match="ended at"):
        enrol(world)


def test_a_token_that_was_withdrawn_lets_nobody_in(world: CoreWorld) -> None:
    made(world)
    world.apply(WithdrawJoinToken(id="join-1", by=USER))
    with pytest.raises(Unauthenticated):
        enrol(world)
    with pytest.raises(NotFound):
        world.apply(WithdrawJoinToken(id="join-1", by=USER))


def test_a_token_is_for_the_names_that_it_says(world: CoreWorld) -> None:
    made(world, "n7", "rack1-*")
    with pytest.raises(Forbidden, match="is for n7, rack1-"):
        enrol(world, name="rack2-1")
    assert enrol(world, name="rack1-1") == APPROVED


def test_a_node_waits_for_its_approval_longer_than_its_token_is_good(world: CoreWorld) -> None:
    made(world, needs_approval=True)
    assert enrol(world) == WAITING
    assert admitted(world).serials == ()
    world.clock.at += timedelta(hours=20)
    assert enrol(world, serial="a2") == WAITING
    assert world.apply(ApproveNode(name="n7", by=USER)) == "n7"
    assert enrol(world, serial="a3") == APPROVED
    assert admitted(world).serials == ("a3",)
    with pytest.raises(StateConflict, match="already"):
        world.apply(ApproveNode(name="n7", by=USER))


def test_nobody_is_approved_who_has_not_asked(world: CoreWorld) -> None:
    with pytest.raises(NotFound):
        world.apply(ApproveNode(name="n9", by=USER))


def test_two_nodes_have_no_address_in_common(world: CoreWorld) -> None:
    made(world)
    made(world, number=2)
    enrol(world)
    with pytest.raises(Conflict, match="novacron node revoke n7"):
        enrol(world, token="join-2", name="n8")
    world.apply(RevokeNode(name="n7", reason="scrapped", by=USER))
    assert enrol(world, token="join-2", name="n8") == APPROVED


def test_a_renewal_leaves_the_certificate_that_it_was_asked_for_with(world: CoreWorld) -> None:
    """Its answer may be lost, and then it is asked for again."""
    made(world)
    enrol(world)
    renew(world, "a1", "a2")
    renew(world, "a1", "a3")
    assert admitted(world).serials == ("a1", "a3")
    renew(world, "a3", "a4")
    assert refusal_of(admitted(world), "a3") is None
    assert refusal_of(admitted(world), "a4") is None
    with pytest.raises(Unauthenticated, match="not the newest certificate"):
        renew(world, "a1", "a5")


def test_a_node_with_a_certificate_of_init_gets_its_admission_with_its_renewal(
    world: CoreWorld,
) -> None:
    assert refusal_of(None, "of init") is None
    renew(world, "of init", "b1", name="n1")
    assert admitted(world, "n1").serials == ("of init", "b1")


def test_nothing_speaks_for_a_revoked_node_until_it_joins_anew(world: CoreWorld) -> None:
    made(world)
    enrol(world)
    world.apply(RevokeNode(name="n7", reason="stolen", by=USER))
    for serial in ("a1", "", "another"):
        why = refusal_of(admitted(world), serial)
        assert why is not None
        assert "was revoked at" in why
    with pytest.raises(Unauthenticated, match="was revoked"):
        renew(world, "a1", "a2")
    with pytest.raises(Unauthenticated, match="was used"):
        enrol(world)  # its old token
    with pytest.raises(StateConflict):
        world.apply(RevokeNode(name="n7", reason="", by=USER))
    with pytest.raises(StateConflict, match="new token"):
        world.apply(ApproveNode(name="n7", by=USER))
    made(world, number=2)
    assert enrol(world, token="join-2", serial="c1") == APPROVED
    assert refusal_of(admitted(world), "c1") is None
    assert refusal_of(admitted(world), "a1") is not None


def test_a_node_of_init_is_revoked_too(world: CoreWorld) -> None:
    world.apply(RevokeNode(name="n1", reason="", by=USER))
    assert refusal_of(admitted(world, "n1"), "of init") is not None
    with pytest.raises(NotFound):
        world.apply(RevokeNode(name="n9", reason="", by=USER))


def test_a_node_that_is_there_is_displaced_by_nobody(world: CoreWorld) -> None:
    """Its guests would be taken for lost, and started a second time on the other machine."""
    made(world)
    made(world, number=2, needs_approval=True)
    for token in ("join-1", "join-2"):
        with pytest.raises(Conflict, match="novacron node revoke n1"):
            enrol(world, token=token, name="n1")
    assert "n1" not in world.state.admissions
    enrol(world, name="n7")
    world.join("n7", serial="a1")
    with pytest.raises(Conflict, match="novacron node revoke n7"):
        enrol(world, token="join-2", key="k2", serial="b1", address="10.0.0.70")
    assert refusal_of(admitted(world), "a1") is None
    world.apply(RevokeNode(name="n7", reason="", by=USER))
    assert enrol(world, token="join-2", key="k2", address="10.0.0.70") == WAITING


def test_a_node_that_lost_what_it_was_given_joins_again_with_its_key(world: CoreWorld) -> None:
    """As when a playbook was cut off: it makes another token."""
    made(world)
    made(world, number=2)
    enrol(world)
    world.join("n7", serial="a1")
    assert enrol(world, token="join-2", serial="b1") == APPROVED
    assert admitted(world).serials == ("b1",)


def test_one_that_nobody_has_heard_of_yet_may_be_another_machine(world: CoreWorld) -> None:
    made(world)
    made(world, number=2)
    enrol(world)
    assert enrol(world, token="join-2", key="k2", serial="b1", address="10.0.0.70") == APPROVED
    assert refusal_of(admitted(world), "a1") is not None


def test_a_node_that_asks_again_is_where_it_was(world: CoreWorld) -> None:
    made(world, needs_approval=True)
    enrol(world)
    world.apply(ApproveNode(name="n7", by=USER))
    with pytest.raises(Conflict, match=r"as 10\.0\.0\.7 before"):
        enrol(world, address="10.0.0.1")


def test_a_shut_out_node_does_not_join_while_it_is_greeted(world: CoreWorld) -> None:
    made(world)
    enrol(world)
    world.join("n7", serial="a1")
    node_id = world.state.node_id_by_name("n7")
    assert node_id is not None
    world.apply(RemoveNode(node_id=node_id, by=USER))
    with pytest.raises(Unauthenticated, match="was revoked"):
        world.join("n7", serial="a1")
    assert world.state.node_id_by_name("n7") is None


def test_tokens_are_swept_a_day_after_their_end_and_never_too_many(
    world: CoreWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "TOKENS_MAX", 3)
    made(world)
    enrol(world)
    for number in (2, 3, 4):
        made(world, number=number)
    with pytest.raises(Conflict, match="withdraw some"):
        made(world, number=5)
    world.clock.at += timedelta(days=1, seconds=MINUTES_15)
    monkeypatch.setattr(admission, "SWEPT_AT_ONCE", 3)
    made(world, number=5)
    assert set(world.state.join_tokens) == {"join-4", "join-5"}


def test_each_change_is_told_and_audited(world: CoreWorld) -> None:
    made(world, needs_approval=True)
    enrol(world)
    world.apply(ApproveNode(name="n7", by=USER))
    world.apply(RevokeNode(name="n7", reason="", by=USER))
    kinds = [entry.kind for entry in world.state.history.values() if hasattr(entry, "kind")]
    for kind in ("node.waits_for_approval", "node.admitted", "node.revoked"):
        assert kinds.count(kind) == 1, kind
