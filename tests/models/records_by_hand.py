"""Records written by hand for types whose structure gprune discovers. They are the expected results of discovery."""

from __future__ import annotations

from gprune.models.families import FAMILIES, Family


def fused(path: str) -> dict[str, str]:
    """Paths of query, key and value if one module computes all three."""
    return {"query": path, "key": path, "value": path}


GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm",
    "norm_offset": 1.0,
    "softcap": "final_logit_softcapping",
}
HEADS_NORMED_TOGETHER = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
EXPERTS = {
    "experts": "mlp.experts",
    "per_expert": {"mlp.gate.weight": 0},
    "attributes": {
        "mlp.experts.intermediate_dim": "neurons",
        "mlp.experts.num_experts": "experts",
        "mlp.gate.num_experts": "experts",
    },
}
BY_HAND: dict[str, Family] = dict(FAMILIES) | {
    family.model_type: family
    for family in (
        Family("granite", logits_scaling="logits_scaling"),
        Family("gemma2", **GEMMA),
        Family("gemma3_text", **GEMMA),
        Family(
            "olmo2", ffn_norm=None, attention_norm=None, **HEADS_NORMED_TOGETHER,
        ),
        Family(
            "phi3", gate="mlp.gate_up_proj", up="mlp.gate_up_proj",
            **fused("self_attn.qkv_proj"), attributes={"self_attn.num_key_value_heads": "kv_groups"},
        ),
        Family(
            "opt", gate=None, up="fc1", down="fc2", output="self_attn.out_proj",
            ffn_norm="final_layer_norm", attention_norm="self_attn_layer_norm",
            width="ffn_dim", kv_heads=None, learned_positions=True, attributes={"self_attn.num_heads": "heads"},
        ),
        Family(
            "gpt_neox", gate=None, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
            **fused("attention.query_key_value"), layout={"attention.query_key_value": "query key value"},
            output="attention.dense", kv_heads=None,
        ),
        Family(
            "gpt2", layers="h", gate=None, up="mlp.c_fc", down="mlp.c_proj",
            **fused("attn.c_attn"), output="attn.c_proj", ffn_norm="ln_2", attention_norm="ln_1",
            width="n_inner", kv_heads=None, learned_positions=True,
            attributes={"attn.num_heads": "heads", "attn.split_size": "channels"},
        ),
        Family("mixtral", expert_count="num_local_experts", **EXPERTS),
        Family("qwen3_moe", width="moe_intermediate_size", expert_count="num_local_experts", **EXPERTS),
        Family("olmoe", expert_count="num_experts", **EXPERTS, **HEADS_NORMED_TOGETHER),
    )
}  # fmt: skip
