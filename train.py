"""Prune a language model: `python train.py --help` lists the main flags, `--help_all` every flag."""

import sys

if __name__ == "__main__":
    try:
        from gprune.cli import main
        from gprune.console import leave
    except KeyboardInterrupt:  # importing takes seconds
        sys.stderr.write("train.py: Interrupted before anything began.\n")
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        install = "run `pip install -r requirements.txt -e .` with Python 3.11 or newer"
        sys.stderr.write(f"train.py: The package {error.name} is not installed; {install}.\n")
        raise SystemExit(2) from None
    leave(main())
