"""Where the API is and how to log in: contexts in a file, overridden by the environment.

The file (``~/.config/novacron/config.toml``, mode 0600) is written whole and replaced at once. The
environment is read here and nowhere else: ``NOVACRON_CONTEXT``, ``NOVACRON_ENDPOINT`` (URLs,
separated by commas), ``NOVACRON_TOKEN``, ``NOVACRON_CA`` (a file), ``NOVACRON_OUTPUT``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from controlplane.cli.errors import CliError, NotLoggedIn
from shared import durable_files

DEFAULT_CONTEXT = "default"
DEFAULT_PORT = 8443
# A token is about a hundred characters; anything much longer is the wrong file.
TOKEN_LENGTH_MAX = 1000


class Endpoint(Struct, frozen=True):
    """One replica's address, out of ``https://name[:port]``."""

    host: str
    port: int

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}"


class Context(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One cluster to talk to; ``ca`` is PEM, and empty means the system's certificates."""

    endpoints: tuple[str, ...] = ()
    ca: str = ""
    token: str = ""


class ConfigFile(Struct, frozen=True, forbid_unknown_fields=True):
    current: str = DEFAULT_CONTEXT
    contexts: dict[str, Context] = {}


def config_path(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CONFIG_HOME")
    root = Path(base) if base else Path(environ.get("HOME", "/")) / ".config"
    return root / "novacron" / "config.toml"


def load_config(path: Path) -> ConfigFile:
    """Read the file; one that is not there is empty. Raises CliError when it is not readable."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=ConfigFile)
    except FileNotFoundError:
        return ConfigFile()
    except (OSError, msgspec.DecodeError) as error:
        raise CliError(f"cannot read {path}: {error}", "repair it, or remove it and log in") from (
            error
        )


# It holds tokens.
FILE_MODE = 0o600


def save_config(path: Path, config: ConfigFile) -> None:
    """Replace the file; a reader sees the old one or the new one, and other users see neither."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    data = msgspec.toml.encode(config)
    durable_files.replace(path, data, FILE_MODE)


def effective_context(environ: Mapping[str, str], chosen: str | None = None) -> Context:
    """Return the context to use: the chosen or current one, with what the environment overrides.

    Raises NotLoggedIn when no endpoint or token comes of it, CliError for a file that is not there.
    """
    config = load_config(config_path(environ))
    name = chosen or environ.get("NOVACRON_CONTEXT") or ""
    if name and name not in config.contexts:
        known = ", ".join(sorted(config.contexts)) or "none"
        raise NotLoggedIn(f"there is no context {name!r} (known: {known})", _LOGIN)
    context = config.contexts.get(name or config.current, Context())
    endpoints = environ.get("NOVACRON_ENDPOINT")
    ca_file = environ.get("NOVACRON_CA")
    token = environ.get("NOVACRON_TOKEN")
    context = Context(
        endpoints=tuple(endpoints.split(",")) if endpoints else context.endpoints,
        ca=read_ca(Path(ca_file)) if ca_file else context.ca,
        token=check_token(token, "NOVACRON_TOKEN") if token else context.token,
    )
    if not context.endpoints or not context.token:
        missing = "token" if context.endpoints else "endpoint"
        raise NotLoggedIn(f"not logged in: no {missing} is set", _LOGIN)
    return context


def read_ca(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"cannot read the CA certificate {path}: {error}") from error


def check_token(text: str, source: str) -> str:
    """Return the token in ``text``; raises CliError, which never repeats it.

    Anything but one printable word could end the HTTP header that it is sent in.
    """
    token = text.strip()
    if not 0 < len(token) <= TOKEN_LENGTH_MAX or not token.isascii() or not token.isprintable():
        raise CliError(f"{source} holds no token", "give what `novacron init` made: one line")
    if " " in token:
        raise CliError(f"{source} holds more than a token", "a token has no spaces")
    return token


def parse_endpoint(url: str) -> Endpoint:
    """Take ``https://name[:port]`` apart; raises CliError for anything else."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port or DEFAULT_PORT
    except ValueError as error:
        raise CliError(f"{url!r} is no URL: {error}") from error
    if parts.scheme != "https" or not parts.hostname:
        raise CliError(
            f"{url!r} is no endpoint", "give https://name:8443; a token never travels unencrypted"
        )
    if parts.path.strip("/") or parts.query or parts.fragment or parts.username:
        raise CliError(
            f"{url!r} holds more than an address", f"give https://{parts.hostname}:{port}"
        )
    return Endpoint(parts.hostname, port)


_LOGIN = "novacron login --endpoint URL --ca FILE --token-file FILE"
