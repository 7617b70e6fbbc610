"""controlplane.tokens: the text of an API token."""

from __future__ import annotations

import pytest

from controlplane.tokens import Token, digest, matches, new_token, parse_token
from shared.errors import Unauthenticated


def test_a_token_reads_back_as_it_was_made() -> None:
    token = new_token("key-k3f9q2abc")

    assert parse_token(str(token)) == token
    assert len(token.secret) == 52


def test_secrets_differ() -> None:
    assert new_token("key-1").secret != new_token("key-1").secret


def test_only_the_same_secret_matches() -> None:
    assert matches("abc", digest("abc"))
    assert not matches("abd", digest("abc"))
    assert not matches("abc", "é")


@pytest.mark.parametrize("text", ["", "nck__x", "nck_id_", "abc_id_x", "nck_a_b_c", "n" * 300])
def test_other_text_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        parse_token(text)

    assert text == "" or text not in str(caught.value)


def test_a_token_does_not_show_its_secret() -> None:
    assert "hidden" not in repr(Token("key-1", "hidden"))
