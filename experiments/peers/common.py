"""What the drivers share: the peer's clone, calibration windows, the budget, layers one after another, the result.

A driver needs torch, transformers and safetensors, and nothing of gprune, so it runs in an environment that suits the
peer. The peer's code is imported from a clone at one commit. Where it has to be changed to run on a CPU or on another
model, `import_with` changes expressions of the syntax tree while it imports, and stops if an expression is not there.
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

RECORD = "peer.json"  # in the folder that a driver writes
CUT = "cut.safetensors"  # there, in place of a model: masks, and weights and biases that the peer has changed
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab*", "merges.txt")


@dataclass(frozen=True)
class Peer:
    """A repository at the commit that a driver was written for."""

    name: str
    repository: str  # owner/name on GitHub
    commit: str  # 40 hex digits
    license: str  # SPDX identifier, or `none`
    paper: str  # arXiv

    @property
    def obtain(self) -> str:
        """The commands that make the clone."""
        folder = self.repository.rpartition("/")[2]
        url = f"https://github.com/{self.repository}"
        return f"git clone {url} {folder} && git -C {folder} checkout {self.commit}"


@dataclass
class Calibration:
    """The windows that a driver calibrates on, and the dense model they were cut for."""

    model: str  # a folder
    corpora: dict[str, Tensor]  # (n, seq_len) int64 by corpus

    @property
    def windows(self) -> list[Tensor]:
        """(1, seq_len) each; the corpora take turns, so the first few windows have all of them."""
        longest = max(map(len, self.corpora.values()))
        return [w[i : i + 1] for i in range(longest) for w in self.corpora.values() if i < len(w)]

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return sum(w.numel() for w in self.corpora.values())


@dataclass
class Record:
    """What a driver has to say about its run; JSON in the folder of the model."""

    peer: dict[str, Any]
    model: str
    windows: str
    settings: dict[str, Any]
    calibration_tokens: int
    packages: dict[str, str]
    parameters_before: int = 0
    parameters_after: int = 0
    parameters_stored: int = 0  # of the folder, which may hold zeros in place of what was removed
    cpu_seconds: float = 0.0  # of the peer's work: without loading and saving
    wall_seconds: float = 0.0
    peak_memory_mib: float = 0.0  # resident, of the whole process
    reload_difference: float | None = None  # max |difference of logits| of the folder, loaded again
    notes: list[str] = field(default_factory=list)


def stop(message: str) -> SystemExit:
    """The exit of a driver for something that its user can put right: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    return SystemExit(2)


def check_clone(peer: Peer, clone: Path) -> Path:
    """Return the folder of the peer's clone; stop in one line if it is absent or at another commit."""
    expected = f"expected {peer.repository} at {peer.commit[:8]}: {peer.obtain}"
    if not (clone / ".git").exists():
        raise stop(f"--clone: '{clone}' is not a git clone; {expected}")
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if head != peer.commit:
        raise stop(f"--clone: '{clone}' is at {head[:8] or 'no commit'}; {expected}")
    command = ["git", "-C", str(clone), "status", "--porcelain", "--untracked-files=no"]
    if changed := subprocess.run(command, capture_output=True, text=True, check=False).stdout.split():
        raise stop(f"--clone: '{clone}' has files that were changed, such as {changed[1]}; {expected}")
    return clone.resolve()


def read_windows(path: Path) -> Calibration:
    """Read the file that `python -m experiments.peers windows` wrote; stop in one line if it is no such file."""
    if not path.is_file():
        raise stop(f"--windows: '{path}' is not a file; write it with: python -m experiments.peers windows")
    try:
        with safe_open(path, "pt") as file:
            model = (file.metadata() or {})["model"]
            names = json.loads(file.metadata()["corpora"])
            corpora = {name: file.get_tensor(name) for name in names}
    except Exception as error:  # of safetensors, which has classes of its own
        raise stop(f"--windows: '{path}' was not written by experiments.peers: {error}") from error
    return Calibration(model, corpora)


