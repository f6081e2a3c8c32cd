"""Whole runs of `train.py` on tiny random models: which scope and which recovery work for a model type.

Runs have all ten steps: calibration, modules, learned thresholds, pruning, recovery, the check that masked, sliced and
reloaded models agree, and evaluation. The first attempt in `ATTEMPTS` that works is the result. To save time the saved
model is reloaded in this process; `experiments.architectures` reloads it in a fresh one. Text consists of random words.
"""

from __future__ import annotations

import json
import logging
import math
import random
import tempfile
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import gprune
from gprune.config import parse
from gprune.console import quiet
from gprune.errors import UserError, first_line
from gprune.export import hf, reload

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "nrst"][:96]  # all tokens are below 100
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
CORPORA = ("alpha", "beta", "gamma")  # the last one is unseen
CHAIN = "[least_squares,distill]"
ATTEMPTS = (("attention+ffn", CHAIN), ("ffn", CHAIN), ("ffn", "least_squares"), ("ffn", "none"))  # scope, recovery


def whole_run(model: PreTrainedModel) -> dict[str, Any]:
    """Return the scope and the recovery of the first attempt that works, and why earlier ones did not.

    Keys: `scope` and `recovery` (None if no attempt works), `reasons` (a line for each attempt that was refused) and
    `failed` (an exception other than a refusal, which is a bug).
    """
    quiet()
    logging.getLogger("gprune").setLevel(logging.ERROR)
    result: dict[str, Any] = {"scope": None, "recovery": None, "reasons": [], "failed": None}
    with tempfile.TemporaryDirectory(prefix="gprune-run-") as scratch:
        flags = _inputs(model, Path(scratch))
        for scope, recovery in ATTEMPTS:
            try:
                _run(flags, scope, recovery)
            except UserError as error:
                result["reasons"].append(str(error))
            except TimeoutError:
                raise
            except Exception as error:
                return result | {"failed": f"{scope}, {recovery}: {type(error).__name__}: {first_line(error)}"}
            else:
                return result | {"scope": scope, "recovery": recovery}
    return result


def _run(flags: list[str], scope: str, recovery: str) -> None:
    """Run one attempt. Raise AssertionError if the result is not what was asked for."""
    cfg = parse([*flags, f"--sparsity.scope={scope}", f"--recovery={recovery}"])
    # Some types would read the files of the tokenizer with a class of their own, which needs a larger vocabulary.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(cfg.model.name)
    with (
        mock.patch.object(hf, "subprocess", SimpleNamespace(run=_reload_in_this_process)),
        mock.patch.object(AutoTokenizer, "from_pretrained", return_value=tokenizer),
    ):
        result = gprune.prune(cfg)
    assert result.summary["sparsity_of_scope"] >= cfg.sparsity.target, "too little was removed"
    assert (result.path / "model/config.json").is_file(), "no model was saved"
    assert all(math.isfinite(r["perplexity"]) for r in result.records), "a perplexity is not finite"
    assert result.records[-1]["recovery"] == cfg.recovery, "the model was not recovered"


def _inputs(model: PreTrainedModel, folder: Path) -> list[str]:
    """Save the model, a tokenizer and corpora, and return the flags of small runs with them."""
    model.save_pretrained(folder / "model")
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    generator = random.Random(0)
    files = {name: folder / f"{name}.txt" for name in CORPORA}
    for file in files.values():
        documents = [" ".join(generator.choices(WORDS, k=600)) for _ in range(24)]
        file.write_text("\n\n".join(documents), encoding="utf-8")
    seen = f"[{files['alpha']},{files['beta']}]"
    return [
        f"--model.name={folder / 'model'}", f"--corpora.score={files['alpha']}", f"--corpora.drift={seen}",
        f"--corpora.learn={seen}", f"--corpora.recover={seen}",
        f"--corpora.evaluate=[{files['alpha']},{files['gamma']}]",
        "--corpora.num_samples=4", "--corpora.seq_len=16", "--corpora.batch_size=4", "--distill.tokens=128",
        "--sparsity.target=0.3", "--sparsity.epochs=1", "--partition.num_modules=2", "--partition.steps=5",
        "--evaluation.num_samples=2", "--evaluation.seq_len=16", "--evaluation.development_samples=1",
        "--evaluation.curve=[]", "--evaluation.before_recovery=false", "--evaluation.prompts=[]",
        "--logging.mode=disabled", "--trainer.accelerator=cpu", "--trainer.precision=32-true",
        f"--run.dir={folder / 'runs'}",
    ]  # fmt: skip


def _reload_in_this_process(command: list[str], *, input: str, **_: object) -> CompletedProcess[str]:
    """Replacement for `subprocess.run` in the check of a saved model."""
    reload.main(json.loads(input))
    return CompletedProcess(command, 0)


def in_words(run: dict[str, Any] | None) -> str:
    """Describe a result in a cell of the table; empty without one."""
    if run is None:
        return ""
    if run["failed"]:
        return "fails"
    if run["scope"] is None:
        return "refused"
    names = {CHAIN: "", "least_squares": ", without distillation", "none": ", without recovery"}
    return run["scope"] + names[run["recovery"]]
