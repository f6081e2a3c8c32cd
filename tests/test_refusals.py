"""What is refused, as tables of commands and parts of the message: exit code 2, one line, and nothing is written."""

from __future__ import annotations

import importlib
import json
import re
import shlex

import pytest
import torch
from transformers import GPT2Config

from experiments.architectures import default_config
from gprune.__main__ import main as gprune_main
from gprune.config import config_from_mapping
from gprune.discovery.tiny import shrunk
from gprune.errors import UserError
from tests import tiny_run

PRECISION = "--trainer.precision must be 'auto', '32-true' or 'bf16-mixed'"
CHAIN = "--recovery must be a chain such as [least_squares,distill]; got "
REFUSED = [
    ({"recovery": "leastsquares"}, "Unknown recovery 'leastsquares'. Did you mean 'least_squares'?"),
    ({"corpora.drift": ["wiki"], "reliability.everywhere": True},
     "--reliability.everywhere true needs two or more --corpora.drift; got ['wiki']"),
    ({"corpora.drift": ["wiki"], "partition.method": "drift_only"}, "--partition.method drift_only needs two"),
    ({"sparsity.allocation": "bas"}, "Unknown allocation 'bas'. Available: learned, equal, uniform, global"),
    ({"sparsity.start": "equal"}, "--sparsity.start must be an allocation by blocks such as uniform; got 'equa"),
    ({"sparsity": {"allocation": "owl", "options": {"spread": -0.1}}},
     "--sparsity.options.spread must be 0 or more; got -0.1"),
    ({"sparsity.start": "owl", "sparsity.options.multiple": 0.5},
     "--sparsity.options.multiple must be 1 or more; got 0.5"),
    ({"sparsity": {"allocation": "owl", "options": {"multiples": 5}}},
     "--sparsity.options must name options of 'owl' (multiple, spread); got 'multiples'"),
    ({"sparsity.options.spread": 0.1}, "--sparsity.options must name options of 'uniform' (none); got 'spread'"),
    ({"sparsity": {"uniform_width": True, "allocation": "reconstruction"}},
     "--sparsity.uniform_width true needs --sparsity.allocation uniform, because all blocks lose equally much; got "
     "reconstruction."),
    ({"sparsity": {"uniform_width": True, "start": "owl"}}, "--sparsity.uniform_width true needs --sparsity.start"),
    ({"sparsity": {"cost": "seconds"}, "trainer.devices": 2},
     "--sparsity.cost seconds cannot be combined with 2 processes"),
    ({"export": "onnx"}, "--export.format must be 'hf', 'gguf', 'nemotron-nas' or 'none'; got 'onnx'."),
    ({"sparsity.width_multiple": "defalt"},
     "--sparsity.width_multiple must be a whole number or default; got 'defalt'."),
    ({"sparsity.width_multiple": 0}, "--sparsity.width_multiple must be 1 or more; got 0"),
    ({"sparsity.width_multiple": None}, "--sparsity.width_multiple must be a whole number or default; got null."),
    ({"model.max_memory": {"cpu": "2GiB"}}, "--model.max_memory needs --model.device_map auto"),
    ({"model": {"device_map": "auto", "max_memory": {"cpu": "lots"}}},
     "--model.max_memory.cpu must be a size such as 2GiB or 500MB; got 'lots'"),
    ({"model": {"device_map": "auto", "max_memory": {"cpu": "0GB"}}},
     "--model.max_memory.cpu must be more than 0; got '0GB'"),
    ({"model": {"device_map": "auto", "max_memory": {"disk": "2GB"}}}, "--model.max_memory"),
    ({"model.device_map": "auto", "trainer.devices": 2}, "--model.device_map auto needs one process"),
    ({"sparsity.cost": "parametres"},
     "Unknown cost 'parametres'. Did you mean 'parameters'? Available: parameters, kv_cache"),
    ({"corpora.drift": []}, "--corpora.drift must name at least one corpus"),
    ({"corpora.evaluate": ["wiki", "wiki"]}, "--corpora.evaluate must name each corpus once; got ['wiki', 'wiki']"),
    ({"reliability.metric": "wifv"}, "--reliability.metric must be an activation-free metric (magnitude,"),
    ({"model.dtype": "float16"}, "--model.dtype must be bfloat16 or float32 for --sparsity.allocation learned"),
    ({"run.name": "../x"}, "--run.name must be a folder name of at most 200 bytes; got '../x'"),
    ({"evaluation.split": "development", "sparsity.target": "+5%"},
     "--sparsity.target +5% cannot be combined with --evaluation.split development"),
    ({"stages": "not_there"}, "--stages must be a module of --import; got 'not_there'. Add --import not_there."),
    ({"stages": "json"}, "--stages must be a module that sets calibrator, refiner, learner, or some of them; got"),
    ({"options.soft_assignment.tau": 1}, "--options must name recoveries that the run uses"),
    ({"options": {"x": 1}}, "--options.x must be a mapping of names to values; got 1."),
    ({"sparsity": {"target": "9KiB", "cost": "kv_cache"}},
     "--sparsity.target 9KiB cannot be combined with --sparsity.cost kv_cache"),
    ({"sparsity": {"target": "9M", "cost": "bytes"}},
     "--sparsity.target 9M cannot be combined with --sparsity.cost bytes"),
    ({"distill.kl": 0}, "--distill.kl or --distill.cross_entropy must be more than 0"),
    ({"distill": {"learning_rate": 0.01, "absolute_learning_rate": 5e-4}},
     "--distill.absolute_learning_rate cannot be combined with --distill.learning_rate"),
    ({"recovery": ["least_squares", "distill"], "distill.tokens": 100}, "--distill.tokens must be 768 or more"),
    ({"recovery": ["distill", "least_squares"]}, f"{CHAIN}distill+least_squares ('least_squares' goes block"),
    ({"recovery": ["bias", "least_squares"]}, f"{CHAIN}bias+least_squares ('least_squares' goes block"),
    ({"recovery": ["distill", "distill"]}, f"{CHAIN}distill+distill (each once"),
    ({"recovery": ["none", "distill"]}, f"{CHAIN}none+distill (each once, and no 'none'"),
    ({"recovery": ["least_squares", "heal"]}, "Unknown recovery 'heal'"),
    ({"evaluation.prompts": ["a", ""]}, "--evaluation.prompts[1] must have at least 1 character; got ''."),
    ({"corpora.score": []}, "--corpora.score must name at least one corpus; got an empty list"),
    ({"corpora.score": ["wiki", "wiki"]}, "--corpora.score must name each corpus once"),
    *(({"trainer.precision": precision}, f"{PRECISION}; got {precision!r}.")
      for precision in ("bf16-true", "16-mixed", 16, "64-true")),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_invalid_or_incompatible_settings_are_refused_with_the_reason(settings, message):
    with pytest.raises(UserError, match="^" + re.escape(f"Row 'x': {message}")) as error:
        config_from_mapping(settings, where="Row 'x'")
    assert "\n" not in str(error.value)


# --- commands

TRAIN = [  # flags of a tiny run, parts of the message
    ("--corpora.score=wikki", "'wikki'", "wiki"),
    ("--corpora.score=/nowhere/a.txt", "/nowhere/a.txt", "no such file"),
    ("--corpora.score=~nobodyhere/a.txt", "~nobodyhere/a.txt", "no such file"),
    ("--corpora.score={tmp}/empty.txt", "no text"),
    ("--corpora.learn_samples=100000", "alpha.txt", "must have 100000 windows"),
    ("--evaluation.num_samples=100000", "alpha.txt", "must have 100000 windows"),
    ("--evaluation.num_samples=100000 --dry_run=true", "alpha.txt", "must have 100000 windows"),
    ("--recovery=distill --distill.tokens=960000", "--distill.repeat true"),
    ("--corpora.text={tmp}/short.txt --recovery=distill --distill.tokens=960000",
     "must have 8,192 tokens to train on; got 6,"),
    ("--model.name=smollm3", "model.name", "'smollm3'", "smollm2-135m"),
    ("--model.name=/nowhere/model", "model.name", "/nowhere/model"),
    ("--model.name=~nobodyhere/model", "model.name", "~nobodyhere/model"),
    ("--sparsity.target=half", "sparsity.target", "half"),
    ("--sparsity.target=0.999", "sparsity.target", "0.999", "at most"),
    ("--sparsity.target", "sparsity.target: expected one argument. A value that begins with - needs =", "--help"),
    ("--sparsity=3", "sparsity", "3"),
    ("--nonsense=1", "nonsense", "model, "),
    ("--sparsity.width_multiple=161", "sparsity.width_multiple", "160", "161"),
    ("--sparsity.allocation=depth", "Unknown allocation 'depth'. Available: "),
    ("--sparsity.protect=[0,3]", "sparsity.protect", "from -3 to 2", "got 3"),
    ("--sparsity.protect=[0,-1]", "sparsity.target", "2 layers keep everything", "at most 0.33"),
    ("--reliability.everywhere=true --reliability.switch=false", "reliability.everywhere", "reliability.switch"),
    ("--trainer.strategy=nonsense", "trainer", "'nonsense'"),
    ("--trainer.max_stps=3", "Unknown setting 'trainer.max_stps'. Did you mean 'max_steps'?"),
    ("--trainer.devces=2", "Unknown setting 'trainer.devces'. Did you mean 'devices'?"),
    ("--trainer.max_steps=many", "--trainer.max_steps must be int; got 'many'"),
    ("--trainer.gradient_clip_val=[1]", "--trainer.gradient_clip_val must be Union[int, float, NoneType]; got [1]"),
    ("--trainer.profiler=nonsense", "profiler 'nonsense'", "['simple', 'advanced', 'pytorch', 'xla']"),
    ("--trainer.max_epochs=3", "Setting 'trainer.max_epochs' cannot be changed. Use --sparsity.epochs"),
    ("--trainer.accumulate_grad_batches=2", "cannot be changed. Use --distill.accumulate"),
    ("--trainer.use_distributed_sampler=false", "'trainer.use_distributed_sampler' cannot be changed"),
    ("--trainer.barebones=true", "'trainer.barebones' cannot be changed"),
    ("--trainer.accelerator=abacus", "trainer", "'abacus'"),
    ("--run.name=/tmp/elsewhere", "run.name"),
    ("--run.name=..", "run.name"),
    ("--run.dir={tmp}/empty.txt", "{tmp}/empty.txt", "--run.dir"),  # a file in place of a folder
    ("--run.dir=/proc/nowhere", "/proc/nowhere", "--run.dir"),  # a folder that cannot be written
    ("--sparsity.target=+0%", "sparsity.target", "got '+0%'"),
    ("--sparsity.target=-5%", "sparsity.target", "got '-5%'"),
    ("--sparsity.target=+5", "sparsity.target", "got 5"),
    ("--sparsity.target=+1e9%", "sparsity.target", "got '+1e9%'"),
    ("--sparsity.target=+1001%", "sparsity.target", "got '+1001%'"),
    ("--sparsity.target=[+5%,1.4x]", "sparsity.target", "got ['+5%', '1.4x']"),
    ("--sparsity.target=+5% --evaluation.development_samples=1", "two or more --evaluation.development_samples"),
    ("--trainer.callbacks=[{class_path:", "--trainer.callbacks must be valid YAML; got '[{class_path:' ("),
    ("--trainer.val_check_interval=99", "val_check_interval must be 2 or less, the batches in an epoch"),
    ("--trainer.val_check_interval=1.5", "--trainer.val_check_interval must be a number of batches, or a share"),
    ("--trainer.val_check_interval=0", "--trainer.val_check_interval must be more than 0"),
]  # fmt: skip
CALLBACKS = [  # class path, arguments, a part of the message
    ("lightning.pytorch.callbacks.EarlyStoping", {}, "'EarlyStoping'. The closest name is 'EarlyStopping'."),
    ("made_up_package.Thing", {}, "module 'made_up_package' is not imported. Add --import made_up_package."),
    ("mpl_toolkits.evil.A", {}, "module 'mpl_toolkits.evil' is not imported. Add --import mpl_toolkits.evil."),
    ("unittest.__main__.A", {}, "module 'unittest.__main__' is not imported"),
    ("numpy.f2py.__main__.A", {}, "module 'numpy.f2py.__main__' is not imported"),
    ("torch.nn.Linear", {}, "torch.nn.Linear must be a subclass of lightning.pytorch.Callback"),
    ("EarlyStopping", {}, "EarlyStopping: init_args.monitor must be given."),
    ("EarlyStopping", {"monitor": "x", "patience": "many"}, "init_args.patience must be a valid integer"),
    ("EarlyStopping", {"monitor": "x", "patient": 1}, "init_args.patient must not be given (no such argument)"),
    ("EarlyStopping", {"monitor": "x", "mode": "up"}, "MisconfigurationException: `mode` can be min, max, got up"),
    ("Timer", {"interval": "minute"}, "Timer"),
    ("RichProgressBar", {}, "found `RichProgressBar` in callbacks list"),
]  # fmt: skip
COMMANDS = [  # words after `gprune`, parts of the message
    ("", "the following arguments are required: command. See --help."),
    ("exprot", "invalid choice: 'exprot' (choose from ", "study"),
    *((f"{name} x --colour red", f"{name}: Cannot read the command line: unrecognized arguments: --colour red. See --")
      for name in ("report", "export", "evaluate", "study")),
    ("report a --outptu x", "--outptu x. Did you mean --output? See --help."),
    ("evaluate m --task piqa", "--task piqa. Did you mean --tasks? See --help."),
    ("report a --seeds 0 x", '"seeds" element 2: Expected a whole number. Got value: x. See --help.'),
    ("prune --sparsity.target", "--sparsity.target: expected one argument. A value that begins with - needs ="),
    ("prune --config smoke --model.name=nothing", "gprune prune: --model.name", "'nothing'"),
    ("prune --colour red", "gprune prune: --colour: Unknown setting 'colour'"),
    ("evaluate", "required: model"),
    ("evaluate {run} --tasks ,", "--tasks must have at least 1 item"),
    ("evaluate {run} --limit 0", "--limit must be 1 or more"),
    ("evaluate {run} --dtype int8", "--dtype must be 'float32', 'bfloat16' or 'float16'; got 'int8'."),
    ("evaluate {run} --seq_len 32,many", "--seq_len[1] must be a valid integer"),
    ("evaluate {run} --seq_len 32,1", "--seq_len[1] must be 2 or more"),
    ("evaluate {run} --engine vllm", "unrecognized arguments: --engine vllm. See --help."),
    ("evaluate {run} --tasks wikitext2 --seq_len 99999", "--seq_len must be from 2 to"),
    ("evaluate {run} --tasks wikitext2 --max_memory '{cpu: 2GiB}'", "--max_memory needs --device_map auto."),
    ("evaluate {run} --tasks wikitext2 --device_map auto --max_memory lots",
     "--max_memory must be a mapping of names to values; got 'lots'"),
    ("evaluate {run} --tasks wikitext2 --device_map auto --max_memory '{cpu: x}'",
     "--max_memory.cpu must be a size such as 2GiB or 500MB"),
    ("evaluate {run} --tasks wikitext2 --output {tmp}/manifest.json", "Cannot read records of gprune evaluate"),
    ("evaluate {run}/model --tasks wikitext2 --dense", "--dense needs the folder of a run"),
    ("evaluate {tmp} --tasks wikitext2", "not a gprune run"),
    ("evaluate {tmp}/empty --tasks wikitext2", "must be a run (manifest.json) or a model folder"),
    ("evaluate {tmp}/nowhere --tasks wikitext2", "nowhere' must be the folder of a run or a model; "),
    ("study {list} --only ours nobody", "--only", "plain, ours, other", "'nobody'"),
    ("study {list} --part 0/2", "--part", "'0/2'"),
    ("study {list} --part 3/2", "--part", "'3/2'"),
    ("study {list} --part half", "--part", "'half'"),
    ("study {list} --part 1/2/3", "--part", "'1/2/3'"),
    ("study {list} -- --sparsity.target=0", "Row 'plain'", "sparsity.target"),
    ("study {list} -- --run.seed=1", "row 'plain': --run.seed cannot be set in a study. Use the key `seeds`, or --see"),
    ("study {list} -- --config={tmp}/seed.yaml", "row 'plain': --run.seed cannot be set in a study. Use the key `see"),
    ("study {tmp}/nowhere.yaml", "nowhere.yaml"),
    ("study {list} --output {tmp}/t.xlsx", "--output must end in one of .csv, .json, .md, .tex, .html; got", "t.xlsx"),
    ("study {list} --output {tmp}/t", "--output must end in one of"),
    ("study {list} --output {tmp}/folder.csv", "--output must be the path of a file in a folder; got ", "folder.csv'."),
    ("study {list} {list} --output {tmp}/t.csv", "one list; got 2 lists"),
    ("study {list} --table --output {tmp}/t.csv", "none yet"),
    ("study {list} --records {tmp}/empty.txt", "Cannot write {tmp}/empty.txt", "--records"),
    ("report", "See --help"),
    ("report {tmp}/nowhere", "there is no folder"),
    ("report {run} --output {tmp}/empty.txt", "Cannot write"),
    ("report {run} --output a --html b", "cannot be combined"),
    ("report {list}:mine", "got 'mine'"),
    ("report {tmp}/no.yaml:mine", "Cannot read list: there is no file"),
    ("report {tmp}/no.json", "Cannot read record: there is no file"),
    ("report {list}:plain --seeds 77", "must have records; got none"),
]  # fmt: skip
DENSE = "common: {model.name: '{run}/model'}\n"
SCRIPTS = [  # module of experiments and its arguments, a part of the message
    ("bench.__main__ inference --repeats 0", "--repeats must be 1 or more; got 0."),
    ("bench.__main__ inference --width_multiple 0", "--width_multiple must be 1 or more; got 0."),
    ("bench.__main__ inference --batch_sizes 0", "--batch_sizes must be 1 or more"),
    ("bench.__main__ inference --device abacus", "--device must be an available device, such as cpu or cuda"),
    ("bench.__main__ inference --sparsity 1.5 --model tiny", "--sparsity.target must be a share of the scope"),
    ("bench.__main__ inference --model nowhere", "--model.name must be an embedded model"),
    ("bench.__main__ run --clock cpu", "'run' cannot have --clock cpu"),
    ("bench.__main__ learning --small -- --recovery none", "'learning' cannot have flags of train.py after --"),
    ("engines {run}/model --engine vlm", "Unknown engine 'vlm'. Available: transformers, vllm, llama.cpp."),
    (
        "engines {run}/model --engine llama.cpp:q5",
        "Unknown form 'q5' of models for llama.cpp. Available: f16, f32, q8_0, q4_k_m.",
    ),
    (
        "engines {run}/model --engine transformers=/nowhere/python",
        "must be the Python of an environment; got '/nowhere/python'.",
    ),
    ("engines {run}/model --prompt 300 --engine transformers", "tokens or less; got 300."),
    ("engines {run}/model --batch 1,0", "--batch must be whole numbers of 1 or more; got '1,0'."),
    ("same_bits.__main__ HEAD --only reconstrution", "--only must name configurations (default; paper;"),
    ("stability", "required: list"),
    ("stability --pair x.yaml", "--pair"),
    ("stability no/such.yaml --pairs", "no/such.yaml"),
    ("tokens {tmp}/plain.yaml", "needs records of rows that learn"),
    ("groups {tmp}/plain.yaml", "needs records of rows that are evaluated on all kinds of experiments"),
]
LISTS = [  # content of a list, parts of the message
    ("rows: {a: {}}\nrow: 1\n", "row must not be given (no such key)", "got 1"),
    ("about: nothing\n", "rows must be given"),
    ("- rows\n", "must be a mapping"),
    ("rows: [", "YAML", "bad.yaml", "line 1"),
    ("rows: {a: {}}\n1: {}\n", "[1] must be strings; got 1."),
    ("rows: {a: 3}\n", "rows.a", "got 3"),
    ("rows: {1: {}, '1': {}}\n", "bad.yaml", "different letters or digits", "got '1'"),
    ('rows: {"a\\nb": {}}\n', "rows", "must match pattern", r"'a\nb'"),
    # settings
    ("rows: {a: {sparsity.target: 2}}\n", "Row 'a'", "sparsity.target", "got 2"),
    ("rows: {a: {sparsity.aim: 0.2}}\n", "row 'a'", "sparsity.aim"),
    ("rows: {a: {config: nowhere.yaml}}\n", "nowhere.yaml"),
    ("rows: {a: {config: 5}}\n", "rows.a.config", "got 5"),
    ("protocol: nowhere.yaml\nrows: {a: {}}\n", "nowhere.yaml"),
    ("rows: {a: {model: '{name: x/y, trust_remote_code: true}'}}\n", "row 'a'", "model must be a mapping"),
    # settings that a list cannot contain
    ("rows: {a: {run.seed: 5}}\n", "row 'a'", "--seeds", "--run.seed cannot be set"),
    ("rows: {a: {}, b: {}}\ncommon: {run: {name: x}}\n", "row 'a'", "--run.name cannot be set in a study"),
    ("rows: {a: {dry_run: true}}\n", "--dry_run cannot be set in a study"),
    ("rows: {a: {model: {trust_remote_code: true}}}\n", "row 'a'", "must be given after --"),
    # rows that do not exist
    ("rows: {a: {}}\ncompare: [[a, b]]\n", "compare", "(a)", "'b'"),
    # types
    ("rows: {a: {}}\ncommon: [x]\n", "common", "['x']"),
    ("rows: {a: {}}\nseeds: [a]\n", "seeds[0]", "a valid integer", "'a'"),
    ("rows: {a: {}}\ntables: [perplexities]\n", "tables[0]", "'summary'", "got 'perplexities'"),
    ("rows: {a: {}}\ncompare: [[a]]\n", "compare[0]", "2 items"),
    ("rows: {a: {}}\ntasks: {names: []}\n", "--tasks", "at least 1"),
    ("rows: {a: {}}\ntasks: {names: [piqa], limt: 100}\n", "--limt", "100"),
    ("rows: {a: {}}\ncommon: {trainer.devices: 2}\ntasks: {names: [piqa]}\n", "must have one process for tasks; got 2"),
    # models made elsewhere
    (f"{DENSE}rows: {{a: {{model: '{{tmp}}/nowhere'}}}}\n", "nowhere"),
    (f"{DENSE}rows: {{a: {{model: '{{tmp}}'}}}}\n", "The model made elsewhere must be a model folder, such as"),
    (f"{DENSE}rows: {{a: {{model: '{{run}}/model', recovery: distill}}}}\n",
     "needs --recovery none; got distill. Distil it with `python -m experiments.distil`"),
    (f"{DENSE}rows: {{a: {{model: '{{run}}/model', trainer.devices: 2}}}}\n", "needs one process"),
    ("rows: {a: {model.made_elsewhere: 3}}\n", "Use gprune.measure in Python, or a row `model: FOLDER`"),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(world, tmp_path_factory):
    """Return the folders and files that tables name in braces, in an isolated environment."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "manifest.json").write_text('{"settings": {}}')
    (folder / "empty.txt").touch()
    (folder / "seed.yaml").write_text("run: {seed: 7}")
    (folder / "plain.yaml").write_text("common: {gprune: false, recovery: none}\nrows: {base: {}}\n")
    (folder / "list.yaml").write_text("rows: {plain: {gprune: false}, ours: {}, other: {sparsity.epochs: 2}}")
    for name in ("empty", "folder.csv"):
        (folder / name).mkdir()
    tiny_run.write_corpus(folder / "short.txt", seed=0, documents=15)
    with tiny_run.isolated(folder / "cache"), pytest.MonkeyPatch.context() as patch:
        run = world.run(folder / "runs", "--sparsity.allocation=uniform").path
        patch.setattr("gprune.method.run.load_dense", lambda *_: pytest.fail("weights were loaded"))
        yield {"{tmp}": str(folder), "{run}": str(run), "{list}": str(folder / "list.yaml")}


@pytest.fixture
def refusals(places, capfd):
    """Return a function that runs (command, call, parts of the message), and returns those that are not refused so."""

    def filled(text: str) -> str:
        for place, path in places.items():
            text = text.replace(place, path)
        return text

    def run(rows) -> list[str]:
        wrong = []
        for text, call, parts in rows:
            capfd.readouterr()
            code = call(filled(text))
            out, err = capfd.readouterr()
            if (
                code != 2
                or err.count("\n") != 1
                or not all(filled(part) in err for part in parts)
                or "Traceback" in out
            ):
                wrong.append(f"{text}: {code}, {err}")
        return wrong

    return run


def test_flags_of_a_run_are_refused_before_weights_are_loaded(refusals, world, tmp_path):
    def train(flags):
        return tiny_run.main(world.args(tmp_path / "runs", *shlex.split(flags)))

    rows = [(flags, train, ["train.py: ", *parts]) for flags, *parts in TRAIN]
    if not torch.cuda.is_available():
        rows.append(("--trainer.accelerator=gpu", train, ["gpu"]))
    for path, arguments, part in CALLBACKS:
        value = json.dumps([{"class_path": path, "init_args": arguments}])
        rows.append((shlex.quote(f"--trainer.callbacks={value}"), train, [part]))
    assert refusals(rows) == []
    assert not (tmp_path / "runs").exists()


def test_commands_are_refused_with_the_remedy(refusals, places):
    rows = [(line, lambda text: gprune_main(shlex.split(text)), ["gprune", *parts]) for line, *parts in COMMANDS]
    assert refusals(rows) == []
    with open(f"{places['{tmp}']}/manifest.json") as file:
        assert file.read() == '{"settings": {}}'


def test_scripts_are_refused_with_the_remedy(refusals):
    def script(text):
        module, *arguments = shlex.split(text)
        return importlib.import_module(f"experiments.{module}").main(arguments)

    assert refusals([(text, script, [part]) for text, part in SCRIPTS]) == []


def test_lists_are_refused_before_a_row_runs(refusals, tmp_path, monkeypatch):
    monkeypatch.setattr("gprune.benchmarks.measurement.load_tasks", lambda *_: ({}, {}))  # takes seconds

    def study(content):
        (tmp_path / "bad.yaml").write_text(content)
        return gprune_main(["study", str(tmp_path / "bad.yaml"), "--records", str(tmp_path / "records")])

    assert refusals([(content, study, ["gprune study: ", *parts]) for content, *parts in LISTS]) == []
    assert [path.name for path in tmp_path.rglob("*.*")] == ["bad.yaml"]


# --- flags that are refused with the model, before its weights are loaded

GGUF = "--export=gguf"
UNTIED = {"tie_word_embeddings": False}
IN_GPT2 = UNTIED | {"text_config": shrunk(GPT2Config(**UNTIED)).to_dict()}
BLOCKS = ["--sparsity.scope=ffn+blocks", "--sparsity.block_share=1", "--gprune=false", "--sparsity.target=0.4"]
BY_MODEL = [  # model type, other entries of its config, flags, a part of the message
    ("mixtral", {}, ["--recovery=bias"], "--recovery bias cannot recover experts"),
    ("mixtral", {}, ["--importance=taylor"], "Taylor saliency cannot be collected for experts"),
    ("opt", {}, ["--corpora.seq_len=129"], "must be at most 128 tokens"),
    ("gpt2", {}, ["--corpora.seq_len=129"], "must be at most 128 tokens"),
    ("llava", IN_GPT2, ["--corpora.seq_len=129"], "must be at most 128 tokens"),  # those of its text model
    ("qwen3_next", {}, BLOCKS, "must name a layer with attention of model type 'qwen3_next'"),
    ("roberta", {}, [],
     "Cannot measure the perplexity of model type 'roberta': its logits are not the product of hidden"),
    ("blt", {}, [], "Cannot measure the perplexity of model type 'blt': its config has no hidden_size."),
    ("gpt_neox_japanese", {}, ["--recovery=distill", "--distill.checkpointing=true"],
     "--distill.checkpointing must be false"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, [], "got a quantised checkpoint (gptq)"),
    ("gemma", {"quantization_config": {"quant_method": "bitnet"}}, [], "got a quantised checkpoint (bitnet)"),
    ("llama", {"model_type": "own_type", "auto_map": {"AutoConfig": "code.OwnConfig"}},
     ["--model.trust_remote_code=true"], "Model type 'own_type' needs a class in transformers that predicts next"),
    ("qwen3", {}, [GGUF], "Cannot export 'qwen3' to GGUF: it must compute like Llama, but is not one of"),
    ("falcon", {}, ["--export=nemotron-nas"], "Cannot export 'falcon' to nemotron-nas: it must compute like Llama"),
    ("llama", {}, ["--export=nemotron-nas", "--sparsity.scope=attention+ffn"],
     "scope includes attention"),
    ("llama", {}, ["--model.device_map=auto", "--export.dtype=float16"],
     "--model.dtype (float32) with --model.device_map"),
    ("llama", {}, [GGUF, "--export.type=q8_0", "--sparsity.width_multiple=1"],
     "--export.type q8_0 needs --sparsity.width_multiple 32 or a multiple of 32; got 1."),
]  # fmt: skip


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    """Discover each type once."""
    with tiny_run.isolated(tmp_path_factory.mktemp("structures")):
        yield


@pytest.mark.usefixtures("structures")
@pytest.mark.parametrize(("model_type", "settings", "flags", "message"), BY_MODEL)
def test_flags_that_do_not_fit_the_model_are_refused_in_one_line_before_its_weights_are_loaded(
    model_type, settings, flags, message, world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("gprune.models.gguf.has_llama_cpp", lambda: True)
    folder = tmp_path / "model"
    shrunk(default_config(model_type)).save_pretrained(folder)  # no weights
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | settings))
    own = "class OwnConfig(PretrainedConfig):\n    model_type = 'own_type'\n"
    (folder / "code.py").write_text(f"from transformers import PretrainedConfig\n{own}")
    tiny_run.tiny_tokenizer().save_pretrained(folder)
    capsys.readouterr()
    assert tiny_run.main(world.args(tmp_path / "runs", f"--model.name={folder}", *flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("structures")
def test_a_hybrid_model_may_lose_layers_if_one_with_attention_is_protected(world, tmp_path, capsys):
    shrunk(default_config("qwen3_next")).save_pretrained(tmp_path / "model")
    tiny_run.tiny_tokenizer().save_pretrained(tmp_path / "model")
    flags = [f"--model.name={tmp_path / 'model'}", *BLOCKS, "--sparsity.protect=[2]", "--dry_run=true"]
    assert tiny_run.main(world.args(tmp_path / "runs", *flags)) == 0
    assert "1 are removed as a whole" in capsys.readouterr().out
