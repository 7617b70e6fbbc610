"""Join tokens as text."""

from __future__ import annotations

import pytest

from shared.errors import Unauthenticated
from shared.join_token import JoinTokenText, parse_join_token

TOKEN = JoinTokenText("join-abc1230001", "s3cret", "ab" * 32)


def test_a_token_is_read_back() -> None:
    assert parse_join_token(f" {TOKEN}\n") == TOKEN


def test_its_secret_stays_out_of_logs() -> None:
    assert "s3cret" not in repr(TOKEN)


@pytest.mark.parametrize(
    "text",
    ["", "nck_key-1_secret", str(TOKEN)[:-1], f"{TOKEN}0", str(TOKEN).upper(), f"x{TOKEN}"],
)
def test_what_is_none_is_refused_and_never_repeated(text: str) -> None:
    with pytest.raises(Unauthenticated) as refusal:
        parse_join_token(text)
    assert not text or text not in str(refusal.value)
