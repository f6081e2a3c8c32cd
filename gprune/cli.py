"""The command line: flags and YAML into a RunConfig; errors for people; the table at the end."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence

from gprune.errors import UserError


def main(args: Sequence[str] | None = None) -> int:
    """Run `train.py`; returns the exit code: 0, 2 for something the caller can put right, 130 for Ctrl-C.

    Whatever goes wrong for a reason outside the code is one line on stderr.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        _run(args)
    except UserError as error:
        return _fail(str(error))
    except ArgumentError as error:
        return _fail(f"{error}; see --help.")
    except KeyboardInterrupt:
        _fail("Interrupted. What was finished is kept; the same command takes up from there.")
        return 130
    except SIGTERMException:
        _fail("Terminated. What was finished is kept; the same command takes up from there.")
        return 143
    except MemoryError:
        return _fail("Out of memory; lower --corpora.batch_size or --corpora.seq_len.")
    except OSError as error:  # a disk that fills up somewhere inside a library
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"The system refused to work on{where}: {error.strerror or error}. What was finished is kept.")
    return 0


def parse(args: Sequence[str] | None = None):
    """Flags, and YAML files that merge left to right, to a RunConfig."""
    from jsonargparse import auto_cli, set_parsing_settings

    from gprune.config import RunConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return auto_cli(
        RunConfig, args=None if args is None else list(args), as_positional=False, return_instance=True,
        exit_on_error=False, prog="train.py", config_help="A YAML file of flags; several merge left to right.",
    )  # fmt: skip


def _run(args: Sequence[str] | None) -> None:
    cfg = parse(args)
    quiet()
    from gprune.pipeline import check, prune
    from gprune.report import result_table

    if cfg.dry_run:
        sys.stdout.write(check(cfg).describe(cfg) + "\n")
        return
    result = prune(cfg)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        s = result.summary
        sys.stdout.write(
            f"\n{result_table(result.records)}\n\n"
            f"Removed {s['sparsity_of_scope']:.2%} of {cfg.sparsity.scope}, {s['sparsity_of_model']:.2%} of the model: "
            f"{s['parameters_before']:,} -> {s['parameters_after']:,} parameters.\n"
            f"Tokens: {s['forward_tokens']:,} forward, {s['forward_backward_tokens']:,} forward and backward.\n"
            f"Everything is in {result.path}; the model in {result.path / 'model'}.\n"
        )


def quiet() -> None:
    """Our own progress on stdout; of the libraries', warnings that matter. stderr is for the one line of an error."""
    import transformers

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("gprune")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO if int(os.environ.get("LOCAL_RANK", 0)) == 0 else logging.ERROR)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _fail(message: str) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"train.py: {' '.join(message.split())}\n")
    return 2
