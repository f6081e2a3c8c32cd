"""Prune a language model: `python train.py --help` lists every flag."""

from gprune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
