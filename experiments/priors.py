"""Are modules, or drift, worth anything as a prior of gates?

    python -m experiments.priors               # learn, prune and measure one cell after the other; --table prints them
    python -m experiments.priors --budget 3600 # begin no cell after so many seconds; the next call goes on

Gates are those of `gates.yaml`: one number o_i per neuron, which moves its averaged rank in its block, z_i = logit p_i
+ o_i, learned by KL to the dense model with Adam; then half of the FFN goes, and least squares. A *prior* changes the
gradient g_i that Adam gets, g_i being the mean over the four windows of a step:

mixed          (1 - rho) g_i + rho mean of g in the module of i. rho = 1 is a threshold per module, 0 plain gates
centred        the same, after the mean over all gates has been taken off g: a shift of all of them changes no mask, and
               Adam, which sees signs more than sizes, moves all modules alike where opening any of them would help
shrunken       mixed, with a rho for each module and step from the data: s / (s + t), s the mean sampling variance of
               its gates' gradients, which the windows of the step show, and t = max(0, variance in the module - s)
hierarchical   o_i = u_m + v_i; penalty v_i^2 / tau_m^2, tau_m^2 the mean of v^2 in the module (empirical Bayes)
width          penalty o_i^2 / tau_i^2, tau_i^2 in proportion to 1 / drift_i inside a block: no modules
agreeing       the smallest gradient of the three corpora where all have one sign, else 0
slower         plain gates with a smaller step size: the control of what moves less
agreeing, by module   g_i where the mean gradients of its module have one sign for all corpora, else 0

Penalties have a gradient as large as that of the gates (root mean square) where o or v is at its own tau = the root
mean square of all. Gradients of corpora are running means, as Adam's first moment is. Modules are `paper.yaml`'s
(refined, 8 to begin with); controls are *random* ones of the same sizes, and *permuted* ones, refined on drift that was
dealt out again among the neurons of each block; *block* is one module for each block. *ridge* learns nothing, and
changes least squares alone: Lambda = lambda diag(1 + c d_i) / (1 + c), d drift over its mean; *balanced* are Gram
matrices of corpora divided by the dense output's energy.

Text: N windows of 512 tokens of the three corpora in turn; the seed draws windows and order. 4 and 16 windows are gone
through until six steps are made, more windows once. Measured on selection text (`questions/settings.yaml`), which is
never quoted as unseen: train text of technical, code and multilingual.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gprune.calibration.statistics import CorpusStatistics, pooled
from gprune.config import parse
from gprune.console import Parser, guarded, quiet
from gprune.evaluation.intervals import mean_perplexity, paired_ratio
from gprune.evaluation.perplexity import perplexity
from gprune.importance.scores import score_units
from gprune.models.blocks import blocks_of
from gprune.models.losses import final_hidden, next_token_losses
from gprune.models.masks import Masks
from gprune.models.surgery import prune
from gprune.partition.drift import fractional_ranks
from gprune.partition.initial import shuffled_partition
from gprune.partition.record import Drift, ModuleRanks
from gprune.partition.reliability import within_module_ranks
from gprune.pipeline.calibrate import calibrate
from gprune.pipeline.partition import measure_drift, partitioned
from gprune.pipeline.recover import shrink
from gprune.pipeline.run import Run, opened
from gprune.recovery.least_squares import ridge_correction
from gprune.report.table import Cell, Estimate, Table
from gprune.sparsity.gates import gated
from gprune.stages.thresholds import Learning, ThresholdLearning
from gprune.storage.files import read_json, write_json

HERE = Path(__file__).parent
FLAGS = [
    f"--config={HERE / 'protocol.yaml'}", f"--config={HERE / 'gates.yaml'}",
    "--partition.method=refined", "--partition.num_modules=8",
    "--corpora.evaluate=[technical,code,multilingual]", "--evaluation.split=train", "--evaluation.num_samples=12",
    "--evaluation.controls=[]", "--corpora.learn_samples=128", "--export=none", "--logging.mode=disabled",
]  # fmt: skip
PER_STEP, LEAST_STEPS, MEMORY = 4, 6, 0.9  # windows; steps; of running means, as of Adam


@dataclass(frozen=True)
class Setting:
    """One cell of the table."""

    windows: int  # of learning text; 0: nothing is learned
    seed: int
    prior: str = "plain"
    value: float | str = ""  # rho; what a penalty's width follows; lambda, c
    modules: str = ""  # real, random or permuted

    @property
    def name(self) -> str:
        return " ".join(str(part) for part in (self.prior, self.value, self.modules) if part != "")

    @property
    def file(self) -> str:
        return f"{self.windows}-{self.seed}-{self.name.replace(' ', '_')}.json"


@dataclass(frozen=True)
class World:
    """What all cells share."""

    run: Run
    statistics: dict[str, CorpusStatistics]
    ranks: ModuleRanks  # averaged, one module per block
    drift: Tensor  # (N,) of all neurons, block after block, over the block's mean
    shuffled_drift: Tensor  # the same, dealt out again inside each block
    sizes: list[int]  # neurons of each block
    modules: dict[str, Tensor]  # (N,) numbers of modules, each block with its own
    teacher: dict[tuple[int, int], Tensor]  # what the dense model says of a window, by corpus and number


# --- priors -----------------------------------------------------------------------------------------------------


class Gates:
    """Plain gates: offsets o (N,) by Adam; a prior overrides `gradient`."""

    def __init__(self, neurons: int, rate: float):
        self.o = torch.zeros(neurons)
        self.adam = torch.optim.Adam([self.o], lr=rate)

    def gradient(self, g: Tensor, corpora: Tensor) -> Tensor:
        """What Adam gets, (N,), from the gradients of a step's windows, (W, N), and their corpora, (W,)."""
        return g.mean(0)

    def step(self, g: Tensor, corpora: Tensor) -> None:
        self.o.grad = self.gradient(g, corpora)
        self.adam.step()

    @property
    def offsets(self) -> Tensor:
        return self.o


