"""Every causal language model that transformers knows, tiny and random: eager's loss and gradients, and loops.

Nothing here is fitted to a model: configurations are shrunk by the names of their settings. One that cannot be built
so, or run eagerly, is skipped with eager's reason.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from testkit.exactness import chunked, compare
from testkit.hf_models import tokens

MOST_PARAMETERS = 30_000_000
SIZES = {
    32: "hidden_size n_embd d_model dim embed_dim embedding_size d_embed attention_hidden_size lru_width",
    48: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size d_inner",
    24: "moe_intermediate_size shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers "
    "num_key_value_heads num_experts_per_tok moe_topk linear_num_key_heads num_attention_groups index_n_heads",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts rotary_dim rotary_ndims qk_rope_head_dim time_step_rank mamba_n_heads "
    "linear_num_value_heads",
    8: "head_dim d_kv d_head v_head_dim qk_nope_head_dim state_size mamba_d_state linear_key_head_dim index_topk "
    "linear_value_head_dim hidden_size_per_layer_input relative_attention_num_buckets index_head_dim",
    16: "q_lora_rank kv_lora_rank mamba_d_head sliding_window attention_window",
    64: "max_position_embeddings n_positions n_ctx max_seq_len",
    96: "vocab_size vocab_size_per_layer_input",
    1: "n_group topk_group first_k_dense_replace n_groups bos_token_id",
}
KINDS_OF_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


def shrink(config: Any) -> Any:
    """The configuration with small sizes, one layer of each kind (two at least), and nothing random."""
    for size, names in SIZES.items():
        for name in names.split():
            if type(getattr(config, name, None)) is int:
                setattr(config, name, size)
    for name in KINDS_OF_LAYERS:
        kinds = list(dict.fromkeys(getattr(config, name, None) or ()))
        if kinds:
            setattr(config, name, kinds * (2 if len(kinds) == 1 else 1))
            for count in (c for c in COUNTS if hasattr(config, c)):
                setattr(config, count, max(len(kinds), 2))
    for name in dir(config):
        if ("drop" in name or name == "router_jitter_noise") and isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
    config.use_cache, config.pad_token_id, config.eos_token_id = False, 0, 2
    return config


def built(kind: str) -> nn.Module:
    """The model, weights large enough that every part matters."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(shrink(CONFIG_MAPPING[kind]())).float().train()
    for p in model.parameters():
        nn.init.normal_(p, std=0.08 if p.dim() > 1 else 0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_exact_and_in_loops(kind: str) -> None:
    ids, labels = tokens(2, 23), tokens(2, 23).roll(1, 0)
    labels[0, :3] = -100
    try:
        model = built(kind)
        if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
            pytest.skip("too large: its sizes have other names")
        value = model(input_ids=ids, labels=labels).loss
    except Exception as e:  # noqa: BLE001  (whatever keeps eager from running it is the reason)
        pytest.skip(f"eager: {type(e).__name__}: {e}")
    if not torch.isfinite(value):
        pytest.skip("eager: the loss is not finite")

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=labels).loss  # type: ignore[no-any-return]

    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    result = compare(loss, leaves, (ids, labels), chunked(7, 5))
    result.check(torch.float32)
    assert result.loops
