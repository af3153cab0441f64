"""Any transformers model, tiny and random: settings are shrunk by their names, inputs made by the names of arguments.

Nothing here is fitted to a model. One that cannot be built so, or run eagerly, is for the caller to skip.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from testkit.hf_models import tokens

LENGTH = 23
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
# Settings of encoders, of pictures and of sound besides.
MORE = {
    32: "hidden_dim projection_dim entity_emb_size word_embed_proj_dim",
    48: "dim_feedforward",
    2: "num_encoder_layers depth num_conv_pos_embedding_groups num_feature_levels",
}
KINDS_OF_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
RANDOM = ("router_jitter_noise", "mask_time_prob", "mask_feature_prob")


def shrink(config: Any) -> Any:
    """The configuration with small sizes, one layer of each kind (two at least), and nothing random."""
    _resize(config, SIZES)
    for name in KINDS_OF_LAYERS:
        kinds = list(dict.fromkeys(getattr(config, name, None) or ()))
        if kinds:
            with contextlib.suppress(AttributeError):  # some are computed from the number of layers
                setattr(config, name, kinds * (2 if len(kinds) == 1 else 1))
            for count in (c for c in COUNTS if hasattr(config, c)):
                setattr(config, count, max(len(kinds), 2))
    for name in dir(config):
        if ("drop" in name or name in RANDOM) and isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
    if hasattr(config, "qk_rope_head_dim"):
        _fit_latent_attention(config)
    config.use_cache, config.pad_token_id, config.eos_token_id = False, 0, 2
    return config


def _fit_latent_attention(config: Any) -> None:
    """Sizes that the configurations of latent attention (DeepSeek) compute from others when they are made."""
    rotary = config.qk_rope_head_dim
    sizes = {
        "head_dim": rotary,
        "qk_head_dim": rotary + getattr(config, "qk_nope_head_dim", 0),
        "num_key_value_heads": config.num_attention_heads,
    }
    for name, size in sizes.items():
        if hasattr(config, name):
            with contextlib.suppress(AttributeError):
                setattr(config, name, size)


def shrink_deep(config: Any) -> Any:
    """The same for a configuration and all that it is made of, with short stages and small pictures."""
    for part in _parts(config):
        shrink_deep(part)
    shrink(config)
    _resize(config, MORE)
    if isinstance(getattr(config, "depths", None), (list, tuple)):
        config.depths = type(config.depths)(min(d, 2) for d in config.depths)
    if type(getattr(config, "image_size", None)) is int and type(getattr(config, "patch_size", None)) is int:
        config.image_size = 5 * config.patch_size
    if hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment = False
    if getattr(config, "is_encoder_decoder", False):
        config.decoder_start_token_id = 1
    return config


def shorten(config: Any) -> Any:
    """Few layers and a small vocabulary, all other sizes as they are: for configurations whose sizes hang together."""
    for part in _parts(config):
        shorten(part)
    few = {2: " ".join(n for n in SIZES[2].split() if "layer" in n), 96: SIZES[96]}
    _resize(config, few)
    if isinstance(getattr(config, "depths", None), (list, tuple)):
        config.depths = type(config.depths)(min(d, 2) for d in config.depths)
    for name in dir(config):
        if ("drop" in name or name in RANDOM) and isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
    config.use_cache = False
    return config


def _resize(config: Any, sizes: dict[int, str]) -> None:
    for size, names in sizes.items():
        for name in names.split():
            if type(getattr(config, name, None)) is int:
                setattr(config, name, size)


def _parts(config: Any) -> list[Any]:
    from transformers import PretrainedConfig

    return [v for v in vars(config).values() if isinstance(v, PretrainedConfig)]


def initialize(model: nn.Module) -> nn.Module:
    """Weights large enough that every part matters."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.08 if p.dim() > 1 else 0.3)
    return model.float().train()


