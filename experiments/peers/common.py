"""Common parts of the drivers: the peer's clone, calibration windows, budget, hidden states, slicing, and the result.

A driver needs torch, transformers and safetensors, but not gprune, so that it can run in an environment for the peer.
The peer's code is imported from a clone at a fixed commit. If the code has to be changed to run on a CPU or on another
model, `import_with` replaces expressions of the syntax tree while importing, and stops if an expression is missing.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

RECORD = "peer.json"  # in the output folder of a driver
CUT = "cut.safetensors"  # instead of a model in the output folder: masks, and weights and biases changed by the peer
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab*", "merges.txt")


@dataclass(frozen=True)
class Peer:
    """A repository and the commit that its driver supports."""

    name: str
    repository: str  # owner/name on GitHub
    commit: str  # 40 hex digits
    license: str  # SPDX identifier, or `none`
    paper: str  # arXiv

    @property
    def obtain(self) -> str:
        """Commands that clone the repository at the commit."""
        folder = self.repository.rpartition("/")[2]
        url = f"https://github.com/{self.repository}"
        return f"git clone {url} {folder} && git -C {folder} checkout {self.commit}"


@dataclass
class Calibration:
    """Calibration windows of a driver, and the dense model whose tokenizer they have."""

    model: str  # folder
    corpora: dict[str, Tensor]  # (n, seq_len) int64 by corpus

    @property
    def windows(self) -> list[Tensor]:
        """Windows (1, seq_len) that alternate between corpora, so that the first few windows have all corpora."""
        longest = max(map(len, self.corpora.values()))
        return [w[i : i + 1] for i in range(longest) for w in self.corpora.values() if i < len(w)]

    @property
    def tokens(self) -> int:
        """Number of tokens of all windows."""
        return sum(w.numel() for w in self.corpora.values())


@dataclass
class Record:
    """Record of a driver's run, stored as JSON in its output folder."""

    peer: dict[str, Any]
    model: str
    windows: str
    settings: dict[str, Any]
    calibration_tokens: int
    packages: dict[str, str]
    parameters_before: int = 0
    parameters_after: int = 0
    parameters_stored: int = 0  # in the folder, which may have zeros for removed parameters
    cpu_seconds: float = 0.0  # of the peer's code, without loading and saving
    wall_seconds: float = 0.0
    peak_memory_mib: float = 0.0  # resident, of the whole process
    reload_difference: float | None = None  # max |difference of logits| of the reloaded folder
    notes: list[str] = field(default_factory=list)


def stop(message: str) -> SystemExit:
    """Print a user error as one line. Returns the exception that exits with code 2."""
    print(f"error: {message}", file=sys.stderr)
    return SystemExit(2)


def check_clone(peer: Peer, clone: Path) -> Path:
    """Return the folder of the peer's clone. Stop if it is missing, modified or at another commit."""
    expected = f"--clone must be an unmodified clone of {peer.repository} at {peer.commit[:8]}"
    remedy = f"Run `{peer.obtain}`."
    if not (clone / ".git").exists():
        raise stop(f"{expected}; got '{clone}', which is not a clone. {remedy}")
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if head != peer.commit:
        raise stop(f"{expected}; got '{clone}' at {head[:8] or 'no commit'}. {remedy}")
    command = ["git", "-C", str(clone), "status", "--porcelain", "--untracked-files=no"]
    if changed := subprocess.run(command, capture_output=True, text=True, check=False).stdout.split():
        raise stop(f"{expected}; got '{clone}' with modified files, such as {changed[1]}. {remedy}")
    return clone.resolve()


def read_windows(path: Path) -> Calibration:
    """Read a file written by `python -m experiments.peers windows`. Stop if the file is invalid."""
    expected = f"--windows: '{path}' must be a file written by `python -m experiments.peers windows`"
    if not path.is_file():
        raise stop(f"{expected}; got no file.")
    try:
        with safe_open(path, "pt") as file:
            model = (file.metadata() or {})["model"]
            names = json.loads(file.metadata()["corpora"])
            corpora = {name: file.get_tensor(name) for name in names}
    except Exception as error:  # safetensors has exception classes of its own
        raise stop(f"{expected}; got another file ({error}).") from error
    return Calibration(model, corpora)


