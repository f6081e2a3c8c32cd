"""What we export, and who can read it. `python -m experiments.formats --help`."""
