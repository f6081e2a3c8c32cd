"""How fast is it? Ratios measured side by side in one run, as Markdown tables.

    OMP_NUM_THREADS=1 python -m experiments.bench all                      # a quarter of an hour on one core
    python -m experiments.bench inference --run runs/NAME                  # dense against what a run has pruned
    python -m experiments.bench inference --device cuda --dtype bfloat16 --model HUB/ID
    python -m experiments.bench inference --gguf q8_0                       # through llama.cpp, if a build is installed
    python -m experiments.bench partition --threads 2
    python -m experiments.bench all --small                                # everything on tiny shapes, within a minute

inference    prefill, decoding, memory and file size of dense and pruned, beside the bound that FLOPs give
calibration  collecting statistics over the decoder alone
learning     a step of threshold learning over forward and activation-backward of the frozen model
distillation a step of distillation over a plain loop with the logits of both models
partition    one block of Llama-2-7B's size into modules
scaling      seconds and memory against tokens, corpora, neurons, blocks
bfloat16     calibration in bfloat16 against float32, and the masks that come out
threads      what the number of threads does to statistics and masks
peer         optipfair's hybrid pruning beside ours; not among `all`, since only it needs optipfair
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from gprune.console import Parser, guarded, quiet
from gprune.errors import UserError

from .gguf import gguf_tables
from .inference import inference
from .measure import Table, only_new_garbage
from .models import DTYPES, Settings
from .peer import peer
from .pipeline import bfloat16, calibration, distillation, learning, partition, threads
from .scaling import scaling

BENCHMARKS: dict[str, Callable[[Settings], list[Table]]] = {
    "inference": inference, "calibration": calibration, "learning": learning,
    "distillation": distillation, "partition": partition,
    "scaling": scaling, "bfloat16": bfloat16, "threads": threads, "peer": peer,
}  # fmt: skip


def parser() -> Parser:
    default = Settings()
    made = Parser("python -m experiments.bench", description=__doc__)
    made.add_argument("what", choices=[*BENCHMARKS, "all"])
    made.add_argument("--small", action="store_true", help="tiny shapes, on which figures mean nothing")
    made.add_argument("--model", default=default.model, help="embedded name, folder or hub id, or `tiny`")
    made.add_argument("--run", help="inference: a finished run, or a pruned model folder (dense: --model)")
    made.add_argument("--gguf", metavar="TYPE", help="inference: through llama.cpp instead, as f32, f16 or q8_0")
    made.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    made.add_argument("--dtype", choices=DTYPES, default="float32")
    made.add_argument("--threads", type=int, help="of the processor; else what OMP_NUM_THREADS says")
    made.add_argument(
        "--clock", choices=("wall", "process"), default=default.clock,
        help="process: processor seconds of the one thread, where others use the machine",
    )  # fmt: skip
    made.add_argument("--repeats", type=int, default=default.repeats, help="rounds; medians are reported")
    made.add_argument("--seed", type=int, default=default.seed)
    made.add_argument("--sparsity", type=float, default=default.sparsity, help="of the FFN, for masks drawn at random")
    made.add_argument("--widths", choices=("random", "uniform"), default=default.widths)
    made.add_argument("--width_multiple", type=int, default=default.width_multiple)
    made.add_argument("--batch_sizes", type=int, nargs="+", default=default.batch_sizes, help="inference")
    made.add_argument("--seq_len", type=int, default=default.seq_len, help="inference: tokens of prefill and prompt")
    made.add_argument("--new_tokens", type=int, default=default.new_tokens, help="inference")
    made.add_argument("--windows", type=int, default=default.windows, help="calibration, bfloat16")
    made.add_argument("--window", type=int, default=default.window, help="calibration, learning, bfloat16: tokens")
    made.add_argument("--batch_size", type=int, default=default.batch_size, help="calibration, learning, bfloat16")
    made.add_argument("--corpus", default=default.corpus, help="bfloat16: whose masks are compared; or `random`")
    return made


def settings_of(args: argparse.Namespace) -> Settings:
    """Checked settings.

    Raises:
        UserError: for a number that cannot be, or a device that is not there.
    """
    names = ("repeats", "threads", "seq_len", "new_tokens", "windows", "window", "batch_size")
    counts = {name: getattr(args, name) for name in names} | {"batch_sizes": min(args.batch_sizes)}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name}: expected at least 1, got {value}.")
    if args.windows < 2 or args.window < 2:
        raise UserError(f"--windows, --window: expected at least 2 of both, got {args.windows} and {args.window}.")
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: '{args.device}' is not there; expected cpu or cuda.") from error
    threads = args.threads or torch.get_num_threads()
    if args.clock == "process" and (threads > 1 or device.type != "cpu" or args.gguf):
        raise UserError(
            f"--clock process: expected one thread, no GPU and no llama.cpp, since processor seconds add up over "
            f"threads; got {threads} on {device}. Set --threads 1, or leave --clock out."
        )
    known = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    known |= {"device": device, "dtype": DTYPES[args.dtype], "batch_sizes": tuple(args.batch_sizes)}
    settings = Settings(**known)
    return settings.shrunk() if args.small else settings


def tables(what: str, settings: Settings) -> Iterator[Table]:
    """The tables of one benchmark, or of all, as they become ready."""
    for name in [n for n in BENCHMARKS if n != "peer"] if what == "all" else [what]:
        through_llama_cpp = name == "inference" and settings.gguf is not None
        with only_new_garbage():
            found = gguf_tables(settings) if through_llama_cpp else BENCHMARKS[name](settings)
        yield from found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print Markdown; returns the exit code, as `guarded`."""

    def work() -> str:
        args = parser().parse_args(arguments)
        settings = settings_of(args)
        quiet()
        if args.threads:
            torch.set_num_threads(args.threads)
        for table in tables(args.what, settings):
            print(table, flush=True)
        return ""

    return guarded("experiments.bench", work)


if __name__ == "__main__":
    sys.exit(main())
