"""README.md of a run folder: what lies in it, how it is loaded, and what can be done next."""

from __future__ import annotations

import shlex

from gprune.models.embedded import model_label
from gprune.report.records import result_table
from gprune.runs.results import FinishedRun
from gprune.sparsity.allocation import removed_in_words
from gprune.storage.files import replacing

CONTENT = {
    "report.html": "the page of this run: open it in a browser; it needs no network",
    "model": "the pruned model, a Hugging Face folder with a model card",
    "model-f16.gguf": "the same for llama.cpp",
    "config.yaml": "every setting: `python train.py --config config.yaml` repeats the run",
    "metrics.json": "every number with its protocol, and the summary",
    "samples.json": "what the dense and the pruned model write after the same beginnings",
    "evaluation.json": "what `gprune evaluate` measured",
    "manifest.json": "settings, versions, and what each step cost; it makes the folder a run",
    "masks": "which neurons and KV groups stay, for every row of the table (true: stays)",
    "modules.safetensors": "modules of each block: labels, ranks, drift, and which of them switched metric",
    "assignment.safetensors": "the module of each neuron, as it was first found; kept to resume",
    "thresholds.safetensors": "learned thresholds, in logits; kept to resume",
    "statistics": "what calibration collected, by corpus",
    "recovery": "what recoveries have learned; kept to resume",
    "checkpoints": "of what is being learned; kept to resume",
    "steps": "earlier steps of `--sparsity.schedule`",
    "figures": "the figures of the page as PNG",
    "csv": "curves",
    "wandb": "the same for W&B: `wandb leet run wandb/latest-run`, or `wandb sync`",
    "tensorboard": "the same for TensorBoard: `tensorboard --logdir tensorboard`",
    "report": "what `gprune report` wrote",
}


def write_readme(run: FinishedRun) -> None:
    """README.md of the run's folder."""
    with replacing(run.path / "README.md") as new:
        new.write_text(readme(run), encoding="utf-8")


def readme(run: FinishedRun) -> str:
    """The text of README.md."""
    s = run.settings
    rows = [
        f"| `{name}{'/' if (run.path / name).is_dir() else ''}` | {about} |"
        for name, about in CONTENT.items()
        if (run.path / name).exists()
    ]
    load = f"\n## How to load it\n\n```python\n{how_to_load(run)}\n```\n" if how_to_load(run) else ""
    steps = "\n".join(f"{command:60}  # {what}" for what, command in what_next(run))
    return f"""# {run.name}

{removed_from(run)}: importance
`{s["importance"]}`, recovery `{s["recovery"]}`, seed {run.seed}.

{result_table(run.records).to_text()}

| here | what it is |
|---|---|
{chr(10).join(rows)}
{load}
## What next

```bash
{steps}
```
"""


def removed_from(run: FinishedRun) -> str:
    """What the run has done, in one line."""
    sparsity, model = run.settings["sparsity"], run.settings["model"]
    share = removed_in_words(sparsity["target"], sparsity["scope"], sparsity["allocation"], digits=0)
    return f"{share} removed from {model_label(model['name'])}"


def how_to_load(run: FinishedRun) -> str:
    """Python that loads the pruned model, where the run exported one; a stock model needs no code of its own."""
    model = run.path / "model"
    if not (model / "config.json").is_file():
        return ""
    code = ", trust_remote_code=True" if any(model.glob("*.py")) else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{model}"{code})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{model}"{code})'
    )


def what_next(run: FinishedRun) -> list[tuple[str, str]]:
    """(what for, command) of what can be done with the run."""
    here, config, with_model = shlex.quote(str(run.path)), shlex.quote(str(run.path / "config.yaml")), []
    if (run.path / "model" / "config.json").is_file():
        with_model = [
            ("benchmarks, beside the dense model", f"gprune evaluate {here} --dense"),
            ("for llama.cpp", f"gprune export {here}"),
        ]
    return [
        *with_model,
        ("beside other runs", f"gprune report {here} OTHER_RUN --html compared.html"),
        ("the same with another seed", f"python train.py --config {config} --run.name NAME --run.seed 1"),
    ]
