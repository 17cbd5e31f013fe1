"""The `firstorder` command; also `python -m firstorder.evaluation`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say in one line what it needs."""
    try:
        from firstorder.evaluation.cli import app

        app()
    except ModuleNotFoundError as error:
        from firstorder.attacks.distribution import extra_of, pip_install

        said = str(error)
        needed = f"{error.name}, which this command needs; {pip_install(extra_of(error.name or ''))}"
        sys.exit(f"missing: {said if 'pip install' in said else needed}")


if __name__ == "__main__":
    main()
