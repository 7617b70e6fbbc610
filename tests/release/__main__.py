"""`python -m tests.release`: what `./dev build` runs."""

import subprocess
import sys

from tests.release.build import build


def main() -> int:
    try:
        build(lambda line: print(line, file=sys.stderr))
    except subprocess.CalledProcessError as error:
        print(f"{error.output.decode()}error: {' '.join(error.cmd)} failed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