def parser(peer: Peer, description: str, *, mixed: bool = True) -> argparse.ArgumentParser:
    """The flags of every driver; `mixed`: whether its peer may compute matrix products in bfloat16."""
    flags = argparse.ArgumentParser(prog=f"python -m experiments.peers.{peer.name}", description=description)
    flags.add_argument("--clone", type=Path, required=True, help=f"of {peer.repository} at {peer.commit[:8]}")
    flags.add_argument("--windows", type=Path, required=True, help="written by `python -m experiments.peers windows`")
    flags.add_argument("--output", type=Path, required=True, help="folder for the pruned model; must not exist")
    flags.add_argument("--model", help="folder of the dense model; by default the one that the windows were cut for")
    flags.add_argument("--parameters", type=int, help="at least as many stay; default: without half of the FFN")
    if mixed:
        what = "of matrix products (autocast); several times as fast on processors with AMX"
        flags.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help=what)
    return flags


class Work:
    """One run of a driver: `with Work(peer, args) as work`, `work.timed()` around the peer's part, `work.save(...)`."""

    def __init__(self, peer: Peer, args: argparse.Namespace) -> None:
        self.clone = check_clone(peer, args.clone)
        self.calibration = read_windows(args.windows)
        self.output = args.output
        if self.output.exists():
            raise stop(f"--output: '{self.output}' exists already; move it away.")
        self.source = Path(args.model or self.calibration.model)
        if not (self.source / "config.json").is_file():
            raise stop(f"--model: '{self.source}' has no config.json; expected the folder of the dense model.")
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
        """Count the seconds of the block as the peer's."""
        cpu, wall = time.process_time(), time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            yield
        self.record.cpu_seconds += time.process_time() - cpu
        self.record.wall_seconds += time.perf_counter() - wall

    def save_narrowed(self, model: PreTrainedModel, width: int) -> None:
        """As `save`, of a model that was given gradients and an FFN of this width."""
        model.zero_grad(set_to_none=True)
        tell_width(model.requires_grad_(False), width)
        self.save(model)

    def save(self, model: PreTrainedModel, *, removed: int = 0, notes: Sequence[str] = ()) -> None:
        """Write the model as a stock Hugging Face folder, load it again, compare logits, and write the record.

        Args:
            removed: parameters that the peer has removed and the folder holds as zeros.
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
        """Write the record into a folder, give the folder its name, and print the record."""
        self.record.notes += notes
        self.record.peak_memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        text = json.dumps(asdict(self.record), indent=1) + "\n"
        (partial / RECORD).write_text(text, encoding="utf-8")
        partial.rename(self.output)
        print(text)


def load(folder: Path) -> PreTrainedModel:
    """A causal language model in float32, frozen and without cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer into another model folder."""
    for pattern in TOKENIZER:
        for path in source.glob(pattern):
            shutil.copy(path, folder)


def count(model: nn.Module) -> int:
    """Parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def without_half_of_ffn(model: PreTrainedModel) -> int:
    """Parameters that stay if every block loses half of its neurons."""
    config = model.config
    return count(model) - config.num_hidden_layers * neuron_size(model) * (config.intermediate_size // 2)


def neuron_size(model: PreTrainedModel) -> int:
    """Parameters of one gated FFN neuron: a row of gate and of up, a column of down."""
    return 3 * model.config.hidden_size


def width_for(model: PreTrainedModel, parameters: int) -> int:
    """The fewest neurons of every block with which at least so many parameters stay."""
    layer, full = model.config.num_hidden_layers * neuron_size(model), model.config.intermediate_size
    width = full - (count(model) - parameters) // layer
    if not 0 < width <= full:
        least = count(model) - (full - 1) * layer
        raise stop(
            f"--parameters: expected {least:,} to {count(model):,} with a neuron in each block, got {parameters:,}."
        )
    return width


@torch.no_grad()
def keep_neurons(model: PreTrainedModel, kept: Sequence[Tensor]) -> None:
    """Slice the FFN of each block down to the neurons with these indices, as many in every block, in place."""
    (width,) = {len(index) for index in kept}
    for layer, index in zip(model.model.layers, kept, strict=True):
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            linear = getattr(layer.mlp, name)
            linear.weight = nn.Parameter(linear.weight.index_select(dim, index), requires_grad=False)
    tell_width(model, width)


def tell_width(model: PreTrainedModel, width: int) -> None:
    """Let a model whose FFN was sliced say how wide it is, to itself and in its config."""
    for layer in model.model.layers:
        layer.mlp.intermediate_size = width
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            linear.out_features, linear.in_features = linear.weight.shape
    model.config.intermediate_size = width


@torch.no_grad()
def keep_blocks(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave only these blocks in the decoder, in place, with their entries of the config."""
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
    """How many whole blocks can go so that at least so many parameters stay."""
    return (count(model) - parameters) // count(model.model.layers[0])


@torch.no_grad()
def entering(model: PreTrainedModel, windows: Sequence[Tensor]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What enters the first block, one (1, T, H) per window, and the other arguments of every block.

    The latter (positions, masks) are those of the first window: all windows are equally long and not padded.
    """
    settings: list[dict[str, Any]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        settings.append(kwargs)

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in model.model.layers]
    model(windows[0], use_cache=False)
    for hook in hooks:
        hook.remove()
    states: list[Tensor] = []

    class Entered(Exception):  # noqa: N818
        """Stops the forward pass at the first block."""

    def take(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states.append(args[0])
        raise Entered

    hook = model.model.layers[0].register_forward_pre_hook(take, with_kwargs=True)
    for window in windows:
        with contextlib.suppress(Entered):
            model(window, use_cache=False)
    hook.remove()
    return states, settings


def accumulate_gradients(model: PreTrainedModel, windows: Sequence[Tensor]) -> None:
    """Leave in every parameter's `.grad` the gradient of the mean next-token loss over all windows."""
    for window in windows:
        (model(window, labels=window, use_cache=False).loss / len(windows)).backward()


def import_with(name: str, path: Path, replaced: Mapping[str, str], **names: Any) -> ModuleType:
    """Import a file of a peer with some expressions of its syntax tree replaced.

    Args:
        name: of the module, in `sys.modules` too.
        replaced: Python expressions, and what stands in their places: all places, and at least one.
        names: what the new expressions may refer to.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    swap = _Swap({ast.dump(_expression(old)): _expression(new) for old, new in replaced.items()})
    tree = ast.fix_missing_locations(swap.visit(tree))
    if missing := [old for old in replaced if ast.dump(_expression(old)) not in swap.found]:
        raise stop(f"{path} has no expression `{missing[0]}`, which the driver replaces.")
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    vars(module).update(names)
    sys.modules[name] = module
    exec(compile(tree, str(path), "exec"), vars(module))
    return module


def _expression(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body


class _Swap(ast.NodeTransformer):
    """Replaces expressions by others, outermost first."""

    def __init__(self, replaced: Mapping[str, ast.expr]) -> None:
        self.replaced, self.found = replaced, set()

    def visit(self, node: ast.AST) -> ast.AST:
        """Replace a node, or look into it."""
        content = ast.dump(node) if isinstance(node, ast.expr) else ""
        if content in self.replaced:
            self.found.add(content)
            return self.replaced[content]
        return self.generic_visit(node)


def stand_in(name: str, **content: Any) -> ModuleType:
    """A module under a name that the peer imports and this run has no need of."""
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    return module


def run(main: Callable[[argparse.Namespace], None], flags: argparse.ArgumentParser, args: Iterable[str] | None) -> None:
    """Parse the flags of a driver and run it."""
    torch.manual_seed(0)
    main(flags.parse_args(None if args is None else list(args)))