def module_means(x: Tensor, modules: Tensor) -> Tensor:
    """Mean of x (N,) in each module, (M,)."""
    M = int(modules.max()) + 1
    return torch.zeros(M).index_add_(0, modules, x) / torch.bincount(modules, minlength=M)


class Mixed(Gates):
    def __init__(self, neurons: int, rate: float, modules: Tensor, rho: float, *, centred: bool = False):
        super().__init__(neurons, rate)
        self.modules, self.rho, self.centred = modules, rho, centred

    def gradient(self, g: Tensor, corpora: Tensor) -> Tensor:
        own = g.mean(0)
        own = own - own.mean() if self.centred else own
        return (1 - self.rho) * own + self.rho * module_means(own, self.modules)[self.modules]


class Shrunken(Gates):
    def __init__(self, neurons: int, rate: float, modules: Tensor):
        super().__init__(neurons, rate)
        self.modules = modules

    def gradient(self, g: Tensor, corpora: Tensor) -> Tensor:
        own, y = g.mean(0), self.modules
        mean = module_means(own, y)[y]
        s = module_means(g.var(0) / len(g), y)
        t = (module_means((own - mean).square(), y) - s).clamp_min(0)
        rho = (s / (s + t).clamp_min(1e-30))[y]
        return (1 - rho) * own + rho * mean


def penalty(g: Tensor, x: Tensor, width: Tensor) -> Tensor:
    """Gradient of a penalty x^2 / width^2 that is rms(g) where x and width are rms(x)."""
    rms = x.square().mean().sqrt().clamp_min(1e-12)
    return g.square().mean().sqrt() * rms * x / width.square().clamp_min(1e-12)