def parser(peer: Peer, description: str, *, mixed: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the flags of all drivers. With `mixed`, --precision offers bfloat16 matrix products."""
    flags = argparse.ArgumentParser(prog=f"python -m experiments.peers.{peer.name}", description=description)
    flags.add_argument("--clone", type=Path, required=True, help=f"clone of {peer.repository} at {peer.commit[:8]}")
    flags.add_argument("--windows", type=Path, required=True, help="written by `python -m experiments.peers windows`")
    flags.add_argument("--output", type=Path, required=True, help="folder for the pruned model; must not exist")
    flags.add_argument("--model", help="folder of the dense model; default: the model of the windows")
    flags.add_argument("--parameters", type=int, help="minimum of remaining parameters; default: without half the FFN")
    if mixed:
        what = "of matrix products (autocast); bfloat16 is faster where --trainer.precision auto is bf16-mixed"
        flags.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help=what)
    return flags


class Work:
    """A run of a driver: `work = Work(peer, args)`, the peer's code inside `work.timed()`, then `work.save(...)`."""

    def __init__(self, peer: Peer, args: argparse.Namespace) -> None:
        self.clone = check_clone(peer, args.clone)
        self.calibration = read_windows(args.windows)
        self.output = args.output
        if self.output.exists():
            raise stop(f"--output must be a new folder; got '{self.output}', which exists.")
        self.source = Path(args.model or self.calibration.model)
        if not (self.source / "config.json").is_file():
            raise stop(f"--model must be the folder of the dense model, with config.json; got '{self.source}'.")
        self.model = load(self.source)
        self.parameters = args.parameters or without_half_of_ffn(self.model)
        self.autocast = getattr(args, "precision", "float32") == "bfloat16"
        settings = {k: v for k, v in vars(args).items() if k not in ("clone", "windows", "output", "model")}
        self.record = Record(
            peer=asdict(peer), model=self.source.name, windows=args.windows.name,
            settings={**settings, "parameters": self.parameters}, calibration_tokens=self.calibration.tokens,
            packages={"torch": torch.__version__, "transformers": transformers.__version__},
            parameters_before=count(self.model),
        )  # fmt: skip

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of the block to the record."""
        cpu, wall = time.process_time(), time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            yield
        self.record.cpu_seconds += time.process_time() - cpu
        self.record.wall_seconds += time.perf_counter() - wall

    def save_narrowed(self, model: PreTrainedModel, width: int) -> None:
        """Save a model whose parameters have gradients and whose FFN was narrowed to `width`."""
        model.zero_grad(set_to_none=True)
        set_width(model.requires_grad_(False), width)
        self.save(model)

    def save(self, model: PreTrainedModel, *, removed: int = 0, notes: Sequence[str] = ()) -> None:
        """Save the model as a stock Hugging Face folder, reload it, compare logits, and write the record.

        Args:
            removed: number of removed parameters that are zeros in the folder.
        """
        partial = self.output.with_name(self.output.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        copy_tokenizer(self.source, partial)
        window = self.calibration.windows[0]
        with torch.no_grad():
            difference = (model(window).logits - load(partial)(window).logits).abs().max().item()
        self.record.parameters_stored = count(model)
        self.record.parameters_after = self.record.parameters_stored - removed
        self.record.reload_difference = difference
        self.finish(partial, notes)

    def finish(self, partial: Path, notes: Sequence[str] = ()) -> None:
        """Write the record to a folder, rename the folder to the output, and print the record."""
        self.record.notes += notes
        self.record.peak_memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        text = json.dumps(asdict(self.record), indent=1) + "\n"
        (partial / RECORD).write_text(text, encoding="utf-8")
        partial.rename(self.output)
        print(text)


def load(folder: Path) -> PreTrainedModel:
    """Load a causal language model in float32, frozen and without KV cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer to another model folder."""
    for pattern in TOKENIZER:
        for path in source.glob(pattern):
            shutil.copy(path, folder)


def count(model: nn.Module) -> int:
    """Number of parameters. Tied parameters count once."""
    return sum(p.numel() for p in model.parameters())


def without_half_of_ffn(model: PreTrainedModel) -> int:
    """Number of parameters if each block loses half of its neurons."""
    config = model.config
    return count(model) - config.num_hidden_layers * neuron_size(model) * (config.intermediate_size // 2)


def neuron_size(model: PreTrainedModel) -> int:
    """Number of parameters of a gated FFN neuron: a row of gate, a row of up, a column of down."""
    return 3 * model.config.hidden_size


def width_for(model: PreTrainedModel, parameters: int) -> int:
    """Smallest number of neurons per block with which at least `parameters` remain."""
    layer, full = model.config.num_hidden_layers * neuron_size(model), model.config.intermediate_size
    width = full - (count(model) - parameters) // layer
    if not 0 < width <= full:
        least = count(model) - (full - 1) * layer
        raise stop(
            f"--parameters must be from {least:,} to {count(model):,}, for one neuron or more per block; "
            f"got {parameters:,}."
        )
    return width


@torch.no_grad()
def keep_neurons(model: PreTrainedModel, kept: Sequence[Tensor]) -> None:
    """Slice the FFN of each block to the neurons with these indices, in place. All blocks keep equally many."""
    (width,) = {len(index) for index in kept}
    for layer, index in zip(model.model.layers, kept, strict=True):
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            linear = getattr(layer.mlp, name)
            linear.weight = nn.Parameter(linear.weight.index_select(dim, index), requires_grad=False)
    set_width(model, width)


def set_width(model: PreTrainedModel, width: int) -> None:
    """Set the width of a sliced FFN in its modules and in the config."""
    for layer in model.model.layers:
        layer.mlp.intermediate_size = width
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            linear.out_features, linear.in_features = linear.weight.shape
    model.config.intermediate_size = width


@torch.no_grad()
def keep_blocks(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Keep only these blocks of the decoder and their entries of the config, in place."""
    before = model.config.num_hidden_layers
    layers = [model.model.layers[i] for i in kept]
    for name, value in list(vars(model.config).items()):
        if isinstance(value, list) and len(value) == before:  # such as layer_types
            setattr(model.config, name, [value[i] for i in kept])
    model.config.num_hidden_layers = len(kept)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    model.model.layers = nn.ModuleList(layers)


def blocks_for(model: PreTrainedModel, parameters: int) -> int:
    """Largest number of whole blocks that can be removed so that at least `parameters` remain."""
    return (count(model) - parameters) // count(model.model.layers[0])


@torch.no_grad()
def first_block_inputs(model: PreTrainedModel, windows: Sequence[Tensor]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Hidden states at the input of the first block, (1, T, H) per window, and the other arguments of each block.

    The other arguments (positions, masks) are those of the first window, since all windows have the same length and no
    padding.
    """
    settings: list[dict[str, Any]] = []

    def record_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        settings.append(kwargs)

    hooks = [layer.register_forward_pre_hook(record_arguments, with_kwargs=True) for layer in model.model.layers]
    model(windows[0], use_cache=False)
    for hook in hooks:
        hook.remove()
    states: list[Tensor] = []

    class StopForward(Exception):  # noqa: N818
        """Ends the forward pass at the first block."""

    def record_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states.append(args[0])
        raise StopForward

    hook = model.model.layers[0].register_forward_pre_hook(record_input, with_kwargs=True)
    for window in windows:
        with contextlib.suppress(StopForward):
            model(window, use_cache=False)
    hook.remove()
    return states, settings


def accumulate_gradients(model: PreTrainedModel, windows: Sequence[Tensor]) -> None:
    """Add the gradient of the mean next-token loss over all windows to the `.grad` of each parameter."""
    for window in windows:
        (model(window, labels=window, use_cache=False).loss / len(windows)).backward()


def import_with(name: str, path: Path, replaced: Mapping[str, str], **names: Any) -> ModuleType:
    """Import a file of a peer with some expressions of its syntax tree replaced.

    Args:
        name: of the module, also in `sys.modules`.
        replaced: new Python expressions by old ones. All occurrences are replaced; at least one is required.
        names: variables for the new expressions.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    replacer = _Replacer({ast.dump(_expression(old)): _expression(new) for old, new in replaced.items()})
    tree = ast.fix_missing_locations(replacer.visit(tree))
    if missing := [old for old in replaced if ast.dump(_expression(old)) not in replacer.found]:
        raise stop(f"Cannot patch '{path}': it has no expression `{missing[0]}`.")
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    vars(module).update(names)
    sys.modules[name] = module
    exec(compile(tree, str(path), "exec"), vars(module))
    return module


def _expression(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body


class _Replacer(ast.NodeTransformer):
    """Replaces expressions by others, outermost expressions first."""

    def __init__(self, replaced: Mapping[str, ast.expr]) -> None:
        self.replaced, self.found = replaced, set()

    def visit(self, node: ast.AST) -> ast.AST:
        """Replace a node or, if it is not to be replaced, visit its children."""
        content = ast.dump(node) if isinstance(node, ast.expr) else ""
        if content in self.replaced:
            self.found.add(content)
            return self.replaced[content]
        return self.generic_visit(node)


def stub_module(name: str, **content: Any) -> ModuleType:
    """Register a stub for a module that the peer imports but that is not needed."""
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    return module


def run(main: Callable[[argparse.Namespace], None], flags: argparse.ArgumentParser, args: Iterable[str] | None) -> None:
    """Parse the flags of a driver and run it."""
    torch.manual_seed(0)
    main(flags.parse_args(None if args is None else list(args)))
