"""`python -m tests.lab`: `./dev lab` and `./dev demo`, with Ctrl-C taken care of from the start."""

from __future__ import annotations

import sys

from tests.lab import signals


def main() -> int:
    signals.raise_when_asked_to_end()
    try:
        # Imported here: it takes long enough for a Ctrl-C to fall into it.
        from tests.lab import cli

        return cli.main()
    except signals.Interrupted as interrupted:
        print("interrupted; nothing is left", file=sys.stderr)
        return interrupted.exit_code


if __name__ == "__main__":
    sys.exit(main())