class Hierarchical(Gates):
    """o = u_m + v, with a penalty on v from the third step on, when there is a variance to go by."""

    def __init__(self, neurons: int, rate: float, modules: Tensor, module_rate: float):
        super().__init__(neurons, rate)  # o is v here
        self.modules, self.u = modules, torch.zeros(int(modules.max()) + 1)
        self.adam = torch.optim.Adam([{"params": [self.o]}, {"params": [self.u], "lr": module_rate}], lr=rate)
        self.steps = 0

    def step(self, g: Tensor, corpora: Tensor) -> None:
        own, y = g.mean(0), self.modules
        self.u.grad = torch.zeros_like(self.u).index_add_(0, y, own)
        tau = module_means(self.o.square(), y).sqrt().clamp_min(1e-3)[y]
        self.o.grad = own if self.steps < 2 else own + penalty(own, self.o, tau)
        self.steps += 1
        self.adam.step()

    @property
    def offsets(self) -> Tensor:
        return self.u[self.modules] + self.o


class Width(Gates):
    def __init__(self, neurons: int, rate: float, drift: Tensor):
        super().__init__(neurons, rate)
        self.narrow = drift.clamp(0.25, 4)
        self.narrow = self.narrow / self.narrow.mean()

    def gradient(self, g: Tensor, corpora: Tensor) -> Tensor:
        own = g.mean(0)
        rms = self.o.square().mean().sqrt().clamp_min(1e-12)
        return own + penalty(own, self.o, rms / self.narrow.sqrt())


class Agreeing(Gates):
    def __init__(self, neurons: int, rate: float, modules: Tensor | None):
        super().__init__(neurons, rate)
        self.modules, self.running = modules, {}

    def gradient(self, g: Tensor, corpora: Tensor) -> Tensor:
        for c in corpora.unique().tolist():
            new = g[corpora == c].mean(0)
            self.running[c] = new if c not in self.running else MEMORY * self.running[c] + (1 - MEMORY) * new
        each = torch.stack(list(self.running.values()))
        if self.modules is None:
            agree = each.sign().sum(0).abs() == len(each)
            return agree * each.sign()[0] * each.abs().min(0).values
        means = torch.stack([module_means(x, self.modules) for x in each])
        return g.mean(0) * (means.sign().sum(0).abs() == len(each))[self.modules]


def gates_for(s: Setting, world: World) -> Gates:
    p, N = world.run.cfg.sparsity, sum(world.sizes)
    rate, modules = p.offset_learning_rate, world.modules.get(s.modules)
    makers: dict[str, Callable[[], Gates]] = {
        "plain": lambda: Gates(N, rate),
        "mixed": lambda: Mixed(N, rate, modules, float(s.value)),
        "centred": lambda: Mixed(N, rate, modules, float(s.value), centred=True),
        "slower": lambda: Gates(N, float(s.value)),
        "shrunken": lambda: Shrunken(N, rate, modules),
        "hierarchical": lambda: Hierarchical(N, rate, modules, p.learning_rate),
        "width": lambda: Width(N, rate, {
            "drift": world.drift, "permuted": world.shuffled_drift, "equal": torch.ones(N)
        }[str(s.value)]),
        "agreeing": lambda: Agreeing(N, rate, modules),
    }  # fmt: skip
    return makers[s.prior]()


# --- learning, pruning, measuring -------------------------------------------------------------------------------


