"""Where the command `uq` begins: Ctrl-C while it is loaded says what it says later."""

import sys


def main() -> int:
    try:
        from uq.cli import main as run

        return run()
    except KeyboardInterrupt:  # before `run` could wait for it
        print("uq: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
