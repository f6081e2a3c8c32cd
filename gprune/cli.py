"""The command line: flags and YAML into a RunConfig; errors for people; the table at the end."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path

import yaml

from gprune.errors import UserError


def main(args: Sequence[str] | None = None) -> int:
    """Run `train.py`; returns the exit code: 0, 2 for something the caller can put right, 130 for Ctrl-C.

    Whatever goes wrong for a reason outside the code is one line on stderr.
    """
    try:
        _run(args)
    except UserError as error:
        return _fail(str(error))
    except ArgumentError as error:
        return _fail(f"{_in_our_words(str(error))}; see --help.")
    except KeyboardInterrupt:
        return _fail("Interrupted. What was finished is kept; the same command takes up from there.", 130)
    except SystemExit as error:
        if type(error).__name__ != "SIGTERMException":  # Lightning's, by name: importing it takes seconds
            raise
        return _fail("Terminated. What was finished is kept; the same command takes up from there.", 143)
    except MemoryError:
        return _fail("Out of memory; lower --corpora.batch_size or --corpora.seq_len.", alone=True)
    except OSError as error:  # a disk that fills up somewhere inside a library
        where = f" {error.filename}" if error.filename else ""
        reason = error.strerror or error
        return _fail(f"The system refused to work on{where}: {reason}. What was finished is kept.", alone=True)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
            return _fail("Out of memory; lower --corpora.batch_size or --corpora.seq_len.", alone=True)
        if _process() == 0 or ("by peer" not in str(error) and type(error).__name__ != "DistBackendError"):
            raise
        return 2  # the first process has left, and has said why
    return 0


def parse(args: Sequence[str] | None = None):
    """Flags, and YAML files that merge left to right, to a RunConfig."""
    from jsonargparse import auto_cli, set_parsing_settings

    from gprune.config import RunConfig

    args = sys.argv[1:] if args is None else list(args)
    for flag, value in zip(args, [*args[1:], ""], strict=False):
        if flag == "--config" or flag.startswith("--config="):
            _check_yaml(Path(value if flag == "--config" else flag.removeprefix("--config=")))
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        return auto_cli(
            RunConfig, args=args, as_positional=False, return_instance=True, exit_on_error=False, prog="train.py",
            config_help="A YAML file of flags; several merge left to right.",
        )  # fmt: skip
    except TypeError as error:  # jsonargparse does not check that a group, such as sparsity, is a mapping
        if "must be a mapping" not in str(error):
            raise
        raise UserError(
            "A group of settings got a plain value: expected e.g. --sparsity.target 0.5, or in YAML "
            "`sparsity: {target: 0.5}`; see --help."
        ) from error


def _check_yaml(path: Path) -> None:
    """Refuse what is no mapping here, where the file's name is known; jsonargparse checks the keys.

    Aliases are refused, since a few lines of them stand for gigabytes, and depth, which is a RecursionError elsewhere.
    """
    try:
        text, depth = path.read_text(encoding="utf-8"), 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > 20:
                raise UserError(f"--config: expected settings without aliases (*name), at most 20 deep, in {path}.")
        content = yaml.safe_load(text)
    except UserError:
        raise
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()).replace(' in "<unicode string>",', "")
        raise UserError(f"--config: expected a YAML file of flags, got {path}: {reason}") from error
    if not isinstance(content, dict | type(None)):
        raise UserError(f"--config: expected settings such as `sparsity: {{target: 0.5}}` in {path}, got {content!r}.")


def _in_our_words(message: str) -> str:
    """jsonargparse's `Parser key "a.b": Expected a <class 'float'>. Got value: x`, without the Python in it."""
    return re.sub(r"<class '(\w+)'>", r"\1", re.sub(r'Parser key "([\w.]+)":', r"--\1:", message))


def _run(args: Sequence[str] | None) -> None:
    cfg = parse(args)
    quiet()
    from gprune.pipeline import check, prune
    from gprune.report import result_table

    if cfg.dry_run:
        sys.stdout.write(check(cfg).describe(cfg) + "\n")
        return
    result = prune(cfg)
    if _process() == 0:
        s = result.summary
        sys.stdout.write(
            f"\n{result_table(result.records)}\n\n"
            f"Removed {s['sparsity_of_scope']:.2%} of {cfg.sparsity.scope}, {s['sparsity_of_model']:.2%} of the model: "
            f"{s['parameters_before']:,} -> {s['parameters_after']:,} parameters.\n"
            f"Tokens: {s['forward_tokens']:,} forward, {s['forward_backward_tokens']:,} forward and backward.\n"
            f"Everything is in {result.path}"
            + ("" if cfg.export == "none" else f"; the model in {result.path / 'model'}")
            + ".\n"
        )


def quiet() -> None:
    """Our own progress on stdout; of the libraries', warnings that matter. stderr is for the one line of an error."""
    import transformers

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("gprune")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO if _process() == 0 else logging.ERROR)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _process() -> int:
    """Which of several processes on this machine this is; Lightning starts the others and numbers them."""
    return int(os.environ.get("LOCAL_RANK", 0))


def _fail(message: str, code: int = 2, *, alone: bool = False) -> int:
    """Say it, unless it went wrong in all processes alike (not `alone`) and the first one says it."""
    sys.stdout.flush()
    if alone or _process() == 0:
        sys.stderr.write(f"train.py: {' '.join(message.split())}\n")
    return code
