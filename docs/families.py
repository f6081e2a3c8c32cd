"""Print the table of docs/families.md, made from the families' records: `python docs/families.py`."""

from __future__ import annotations

import sys

from gprune.models.families import FAMILIES


def table() -> str:
    """The families as a Markdown table, from their records."""
    rows = ["| `model_type` | FFN | attention | norms | other |", "|---|---|---|---|---|"]
    for family in FAMILIES.values():
        gated = "gate and up fused, down" if family.gate == family.up else "gate, up, down"
        ffn = "experts, stacked" if family.experts else gated if family.gate else "up, down (no gate)"
        attention = "q, k, v fused" if family.query == family.key else "q, k, v apart"
        attention += ", KV groups" if family.kv_heads else ", one KV head per query head"
        norms = " and ".join(word for word, norm in (("before", family.ffn_norm), ("after", family.after_ffn)) if norm)
        if family.query_norm:
            norms += ", over all heads"
        features = {
            "learned positions": family.learned_positions,
            "logits divided": family.logits_scaling,
            "logits capped": family.softcap,
        }
        other = ", ".join(words for words, has in features.items() if has)
        rows.append(f"| `{family.model_type}` | {ffn} | {attention} | {norms} | {other} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
