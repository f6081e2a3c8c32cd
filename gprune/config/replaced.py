"""Flags of Lightning's that have other names here, for who tries them: what to use in their places."""

INSTEAD = {
    "seed": "--run.seed",
    "seed_everything": "--run.seed",
    "ckpt_path": "the same command again, which goes on by itself",
    "optimizer": "--sparsity.learning_rate, --distill.learning_rate, or a stage of your own (docs/extend.md)",
    "import": "--import as a flag of the command: a file runs nobody's code",
    "trainer.max_epochs": "--sparsity.epochs (thresholds), --partition.steps (refinement), --distill.tokens",
    "trainer.max_time": "--trainer.callbacks '[{class_path: Timer, init_args: {duration: 00:12:00:00}}]'",
    "trainer.logger": "--logging.mode, of W&B",
    "trainer.accumulate_grad_batches": "--distill.accumulate, or the callback GradientAccumulationScheduler",
    "trainer.val_check_interval": "--distill.points",
    "trainer.limit_val_batches": "--evaluation.development_samples",
    "trainer.limit_test_batches": "--evaluation.num_samples and --corpora.num_samples",
    "trainer.fast_dev_run": "--config experiments/smoke.yaml, or --dry_run true",
    "trainer.default_root_dir": "--run.dir",
    "trainer.enable_checkpointing": "--run.checkpoint_minutes",
}
