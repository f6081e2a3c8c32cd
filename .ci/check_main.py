"""What the main job must have left: counted tokens within budget, exact sparsity, a smaller model, a better table.

python .ci/check_main.py runs [--run NAME] [--cached]

--cached is for a later run with other settings: it must not have paid for calibration again. It exports no model.
"""

import argparse
import json
import math
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("runs", type=Path)
parser.add_argument("--run")
parser.add_argument("--cached", action="store_true")
arguments = parser.parse_args()

(folder,) = [arguments.runs / arguments.run] if arguments.run else arguments.runs.iterdir()
manifest = json.loads((folder / "manifest.json").read_text())
metrics = json.loads((folder / "metrics.json").read_text())
summary, records = metrics["summary"], metrics["records"]

print("seconds by step:", {name: step["seconds"] for name, step in manifest["steps"].items()})
print("peak memory, MiB:", max(step["peak_memory_mib"] for step in manifest["steps"].values()))
print("tokens:", summary["forward_tokens"], "forward,", summary["forward_backward_tokens"], "forward and backward")
# What thresholds and distillation cost.
spent = sum(manifest["steps"].get(name, {}).get("forward_backward_tokens", 0) for name in ("thresholds", "shrink"))
print("of these forward and backward for the model itself:", spent)
assert spent <= 25_000
assert summary["forward_tokens"] <= 140_000
assert summary["forward_backward_tokens"] <= 50_000
if arguments.cached:
    assert "calibrate" not in manifest["steps"], "calibration was paid for twice"

if not arguments.cached:  # the learned parts have learned
    nats = [
        sum(map(math.log, point.values())) / len(point)
        for point in manifest["learning"]["development_perplexity_by_epoch"]
    ]
    print("development cross-entropy by epoch, nats:", [round(value, 3) for value in nats])
    assert nats[-1] <= nats[0] - 0.05
    refinement = manifest["refinement"]
    print("refinement moved", refinement["moved"], "of", refinement["neurons"], "neurons")
    assert refinement["moved"] > 0

widths = manifest["widths"]["neurons"]
print("FFN widths:", widths)
assert all(width % 32 == 0 for width in widths)  # the default of --sparsity.width_multiple
assert 0.3 <= summary["sparsity_of_scope"] < 0.3001
assert summary["parameters_after"] < 0.83 * summary["parameters_before"]
unseen = {r["corpus"] for r in records if not r["seen"]}
assert len(unseen) >= 2, unseen
assert all(math.isfinite(r["perplexity"]) for r in records)
if not arguments.cached:
    from gprune.runs.results import read_numbers

    frame = read_numbers(folder).frame()
    for stage, most in (("pruned", 2.8), ("recovered", 2.2)):
        (ratio,) = frame.query(f"stage == '{stage}' and number == 'unseen_over_dense'")["value"]
        print(f"unseen perplexity, {stage} over dense:", round(ratio, 3))
        assert ratio <= most

logits = manifest["logits"]
print("logits:", logits)
assert logits["masked_minus_sliced"] <= 1e-3 * logits["std"]

if not arguments.cached:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert logits["sliced_minus_reloaded"] == 0.0
    model = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=True)
    assert sum(p.numel() for p in model.parameters()) == summary["parameters_after"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=True)
    prompt = tokenizer("The history of the railway began", return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))
