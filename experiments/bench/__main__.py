"""How fast is the pruned model, and gprune? Ratios measured side by side in one run, as Markdown tables.

    OMP_NUM_THREADS=1 python -m experiments.bench inference                # random masks, some minutes on one core
    python -m experiments.bench inference --run runs/NAME                  # dense against what a run has pruned
    python -m experiments.bench inference --device cuda --dtype bfloat16 --model HUB/ID
    python -m experiments.bench inference --small                          # tiny shapes: only tries it
    python -m experiments.bench learning --seq_len 256 --batch_sizes 1 4   # a learning step beside a bare one
    python -m experiments.bench run --repeats 1 -- --logging.mode disabled # train.py in 32-true, auto, bfloat16

inference: prefill, decoding, memory and file size of the dense and the pruned model, beside the bound that FLOPs give.
learning: steps of distillation (windows: the first of --batch_sizes) and of thresholds (the last one) beside bare steps
under bfloat16 autocast, and evaluation beside calibration. run: seconds, results and plans of whole runs in three
precisions; flags behind -- are those of train.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from gprune.console import Parser, guarded, quiet
from gprune.errors import UserError

from .inference import inference
from .learning import learning, whole_runs
from .models import DTYPES, Settings

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parser() -> Parser:
    """The command line."""
    default = Settings()
    flags = Parser("python -m experiments.bench", description=__doc__)
    flags.add_argument("what", choices=("inference", "learning", "run"))
    flags.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of all threads, where others compute too")
    flags.add_argument("--small", action="store_true", help="tiny shapes, on which figures mean nothing")
    flags.add_argument("--model", default=default.model, help="embedded name, folder or hub id, or `tiny`")
    flags.add_argument("--run", help="a finished run, or a pruned model folder (dense: --model)")
    flags.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    flags.add_argument("--dtype", choices=DTYPES, default="float32")
    flags.add_argument("--threads", type=int, help="of the processor; else what OMP_NUM_THREADS says")
    flags.add_argument("--repeats", type=int, default=default.repeats, help="rounds; medians are reported")
    flags.add_argument("--seed", type=int, default=default.seed)
    flags.add_argument("--sparsity", type=float, default=default.sparsity, help="of the FFN, for masks drawn at random")
    flags.add_argument("--widths", choices=("random", "uniform"), default=default.widths)
    flags.add_argument("--width_multiple", type=int, default=default.width_multiple)
    flags.add_argument("--batch_sizes", type=int, nargs="+", default=default.batch_sizes)
    flags.add_argument("--seq_len", type=int, default=default.seq_len, help="tokens of prefill and prompt")
    flags.add_argument("--new_tokens", type=int, default=default.new_tokens)
    return flags


def settings_of(args: argparse.Namespace) -> Settings:
    """Checked settings.

    Raises:
        UserError: for a number that cannot be, or a device that is not there.
    """
    counts = {name: getattr(args, name) for name in ("repeats", "threads", "seq_len", "new_tokens")}
    for name, value in (counts | {"batch_sizes": min(args.batch_sizes)}).items():
        if value is not None and value < 1:
            raise UserError(f"--{name}: expected at least 1, got {value}.")
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: '{args.device}' is not there; expected cpu or cuda.") from error
    known = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    known |= {"device": device, "dtype": DTYPES[args.dtype], "batch_sizes": tuple(args.batch_sizes)}
    settings = Settings(**known)
    return settings.shrunk() if args.small else settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Print Markdown; returns the exit code, as `guarded`."""

    def work() -> str:
        given = list(sys.argv[1:] if arguments is None else arguments)
        own, train = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
        args = parser().parse_args(own)
        if train and args.what != "run":
            raise UserError(f"--: expected flags of train.py for `run` alone, got {' '.join(train)}.")
        settings = settings_of(args)
        quiet()
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.what == "run":
            return "\n".join(map(str, whole_runs(train, settings.repeats)))
        if args.what == "learning":
            return "\n".join(map(str, learning(settings, CLOCKS[args.clock])))
        return "\n".join(map(str, inference(settings)))

    return guarded("experiments.bench", work)


if __name__ == "__main__":
    sys.exit(main())
