"""Benchmark pruned models and gprune. Ratios are measured alternately in one process and printed as Markdown tables.

    OMP_NUM_THREADS=1 python -m experiments.bench inference                # random masks, some minutes on one core
    python -m experiments.bench inference --run runs/NAME                  # dense model and pruned model of a run
    python -m experiments.bench inference --device cuda --dtype bfloat16 --model HUB/ID
    python -m experiments.bench inference --small                          # tiny shapes, as a smoke test
    python -m experiments.bench learning --seq_len 256 --batch_sizes 1 4   # training steps and plain PyTorch steps
    python -m experiments.bench run --repeats 1 -- --logging.mode disabled # train.py in 32-true, auto, bfloat16

inference: prefill, decoding, memory and file size of the dense and the pruned model, and the bound from their FLOPs.
learning: training steps of distillation (batch size: the first of --batch_sizes) and of thresholds (the last one),
compared with plain PyTorch steps under bfloat16 autocast; throughput of evaluation compared with calibration.
run: seconds, results and plans of whole runs in three precisions, with the flags of train.py after --.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from gprune.console import Parser, quiet, run_guarded
from gprune.errors import UserError
from gprune.runs.trainer import matmul_precision

from .inference import inference
from .learning import learning, whole_runs
from .models import DTYPES, Settings

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parser() -> Parser:
    """Return the parser of the command line."""
    default = Settings()
    flags = Parser("python -m experiments.bench", description=__doc__)
    flags.add_argument("what", choices=("inference", "learning", "run"), help="the benchmark")
    flags.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: CPU time of all threads, for busy machines"
    )
    flags.add_argument("--small", action="store_true", help="tiny shapes, as a smoke test")
    flags.add_argument("--model", default=default.model, help="embedded name, folder, hub id, or `tiny`")
    flags.add_argument("--run", help="a finished run, or a pruned model folder (then --model is the dense model)")
    flags.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    flags.add_argument("--dtype", choices=DTYPES, default="float32")
    flags.add_argument("--threads", type=int, help="CPU threads; default: OMP_NUM_THREADS")
    flags.add_argument("--repeats", type=int, default=default.repeats, help="rounds, of which medians are reported")
    flags.add_argument("--seed", type=int, default=default.seed)
    flags.add_argument("--sparsity", type=float, default=default.sparsity, help="of the FFN, for random masks")
    flags.add_argument("--widths", choices=("random", "uniform"), default=default.widths)
    flags.add_argument("--width_multiple", type=int, default=default.width_multiple)
    flags.add_argument("--batch_sizes", type=int, nargs="+", default=list(default.batch_sizes))
    flags.add_argument("--seq_len", type=int, default=default.seq_len, help="tokens of prefill and of prompts")
    flags.add_argument("--new_tokens", type=int, default=default.new_tokens)
    return flags


def settings_of(args: argparse.Namespace) -> Settings:
    """Validate the flags and convert them to settings.

    Raises:
        UserError: for an invalid number or an unavailable device.
    """
    counts = {name: getattr(args, name) for name in ("repeats", "threads", "seq_len", "new_tokens")}
    counts |= {"batch_sizes": min(args.batch_sizes), "width_multiple": args.width_multiple}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} must be 1 or more; got {value}.")
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device must be an available device, such as cpu or cuda; got '{args.device}'.") from error
    known = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    known |= {"device": device, "dtype": DTYPES[args.dtype], "batch_sizes": tuple(args.batch_sizes)}
    settings = Settings(**known)
    return settings.shrunk() if args.small else settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Print Markdown tables. Returns the exit code."""

    def work() -> str:
        given = list(sys.argv[1:] if arguments is None else arguments)
        own, train = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
        args = parser().parse_args(own)
        if train and args.what != "run":
            raise UserError(f"'{args.what}' cannot have flags of train.py after --; got {' '.join(train)}.")
        if args.clock == "cpu" and args.what == "run":
            raise UserError("'run' cannot have --clock cpu, because it takes seconds from the manifests of runs.")
        settings = settings_of(args)
        quiet()
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.what == "run":
            return "\n".join(map(str, whole_runs(train, settings.repeats)))
        if args.what == "learning":
            with matmul_precision("highest", fastest_on=settings.device):  # as in a run
                return "\n".join(map(str, learning(settings, CLOCKS[args.clock])))
        return "\n".join(map(str, inference(settings, CLOCKS[args.clock])))

    return run_guarded("experiments.bench", work)


if __name__ == "__main__":
    sys.exit(main())
