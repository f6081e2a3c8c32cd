"""Prune a language model: `python train.py --help` lists the main flags, `--help_all` every flag."""

import sys

if __name__ == "__main__":
    try:
        from gprune.cli import main
        from gprune.console import leave
    except KeyboardInterrupt:  # importing takes seconds
        sys.stderr.write("train.py: Interrupted before anything began.\n")
        raise SystemExit(130) from None
    leave(main())
