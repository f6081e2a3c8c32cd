"""The documentation matches the code, and the recipes of docs/extend.md work."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import gprune
from gprune import user_code
from gprune.__main__ import COMMANDS
from gprune.calibration.statistics import Moments
from gprune.export.hf import save_pruned
from gprune.method import inputs
from gprune.method.plan import make_plan
from gprune.models.agreement import random_masks
from gprune.models.families import FAMILIES
from gprune.models.loading import load_model
from gprune.models.masks import masked
from gprune.models.surgery import slice_model
from gprune.models.units import UNITS
from gprune.recoveries import RECOVERY
from gprune.sparsity.allocation import ALLOCATION
from tests import tiny_run
from tests.stages.test_threshold_learning import make_stage, trainer_of
from tests.world import make_tiny, restored, some_masks

ROOT = Path(__file__).parent.parent
# Content by path
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (
    ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "experiments/README.md",
    *sorted((ROOT / "experiments/pages").glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))
)}  # fmt: skip
README = PAGES["README.md"]
RECIPES = PAGES["docs/extend.md"]
# Pages that describe only the current version
USER_PAGES = [name for name in PAGES if name != "CHANGELOG.md" and not name.startswith("experiments/")]


@pytest.fixture
def world(tmp_path):
    """Return a tiny model and tiny corpora, and use a cache of their own."""
    (tmp_path / "world").mkdir()
    with tiny_run.isolated(tmp_path / "cache"):
        yield tiny_run.make_world(tmp_path / "world")


@pytest.fixture(autouse=True)
def _restore_registries():
    """Restore registries after each test."""
    with restored(gprune.IMPORTANCE, gprune.CORPORA, ALLOCATION, RECOVERY):
        yield
    UNITS.clear()


def recipe(word: str) -> str:
    """Return the code block of docs/extend.md that contains `word`."""
    (block,) = [b for b in re.findall(r"^```python\n(.*?)^```", RECIPES, re.M | re.S) if word in b]
    return block


def run_recipe(word: str) -> dict[str, object]:
    """Execute the code block of docs/extend.md that contains `word`, and return its namespace."""
    namespace = {"__name__": "recipe"}
    exec(recipe(word), namespace)
    return namespace


# Pages and the code


@pytest.mark.parametrize("page", USER_PAGES)
def test_every_flag_on_a_page_exists(page):
    """The flags of docs/flags.md, and those of commands, scripts, and examples of registered functions."""
    flag = r"(?<![\w-])--[a-z][a-z0-9_-]*(?:\.[a-z0-9_]+)*"
    others = "--print_config --help --sparsity.options.power --work --fetch --small --reference "
    others += "--array --wrap --minutes --check --trust-remote-code --summary --json --name --root --private "
    others += "--write --clock --repeats --threads --width_multiple --batch_sizes --real --expect --stat --clones"
    others += " --no-deps --engine --prompt --batch --options.rescale.power --data --wheel --shares"
    text = re.sub(r"^#SBATCH.*", "", PAGES[page], flags=re.M)
    assert set(re.findall(flag, text)) <= {*re.findall(flag, PAGES["docs/flags.md"]), *others.split()}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_file_on_a_page_exists(page):
    """Checks modules, subcommands, and files below experiments/. A command "of commit ..." may be a removed one."""
    text = " ".join(PAGES[page].split())
    for module in re.findall(r"python -m ([a-z_.]+[a-z])\b(?![^`]*` of commit)", text):
        assert find_spec(module) or module in ("venv", "pip"), f"{page}: python -m {module}"
    for command in re.findall(r"`gprune ([a-z]+)", text):
        assert command in COMMANDS, f"{page}: gprune {command}"
    for path in re.findall(r"(?:--config|gprune study|wandb sweep) (experiments/[\w./]+)", text):
        assert (ROOT / path).is_file(), f"{page}: {path}"


@pytest.mark.parametrize("page", USER_PAGES)
def test_every_train_command_on_a_page_parses(page):
    """Parse the flags of every command with their values, except of commands with `--help` or "..."."""
    text = PAGES[page].replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)).splitlines()
    code_spans = re.findall(r"`([^`\n]+)`", text)
    commands = [line for line in [*blocks, *code_spans] if "python train.py --" in line]
    for line in commands:
        args = shlex.split(line.partition("python train.py ")[2], comments=True)
        if "--help" not in args and "..." not in line:
            gprune.config.parse(args)
    assert commands or page not in ("README.md", "docs/experiments.md", "docs/large_models.md")


def test_a_corpus_of_the_size_that_the_readme_names_is_enough_for_its_command():
    (command,) = re.findall(r"^python train\.py (--config trained --model\.name MODEL .*)$", README, re.M)
    cfg = gprune.config.parse(shlex.split(command))
    (sizes,) = re.findall(r"least (\d+)k tokens; below (\d+)k tokens training repeats", README)
    least, once = (0.7 * 1000 * int(number) for number in sizes)  # without 20 % of test and 10 % of development
    assert cfg.repeat == "auto"
    assert inputs.LEAST_TRAINING_TOKENS <= least < inputs.LEAST_TRAINING_TOKENS + 1000
    trained = len(cfg.corpora.recover) * cfg.fresh_windows * cfg.corpora.seq_len
    assert trained <= once < trained + 1000


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_an_existing_file_and_heading(page):
    def anchors(text: str) -> set[str]:
        heads = re.findall(r"^#+ (.*)$", text, re.M)
        return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}

    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
            assert file.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


def test_the_readme_has_at_most_1200_words_besides_its_tables_of_numbers():
    assert len(QUALITY.sub("", README).split()) <= 1200
    assert len(README.splitlines()) <= 190


CONFIGURATIONS = sorted((ROOT / "gprune/configs").glob("*.yaml"))
QUALITY = re.compile(r"<!-- python -m experiments.readme .*?-->.*?<!-- end of its output -->", re.DOTALL)
NUMBER, INTERVAL = r"(\d+\.\d\d+)", r"(\d+\.\d\d+) \[(\d+\.\d\d+), (\d+\.\d\d+)\]"


def blocks_with_numbers() -> list[str]:
    """Return paragraphs, items and rows of tables of the README, and headers of configurations, that have numbers.

    The README's table of quality and the output of its first command are left out.
    """
    text = re.sub(r"```text\n.*?```", "", QUALITY.sub("", README), flags=re.DOTALL)
    readme = re.split(r"\n\n|\n(?=- |\|)", text)
    headers = ["\n".join(re.findall("^# (.*)", path.read_text(), re.M)) for path in CONFIGURATIONS]
    blocks = [re.sub(r"(arXiv|Python) [\d.]+", "", " ".join(block.split())) for block in [*readme, *headers]]
    return [block for block in blocks if re.search(NUMBER, block)]


@pytest.mark.parametrize("block", blocks_with_numbers())
def test_every_number_of_quality_in_the_readme_and_configurations_is_on_a_page_that_is_named_beside_it(block):
    """Numbers may be rounded."""
    pages = re.findall(r"experiments/[\w/]+\.md", block)
    source = " ".join([*((ROOT / page).read_text(encoding="utf-8") for page in pages), *QUALITY.findall(README)])
    for pattern, text in ((INTERVAL, block), (NUMBER, re.sub(INTERVAL, "", block))):
        published = re.findall(pattern, source)
        for wanted in re.findall(pattern, text):
            assert any(is_rounded(given, wanted) for given in published), f"{wanted} is not on {pages}"


def test_every_configuration_begins_with_at_most_five_lines_and_its_command():
    for path in CONFIGURATIONS:
        header = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))[0]
        assert len(header.splitlines()) <= 5, path.name
        assert f"--config {path.stem}" in header, path.name


def is_rounded(published: str | tuple[str, ...], wanted: str | tuple[str, ...]) -> bool:
    """Return whether each wanted number is the published one, or rounds it."""
    pairs = [(published, wanted)] if isinstance(wanted, str) else zip(published, wanted, strict=True)
    return all(abs(float(a) - float(b)) <= 0.51 * 10 ** -len(b.partition(".")[2]) for a, b in pairs)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_set_no_absolute_step_size_for_distillation(path):
    """Step sizes are relative now. The value 1e-4 of older notebooks is a sixteenth of the default."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert not re.search(r"distill\.[^\n]*learning_rate[^\n]*1e-4", code)