def prepared(run: Run) -> World:
    cfg, statistics = run.cfg, calibrate(run)
    pool = pooled((statistics[c] for c in cfg.corpora.drift), gram=False)
    scores = score_units(cfg.importance, run.blocks, pool, seed=0, attention=False).ffn
    one = [torch.zeros(len(x), dtype=torch.long) for x in scores]
    p = [within_module_ranks(x, x, y, torch.zeros(1)) for x, y in zip(scores, one, strict=True)]
    ranks = ModuleRanks(p, one, [fractional_ranks(torch.zeros(b.kv_groups)) for b in run.blocks])
    drift = measure_drift(run, statistics)
    real = partitioned(run, drift)
    dealt = [torch.randperm(len(x), generator=torch.Generator().manual_seed(b)) for b, x in enumerate(scores)]
    permuted = partitioned(run, [moved(d, order) for d, order in zip(drift, dealt, strict=True)])
    found = {"real": real, "permuted": permuted}
    found["random"] = [shuffled_partition(y, seed=7919 * b) for b, y in enumerate(real)]
    found["block"] = one
    over = [(d.drift / d.drift.mean()).float() for d in drift]
    return World(
        run, statistics, ranks, torch.cat(over), torch.cat([x[o] for x, o in zip(over, dealt, strict=True)]),
        [len(x) for x in scores], {name: numbered(labels) for name, labels in found.items()}, {},
    )  # fmt: skip


def moved(d: Drift, order: Tensor) -> Drift:
    return dataclasses.replace(
        d, scores=d.scores[:, order], ranks=d.ranks[:, order], drift=d.drift[order], floor=d.floor[order]
    )


def numbered(labels: Sequence[Tensor]) -> Tensor:
    """Modules of all blocks, numbered through."""
    starts = torch.tensor([0, *(int(y.max()) + 1 for y in labels)]).cumsum(0)
    return torch.cat([y + start for y, start in zip(labels, starts, strict=False)])


