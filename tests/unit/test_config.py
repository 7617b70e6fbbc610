"""Configuration: every fault at once, sections, and the environment on top."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import Struct

from shared.config import Address, Url, load_config
from shared.errors import ConfigInvalid


class Section(Struct, frozen=True, kw_only=True):
    listen: str
    limit: int = 3
    file: Path = Path("/etc/file")


class Config(Struct, frozen=True, kw_only=True):
    name: str
    api: Section
    peers: tuple[str, ...] = ()
    extra: Section | None = None


def load(path: Path, text: str, **environ: str) -> Config:
    file = path / "c.toml"
    file.write_text(text)
    return load_config(file, Config, environ)


def faults(path: Path, text: str, **environ: str) -> set[tuple[str, str]]:
    with pytest.raises(ConfigInvalid) as caught:
        load(path, text, **environ)
    return {(error.pointer, error.code) for error in caught.value.errors}


GOOD = 'name = "r1"\npeers = ["a", "b"]\n[api]\nlisten = "127.0.0.1:1"\nfile = "/tmp/x"\n'


def test_a_file_becomes_a_struct(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)

    assert config.api == Section(listen="127.0.0.1:1", file=Path("/tmp/x"))
    assert config.peers == ("a", "b")
    assert config.extra is None


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    text = 'peers = [1]\ntypo = 1\n[api]\nlimit = "three"\nfile = 7\nother = 1\n[extra]\n'

    assert faults(tmp_path, text) == {
        ("/typo", "unknown_field"),
        ("/name", "missing"),
        ("/peers", "invalid"),
        ("/api/listen", "missing"),
        ("/api/limit", "invalid"),
        ("/api/file", "invalid"),
        ("/api/other", "unknown_field"),
        ("/extra/listen", "missing"),
    }


def test_a_section_must_be_a_table(tmp_path: Path) -> None:
    assert faults(tmp_path, 'name = "r1"\napi = 3\n') == {("/api", "wrong_type")}


def test_the_environment_goes_on_top(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        GOOD,
        NOVACRON_NAME="r2",
        NOVACRON_API__LIMIT="7",
        NOVACRON_PEERS='["c"]',
        NOVACRON_EXTRA__LISTEN="here",
        OTHER="not ours",
    )

    assert (config.name, config.api.limit, config.peers) == ("r2", 7, ("c",))
    assert config.extra == Section(listen="here")
    assert faults(tmp_path, GOOD, NOVACRON_API__LIMIT="many") == {("/api/limit", "invalid")}


@pytest.mark.parametrize("content", [None, b"= not toml", b"name = '\xff'"])
def test_an_unreadable_file_is_a_fault_of_its_own(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "c.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigInvalid, match=r"c\.toml"):
        load_config(file, Config, {})


class Peers(Struct, frozen=True, kw_only=True):
    listen: Address
    url: Url
    peers: tuple[Address, ...] = ()


def _peers(path: Path, listen: str, url: str, peer: str) -> Peers:
    file = path / "c.toml"
    file.write_text(f'listen = "{listen}"\nurl = "{url}"\npeers = ["{peer}"]\n')
    return load_config(file, Peers, {})


@pytest.mark.parametrize("address", ["10.0.0.1:8444", "[fd00::1]:1", "n1.example.org:65000"])
def test_an_address_is_a_host_and_a_port(tmp_path: Path, address: str) -> None:
    assert _peers(tmp_path, address, "https://n1:8443", address).peers == (address,)


def test_what_is_no_address_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        _peers(tmp_path, "10.0.0.1", "10.0.0.1:8443", "http://127.0.0.1:2379")
    told = {error.pointer: error.message for error in caught.value.errors}
    assert told["/listen"].startswith("must be name:port or address:port")
    assert told["/url"].startswith("must be a URL without a path")
    assert told["/peers"] == told["/listen"]