def test_the_readme_links_all_notebooks_and_pages():
    for path in (*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "docs").glob("*.md")):
        assert f"]({path.relative_to(ROOT)})" in README, path


def test_the_extension_in_the_readme_is_a_recipe_of_extend_md():
    (block,) = [b for b in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S) if "@gprune" in b]
    assert block in RECIPES


def test_pages_import_public_names_from_gprune():
    for name, page in PAGES.items():
        for module, names in re.findall(r"^from (gprune\.[\w.]+) import ([\w, ]+)$", page, re.MULTILINE):
            public = {imported.strip() for imported in names.split(",")} & set(gprune.__all__)
            assert not public, f"{name}: import {public} from gprune, not from {module}"


def test_the_layers_in_architecture_md_are_those_of_the_import_contract():
    contract = re.findall(r"^layers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[0]
    rows = re.findall(r"^\| (`.*?) \|", PAGES["docs/architecture.md"], re.M)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert names == re.findall(r"\w+", contract)


def test_flags_md_is_the_output_of_its_script():
    assert PAGES["docs/flags.md"] == runpy.run_path(str(ROOT / "docs/flags.py"))["page"]()


def test_interfaces_md_is_the_output_of_its_script():
    assert PAGES["docs/interfaces.md"] == runpy.run_path(str(ROOT / "docs/interfaces.py"))["page"]()


def test_families_md_names_the_types_that_have_a_record():
    (names,) = re.findall(r"^The types (.*?) have a record", PAGES["docs/families.md"], re.M | re.S)
    assert re.findall(r"`(\w+)`", names) == list(FAMILIES)


def test_method_svg_is_the_output_of_its_script():
    picture = runpy.run_path(str(ROOT / "docs/method.py"))["picture"]()
    assert (ROOT / "docs/method.svg").read_text(encoding="utf-8") == picture


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_with_figures_in_small_files_without_errors_and_local_paths(path):
    text = path.read_text(encoding="utf-8")
    outputs = [out for cell in json.loads(text)["cells"] for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert not [out for out in outputs if out["output_type"] == "error" or out.get("name") == "stderr"]
    assert len(text) < 150_000
    assert not re.search(r"/(home|root|tmp|work)/", text)


def test_the_first_notebook_is_stored_with_three_figures_and_a_table():
    text = (ROOT / "notebooks/01_prune_and_look_inside.ipynb").read_text(encoding="utf-8")
    outputs = [out for cell in json.loads(text)["cells"] for out in cell.get("outputs", [])]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 3
    assert any("dense |" in "".join(out.get("data", {}).get("text/markdown", [])) for out in outputs)


# Recipes of docs/extend.md


def test_the_recipe_for_a_corpus_loads_disjoint_splits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"poems.{split}.txt").write_text("\n\n".join(f"{split} poem {i}" for i in range(20)))
    run_recipe("@gprune.CORPORA")
    train, development = (gprune.corpora.load_corpus("poems", split) for split in ("train", "development"))
    assert len(train) == 18
    assert len(development) == 2
    assert not set(train) & set(development)


def test_the_recipes_for_a_metric_and_an_allocation_run_through_the_command_line(world, tmp_path):
    run_recipe("@gprune.metric")
    run_recipe("@gprune.allocation")
    run = world.run(
        tmp_path, "--importance=down_norm", "--gprune=false", "--sparsity.allocation=powered",
        "--sparsity.options.power=2", "--export=none",
    )  # fmt: skip
    assert gprune.IMPORTANCE[run.config.importance].activation_free
    norms = torch.stack([
        layer.mlp.down_proj.weight.double().square().sum(0).sqrt()  # one per neuron
        for layer in load_model(str(world.model))[0].model.layers
    ])  # fmt: skip
    kept = torch.zeros(norms.numel(), dtype=torch.bool)
    kept[norms.flatten().argsort(descending=True)[: norms.numel() // 2]] = True  # the largest half of the whole model
    assert torch.equal(torch.stack(run.masks.ffn), kept.view_as(norms))


def test_the_recipe_for_a_recovery_of_a_projection_rescales_the_weight():
    run_recipe('recovery("rescale")')
    assert gprune.RunConfig(recovery="rescale").recovery == "rescale"
    four = torch.full((4,), 4.0, dtype=torch.float64)
    moments = Moments(four[0], four, four)
    weight, bias = RECOVERY["rescale"].solve(torch.ones(2, 4), torch.tensor([True, False, False, False]), moments)
    # The kept input has a quarter of the energy of all inputs, so the factor is the root of 4.
    assert weight.tolist() == [[2.0], [2.0]]
    assert bias is None


def test_the_recipe_for_another_optimizer_is_a_learner_with_an_argument(tiny_model, monkeypatch):
    module = run_recipe("class Sgd(ThresholdLearning)")
    monkeypatch.setitem(sys.modules, "my_stages", SimpleNamespace(**module))
    learner = gprune.config.parse(["--stages=my_stages"]).user_stage("learner")
    default = make_stage(tiny_model, lr=0.25)
    stage = learner(tiny_model, default.ranks, default.thresholds, default.budget, learning_rate=0.25)
    (group,) = stage.configure_optimizers().param_groups
    assert (group["momentum"], group["lr"], len(group["params"])) == (0.5, 0.25, 3)


def test_the_recipe_for_another_objective_refines_the_modules_of_a_run(world, tmp_path, monkeypatch):
    (tmp_path / "my_objective.py").write_text(recipe("class Even(AssignmentRefinement)"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(user_code, "IMPORTED", [])
    flags = ["--partition.learning_rate=0.5", "--export=none"]
    default = world.run(tmp_path, *flags, name="default")
    changed = world.run(tmp_path, *flags, "--import=my_objective", "--stages=my_objective", name="changed")
    curves = ["\n".join(file.read_text() for file in run.path.glob("csv/*/metrics.csv")) for run in (default, changed)]
    assert ["partition/largest" in text for text in curves] == [False, True]
    assert not all(map(torch.equal, default.modules.labels, changed.modules.labels))


@pytest.mark.filterwarnings("ignore:.*in eval mode")  # of Lightning, which the command line keeps quiet
def test_the_recipe_for_a_plain_learner_reduces_the_loss_at_the_budget(tiny_model):
    default = make_stage(tiny_model)
    stage = run_recipe("class Plain(L.LightningModule)")["Plain"](
        tiny_model, default.ranks, default.thresholds, default.budget, learning_rate=0.5
    )
    ids, start = torch.arange(4, 68).view(2, 32), stage.masks(default.budget)
    trainer_of().fit(stage, batches(ids, 1.0, 1.0, times=8))
    learned = stage.masks(default.budget)
    assert default.budget.removed_by(learned) == default.budget.removed_by(start)
    with torch.no_grad():
        losses = []
        for masks in (start, learned):
            with masked(tiny_model, masks):
                losses.append(float(tiny_model(ids, labels=ids).loss))
    assert losses[1] < losses[0]


def test_the_recipe_for_a_plain_learner_is_a_learner_of_a_run(world, tmp_path, monkeypatch):
    (tmp_path / "my_stages.py").write_text(recipe("class Plain(L.LightningModule)") + "\n\nlearner = Plain\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(user_code, "IMPORTED", [])
    flags = ["--import=my_stages", "--stages=my_stages", "--sparsity.learning_rate=1"]
    run = world.run(tmp_path, *flags, "--export=none", "--evaluation.before_recovery=false")
    assert run.summary["sparsity_of_scope"] == 0.5
    assert run.thresholds is None  # the class has no attribute `thresholds`, so its masks are stored


def batches(ids, *weights, times=1):
    """Return a loader that yields the same batch `times` times, with a weight for each window."""
    return DataLoader([{"input_ids": ids, "weight": torch.tensor(weights)}] * times, batch_size=None)


@pytest.mark.filterwarnings("ignore:.*in eval mode")  # of Lightning, which the command line keeps quiet
def test_the_recipe_for_a_stage_reduces_the_loss_and_ignores_windows_with_weight_0(world):
    Distillation = run_recipe('recovery("distil")')["Distillation"]
    dense = load_model(str(world.model))[0]
    ids = torch.arange(4, 68).view(2, 32)
    masks = some_masks(dense, attention=False)
    stage = Distillation(dense, slice_model(dense, masks))
    assert {name.partition(".")[0] for name in stage.state_dict()} == {"student"}  # without the dense model
    losses = []
    callback = LambdaCallback(on_train_batch_end=lambda *_: losses.append(stage.last_loss))
    trainer_of(callback).fit(stage, batches(ids, 1.0, 1.0, times=4))
    assert losses == sorted(losses, reverse=True)
    first_loss = losses[0]
    ids[1] = 5  # another second window, with weight 0 below
    stage.student = slice_model(dense, masks).requires_grad_()
    trainer_of(callback).fit(stage, batches(ids, 1.0, 0.0))
    alone = Distillation(dense, slice_model(dense, masks))
    trainer_of().fit(alone, batches(ids[:1], 1.0))
    assert losses[-1] == pytest.approx(alone.last_loss) != first_loss


@pytest.mark.filterwarnings("ignore:.*in eval mode")  # of Lightning, which the command line keeps quiet
def test_the_recipe_for_a_stage_recovers_the_whole_model_in_a_run_with_the_planned_tokens(world, tmp_path):
    run_recipe('recovery("distil")')
    dense = load_model(str(world.model))[0]
    flags = world.args(
        tmp_path, "--gprune=false", "--recovery=distil", "--sparsity.protect=[0]", "--evaluation.before_recovery=false",
        "--distill.tokens=1536",
    )  # fmt: skip
    planned = make_plan(gprune.config.parse(flags)).tokens
    assert sum(trained for _, trained in planned.values()) == 1536
    assert tiny_run.main(flags) == 0
    run = gprune.load_run(tmp_path / "run")
    before, after = (model.model.layers[0].mlp.down_proj.weight for model in (dense, run.model))
    assert before.shape == after.shape  # of a protected block, which only distillation changes
    assert not torch.equal(before, after)
    assert {r["recovery"] for r in run.records if r["stage"] == "recovered"} == {"distil"}
    assert run.summary["forward_backward_tokens"] == 3 * 16 * 32  # corpora, windows, tokens
    assert run.summary["forward_tokens"] <= sum(forward for forward, _ in planned.values())


def test_the_recipe_for_a_type_prunes_and_reloads(tmp_path):
    run_recipe('UNITS["starcoder2"]')
    ids = torch.arange(3, 35).view(2, 16)
    model = make_tiny("starcoder2")
    masks = random_masks(model, scope="ffn")
    pruned = slice_model(model, masks)
    with masked(model, masks):
        torch.testing.assert_close(pruned(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    reloaded = AutoModelForCausalLM.from_pretrained(save_pruned(pruned, None, tmp_path / "model"))
    assert torch.equal(reloaded(ids).logits, pruned(ids).logits)


def test_the_recipe_for_a_callback_logs_a_curve(world, tmp_path):
    callback = run_recipe("L.Callback")["Thresholds"]()
    cfg = gprune.config.parse(world.args(tmp_path, "--export=none", "--evaluation.before_recovery=false"))
    (curves,) = gprune.prune(cfg, callbacks=[callback]).path.glob("csv/*/metrics.csv")
    assert len(callback.spread) == 2  # steps: one epoch of two batches
    assert re.search(r"^(.*,)?learn/(gprune/)?spread", curves.read_text())