def check_size(make: Callable[[], nn.Module], most: int) -> None:
    """Raise ValueError where the model has more than ``most`` parameters, before any of them takes memory."""
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in make().parameters())
    except (NotImplementedError, RuntimeError):  # some read values that they make
        return
    if count > most:
        raise ValueError(f"too large ({count:,} parameters): its sizes have other names")


def from_settings(auto: str, config: Any, most: int) -> nn.Module:
    """The model of a transformers auto class with at most ``most`` parameters, and five classes where it has any."""
    import transformers

    if "Classification" in auto:
        config.num_labels = 5
        config.classifier_dropout = 0.0  # some heads draw where the configuration says nothing
    if auto == "AutoModelForSequenceClassification":
        config.problem_type = "single_label_classification"
    make = functools.partial(getattr(transformers, auto).from_config, config)
    check_size(make, most)
    torch.manual_seed(0)
    return initialize(make())


def setting(config: Any, *names: str) -> Any:
    """The first of the settings that the configuration or a part of it has."""
    found = (v for c in _with_parts(config) for n in names if (v := getattr(c, n, None)) is not None)
    return next(found, None)


def _with_parts(config: Any) -> Iterator[Any]:
    yield config
    for part in _parts(config):
        yield from _with_parts(part)


def inputs_for(model: Any, auto: str) -> dict[str, Any]:
    """Inputs and labels, by the names of the arguments of the model's forward."""
    names = inspect.signature(model.forward).parameters
    config = model.config
    given: dict[str, Any] = {}
    if "pixel_values" in names:
        given["pixel_values"] = _pictures(config)
    if "input_values" in names:
        spectrum = "max_length" in vars(config) and "num_mel_bins" in vars(config)
        given["input_values"] = _floats(2, config.max_length, config.num_mel_bins) if spectrum else _floats(2, 6000)
    if "input_features" in names:
        bins = setting(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim") or 80
        frames = 2 * setting(config, "max_source_positions") if model.config.model_type == "whisper" else 60
        given["input_features"] = _floats(2, bins, frames) if frames != 60 else _floats(2, frames, bins)
    if "input_ids" in names:
        given["input_ids"] = tokens(2, LENGTH, min(96, setting(config, "vocab_size") or 96))
    if "return_loss" in names:
        given["return_loss"] = True
    return {**given, **_labels(config, auto, names, given)}


def _labels(config: Any, auto: str, names: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    classes = getattr(config, "num_labels", None) or 2
    if "QuestionAnswering" in auto:
        return {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 9])}
    if "labels" not in names:
        return {}
    if "TokenClassification" in auto:
        return {"labels": tokens(2, LENGTH) % classes}
    if "Classification" in auto:
        return {"labels": torch.tensor([1, classes - 1])}
    if "Segmentation" in auto:
        pixels = given["pixel_values"].shape[-2:]
        return {"labels": tokens(2, pixels.numel()).view(2, *pixels) % classes}
    if "CTC" in auto:
        return {"labels": tokens(2, 4, min(20, config.vocab_size))}
    below = min(96, setting(config, "vocab_size") or 96)
    aside = "decoder_input_ids" in names or "input_ids" not in given
    labels = tokens(2, 19 if aside else LENGTH, below).roll(1, 0)
    labels[0, :3] = -100
    return {"labels": labels}


def _pictures(config: Any) -> Tensor:
    size = setting(config, "image_size", "img_size", "input_size") or 64
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return _floats(2, setting(config, "num_channels", "in_channels", "in_chans") or 3, height, width)


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def loss_of(result: Any) -> Tensor:
    """The model's loss; one made of all its results where it has none."""
    loss = getattr(result, "loss", None)
    if loss is not None:
        return loss.sum()  # type: ignore[no-any-return]
    values = (v for v in result.values() if isinstance(v, Tensor) and v.requires_grad)
    return sum(((v.tanh() * torch.linspace(-1, 1, v.shape[-1])).mean() for v in values), torch.zeros(()))