def order_of(world: World, s: Setting) -> list[tuple[int, int]]:
    """(corpus, window) of the learning text: the corpora in turn, each in an order of the seed's."""
    text = world.run.text.learn
    orders = [
        torch.randperm(len(w.tokens), generator=torch.Generator().manual_seed(1000 * s.seed + c)).tolist()
        for c, w in enumerate(text)
    ]
    return [(i % len(text), orders[i % len(text)][i // len(text)]) for i in range(s.windows)]


def learned(world: World, s: Setting) -> Masks:
    """The masks of a cell."""
    run = world.run
    start = [torch.zeros(1) for _ in world.sizes], [torch.zeros(1) for _ in world.sizes]
    stage = ThresholdLearning(run.model, world.ranks, start, run.budget, Learning(learn="offsets", loss="kl"))
    if s.windows:
        prior, order = gates_for(s, world), order_of(world, s)
        steps = max(LEAST_STEPS, len(order) // PER_STEP)
        batches = [order[i : i + PER_STEP] for i in range(0, len(order), PER_STEP)]
        for k in range(steps):
            batch = batches[k % len(batches)]
            g = torch.stack([gradient(world, stage, *window) for window in batch])
            prior.step(g, torch.tensor([c for c, _ in batch]))
            with torch.no_grad():
                for mine, new in zip(stage.ffn_offsets, prior.offsets.split(world.sizes), strict=True):
                    mine.copy_(new.clamp(-run.cfg.sparsity.offset_limit, run.cfg.sparsity.offset_limit))
            stage.recentre(stage.masks())
    return stage.masks()


def gradient(world: World, stage: ThresholdLearning, corpus: int, index: int) -> Tensor:
    """Gradient of the loss of one window by all offsets, (N,)."""
    ids = world.run.text.learn[corpus].tokens[index : index + 1]
    if (corpus, index) not in world.teacher:
        with torch.no_grad():
            world.teacher[corpus, index] = final_hidden(stage.lm, ids)
    stage.refresh_gates()
    with gated(stage.lm, stage.ffn_gates):
        next_token_losses(stage.lm, ids, teacher=world.teacher[corpus, index]).sum().backward()
    g = torch.cat([o.grad for o in stage.ffn_offsets])
    stage.zero_grad()
    return g


@torch.no_grad()
def ridged(world: World, masks: Masks, s: Setting) -> torch.nn.Module:
    """The pruned model with least squares whose ridge follows drift, or whose Gram matrices are balanced."""
    corpora, (ridge, c) = world.run.cfg.corpora.recover, map(float, str(s.value).split(","))
    small, drift = prune(world.run.model, masks), world.shuffled_drift if "permuted" in s.prior else world.drift
    for dense, block, keep, d in zip(
        blocks_of(world.run.model), blocks_of(small), masks.ffn, drift.split(world.sizes), strict=True
    ):
        weight, gram = dense.down.weight.double(), torch.zeros(len(keep), len(keep), dtype=torch.float64)
        for name in corpora:
            own = world.statistics[name].ffn[dense.index].total.gram.double()
            gram += own / float(((weight @ own) * weight).sum()) if "balanced" in s.prior else own
        G, cross = gram[keep][:, keep], weight[:, ~keep] @ gram[~keep][:, keep]
        extra = ((1 + c * d[keep].double()) / (1 + c)).clamp_min(1e-3)
        # Columns in units in which the ridge is the same for all: W_K + E A (A G A + lambda I)^-1 A.
        A = 1 / (extra / extra.mean()).sqrt()
        mean, scaled = G.diagonal().mean(), A[:, None] * G * A
        found = ridge_correction(scaled, cross * A, ridge * float(mean / scaled.diagonal().mean())) * A
        block.parts["down"].set((weight[:, keep] + found).to(block.down.weight.dtype), None)
    return small


def measured(world: World, s: Setting) -> dict[str, list[float]]:
    """Negative log-likelihood of each window, by corpus of selection text."""
    masks = learned(world, s)
    small = ridged(world, masks, s) if s.prior.startswith("ridge") else shrink(world.run, masks, world.statistics)
    return {w.corpus: perplexity(small, w, batch_size=4).window_nll for w in world.run.text.test}


# --- which cells ------------------------------------------------------------------------------------------------

FEW = (4, 16)
PRIORS = [  # what was tried at seed 0, in the order in which it says something
    ("mixed", 0.5, "real"), ("mixed", 0.5, "random"), ("mixed", 1, "real"), ("mixed", 1, "random"),
    ("mixed", 0.5, "permuted"), ("mixed", 0.75, "real"), ("hierarchical", "", "real"), ("shrunken", "", "real"),
    ("agreeing", "", "real"), ("centred", 1, "real"), ("width", "drift"),
]  # fmt: skip
CONTROLS = [
    ("width", "equal"), ("hierarchical", "", "random"), ("centred", 1, "random"), ("slower", 0.05),
    ("centred", 1, "block"),
]  # fmt: skip
AGAIN = [(), ("centred", 1, "real"), ("centred", 1, "random"), ("centred", 1, "block"), ("hierarchical", "", "real")]
REST = [
    ("agreeing", "", "random"), ("width", "permuted"), ("hierarchical", "", "permuted"), ("centred", 1, "permuted"),
    ("mixed", 1, "permuted"), ("slower", 0.1), ("mixed", 0.25, "real"), ("mixed", 0.25, "random"),
    ("mixed", 0.75, "random"), ("agreeing",), ("centred", 0.5, "real"), ("centred", 0, "real"),
]  # fmt: skip
RIDGES = [("ridge", "0.01,0"), ("ridge", "0.01,100"), ("ridge", "0.1,0"), ("ridge", "0.1,100"),
          ("ridge permuted", "0.1,100"), ("ridge balanced", "0.01,0")]  # fmt: skip


def wanted() -> Iterator[Setting]:
    """The cells in the order in which they say something."""
    yield Setting(0, 0)
    yield from (Setting(n, 0, *prior) for n in FEW for prior in ((), *PRIORS))
    yield from (Setting(n, 0, *prior) for prior in CONTROLS for n in FEW)
    yield from (Setting(4, seed, *prior) for prior in AGAIN for seed in (1, 2))
    yield from (Setting(16, seed, *prior) for seed in (1, 2) for prior in AGAIN[:4])
    yield from (Setting(0, 0, *ridge) for ridge in RIDGES)
    yield from (Setting(96, 0, *prior) for prior in AGAIN)
    yield from (Setting(n, 0, *prior) for prior in REST for n in FEW)


def ratio(done: dict[Setting, dict], s: Setting) -> tuple[float, float, float]:
    """Over plain gates of the same windows and order: (ratio, lower, upper), paired over windows."""
    tokens = next(iter(done.values()))["tokens"]
    plain = done.get(Setting(s.windows, s.seed))
    return paired_ratio(done[s]["nll"], plain["nll"], tokens) if plain else (math.nan,) * 3


def read(folder: Path) -> dict[Setting, dict]:
    found = [read_json(path) for path in sorted((folder / "cells").glob("*.json"))]
    return {Setting(**cell["setting"]): cell for cell in found if cell}


def table(done: dict[Setting, dict]) -> str:
    """Markdown: a row per prior and amount of text; ratios seed by seed, and of the mean over seeds."""
    if not done:
        return "No cell yet."
    rows: list[list[Cell]] = []
    groups = dict.fromkeys(
        (s.windows, s.name) for s in sorted(done, key=lambda s: (s.windows, s.name != "plain", s.name))
    )
    tokens = next(iter(done.values()))["tokens"]
    for windows, name in groups:
        mine = sorted((s for s in done if (s.windows, s.name) == (windows, name)), key=lambda s: s.seed)
        paired = [s for s in mine if Setting(windows, s.seed) in done]
        mean = Estimate(*mean_perplexity(averaged(done, mine), tokens))
        over = None
        if name != "plain" and paired:
            plain = averaged(done, [Setting(windows, s.seed) for s in paired])
            over = Estimate(*paired_ratio(averaged(done, paired), plain, tokens))
        each = ", ".join(f"{ratio(done, s)[0]:.3f}" for s in paired) if over else ""
        rows.append([f"{windows} windows, {name}", str(len(mine)), mean, over, each])
    columns = ["cell", "seeds", "perplexity", "over plain gates", "seed by seed"]
    return Table("priors", "Priors", columns, rows, {"perplexity": 2, "over plain gates": 3}).to_markdown()


def averaged(done: dict[Setting, dict], cells: Sequence[Setting]) -> dict[str, list[float]]:
    """Negative log-likelihood of each window, mean over cells."""
    nll = [done[s]["nll"] for s in cells]
    return {c: [sum(x) / len(nll) for x in zip(*(n[c] for n in nll), strict=True)] for c in nll[0]}


def work(folder: Path, budget: float, flags: Sequence[str]) -> str:
    begun, done = time.monotonic(), read(folder)
    with opened(parse([*FLAGS, f"--run.dir={folder}", "--run.name=run", *flags])) as run:
        world = prepared(run)
        while time.monotonic() - begun < budget:
            s = next((s for s in wanted() if s not in done), None)
            if s is None:
                break
            start = time.monotonic()
            nll = measured(world, s)
            cell = {"setting": dataclasses.asdict(s), "nll": nll, "seconds": round(time.monotonic() - start, 1)}
            cell["tokens"] = run.text.test[0].tokens.shape[1] - 1
            write_json(folder / "cells" / s.file, cell)
            done[s] = cell
            over = ratio(done, s)[0]
            print(json.dumps({"cell": f"{s.windows} windows, seed {s.seed}, {s.name}", "over plain": round(over, 4),
                              "seconds": cell["seconds"]}), flush=True)  # fmt: skip
    return table(done)


def main() -> int:
    parser = Parser("python -m experiments.priors", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/priors"), help="where cells lie (runs/priors)")
    parser.add_argument("--budget", type=float, default=math.inf, help="begin no cell after so many seconds")
    parser.add_argument("--table", action="store_true", help="print what is there, and compute nothing")
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --")
    args = parser.parse_args()
    quiet()
    return guarded(
        "python -m experiments.priors",
        lambda: table(read(args.folder)) if args.table else work(args.folder, args.budget, args.flags),
    )


if __name__ == "__main__":
    sys.exit(main())
