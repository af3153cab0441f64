"""Every causal language model that transformers knows, tiny and random: eager's loss and gradients, and loops.

Nothing here is fitted to a model: configurations are shrunk by the names of their settings. One that cannot be built
so, or run eagerly, is skipped with eager's reason.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from testkit.exactness import chunked, compare
from testkit.hf_models import tokens
from testkit.shrunk import from_settings, shrink

MOST_PARAMETERS = 30_000_000


def built(kind: str) -> nn.Module:
    """The model, weights large enough that every part matters."""
    from transformers import CONFIG_MAPPING

    return from_settings("AutoModelForCausalLM", shrink(CONFIG_MAPPING[kind]()), MOST_PARAMETERS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_exact_and_in_loops(kind: str) -> None:
    ids, labels = tokens(2, 23), tokens(2, 23).roll(1, 0)
    labels[0, :3] = -100
    try:
        model = built(kind)
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
