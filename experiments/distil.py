"""Distil a model of another tool from its dense model, and save it as a folder for `gprune.measure` or a row `model:`.

    python -m experiments.distil --model runs/peers/smollm2-osscar --output runs/peers/smollm2-osscar-49k \
        --config protocol --distill.tokens 49152 --model.dtype bfloat16

A `DistillationStage` trains the model by the flags `--distill.*` on text of `--corpora.recover`. `--model.name` is the
dense model, whose tokenizer, output embedding and vocabulary the model needs. Perplexity on development text is logged
to `OUTPUT-curves/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from gprune.checks import select_options
from gprune.config import RunConfig, parse
from gprune.console import run_guarded
from gprune.corpora.loaders import CorpusDataModule
from gprune.discovery import check_structure, family_of
from gprune.errors import UserError
from gprune.export.hf import save_pruned
from gprune.method.inputs import load_dense, prepare_text
from gprune.method.plan import make_plan
from gprune.models.loading import check_elsewhere, load_elsewhere, load_tokenizer
from gprune.runs.trainer import placement
from gprune.stages.distillation import DistillationStage
from gprune.storage.paths import expanded


def distil(model: str, cfg: RunConfig, output: Path) -> None:
    """Distil the model in a folder from the dense model `cfg.model.name`, and save it to the new folder `output`."""
    if output.exists():
        raise UserError(f"--output must be a new folder; '{output}' exists.")
    plan = make_plan(cfg.model_copy(update={"gprune": False, "recovery": "distill"}))
    cfg = plan.cfg
    check_structure(check_elsewhere(model))
    tokenizer = load_tokenizer(cfg.model.name, trust_remote_code=cfg.model.trust_remote_code)
    dense = load_dense(cfg, plan.device, tokenizer)
    student, _ = load_elsewhere(model, dtype=getattr(torch, cfg.model.dtype))
    family_of(student)
    text = prepare_text(cfg, tokenizer, dense.get_input_embeddings().num_embeddings)
    L.seed_everything(cfg.run.seed, verbose=False)
    stage = DistillationStage(dense, student, **select_options(DistillationStage, dict(cfg.distill)))
    data = CorpusDataModule(
        train=text.fresh, validation=text.development, batch_size=cfg.distill.batch_size,
        validation_batch_size=cfg.corpora.batch_size, seed=cfg.run.seed,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator=placement(cfg.trainer)["accelerator"], devices=1, precision=cfg.trainer.precision, max_epochs=1,
        gradient_clip_val=cfg.distill.clip, accumulate_grad_batches=cfg.distill.accumulate,
        logger=CSVLogger(output.parent, name=f"{output.name}-curves"), log_every_n_steps=1, num_sanity_val_steps=0,
        val_check_interval=cfg.trainer.val_check_interval or 0.25,
        use_distributed_sampler=False, enable_checkpointing=False, enable_model_summary=False, inference_mode=False,
    )  # fmt: skip
    trainer.fit(stage, data)
    save_pruned(stage.finished(), tokenizer, output)


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Returns the text to print."""
    parser = argparse.ArgumentParser("python -m experiments.distil", description=__doc__)
    parser.add_argument("--model", metavar="FOLDER", required=True, help="the model to distil")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder for the distilled model")
    options, flags = parser.parse_known_args(arguments)
    output = expanded(options.output)
    distil(options.model, parse(flags), output)
    return f"Wrote {output}"


def main() -> int:
    """Run the command. A user error is one line on stderr and exit code 2."""
    return run_guarded("experiments.distil", work)


if __name__ == "__main__":
    sys.exit(main())
