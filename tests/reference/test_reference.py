"""The reference pages say what the code says."""

from __future__ import annotations

from tests.reference.configuration import render
from tests.source_tree import ROOT


def test_the_page_of_the_configuration_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == render(), "python -m tests.reference.configuration > docs/configuration.md"
