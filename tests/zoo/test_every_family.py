"""Every model of transformers that is no causal language model, tiny and random: eager's loss and gradients.

`test_every_architecture` has the causal ones. A model that cannot be built from shrunk settings, or run eagerly, is
skipped with eager's reason. A graph may have no loops here: one row per picture or text, convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from testkit.exactness import BOUNDS, Comparison, chunked, compare
from testkit.float64 import true_float64
from testkit.shrunk import from_settings, inputs_for, loss_of, shorten, shrink_deep

MOST_PARAMETERS = 40_000_000
FAMILIES = {
    "AutoModelForMaskedLM": "MASKED_LM",
    "AutoModelForSeq2SeqLM": "SEQ_TO_SEQ_CAUSAL_LM",
    "AutoModelForImageClassification": "IMAGE_CLASSIFICATION",
    "AutoModelForSemanticSegmentation": "SEMANTIC_SEGMENTATION",
    "AutoModelForZeroShotImageClassification": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "AutoModelForCTC": "CTC",
    "AutoModelForAudioClassification": "AUDIO_CLASSIFICATION",
    "AutoModelForSpeechSeq2Seq": "SPEECH_SEQ_2_SEQ",
    "AutoModelForImageTextToText": "IMAGE_TEXT_TO_TEXT",
    "AutoModelForSequenceClassification": "SEQUENCE_CLASSIFICATION",
    "AutoModelForTokenClassification": "TOKEN_CLASSIFICATION",
    "AutoModelForQuestionAnswering": "QUESTION_ANSWERING",
}


def _all() -> Iterator[tuple[str, str]]:
    for auto, name in FAMILIES.items():
        for kind in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES"):
            yield auto, kind


def _built(auto: str, kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model with shrunk settings, or, where these do not fit together, with few layers; and its inputs."""
    reasons = []
    for small in (shrink_deep, shorten):
        try:
            model = from_settings(auto, small(CONFIG_MAPPING[kind]()), MOST_PARAMETERS)
            given = inputs_for(model, auto)
            if torch.isfinite(loss_of(model(**given))):
                return model, given
            raise ValueError("the loss is not finite")
        except Exception as e:  # noqa: BLE001  (whatever keeps eager from running it is the reason)
            reasons.append(f"{small.__name__}: {type(e).__name__}: {e}")
    pytest.skip("eager: " + " | ".join(reasons))


@pytest.mark.slow
@pytest.mark.parametrize(("auto", "kind"), list(_all()))
def test_exact(auto: str, kind: str) -> None:
    model, given = _built(auto, kind)
    result = _compared(model, given)
    if result.worst > BOUNDS[torch.float32] or result.loss > BOUNDS[torch.float32]:
        # Norms over a batch of two pictures magnify rounding: they are compared where there is less of it.
        double = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
        with true_float64():
            _compared(model.double(), double).check()
    else:
        result.check(torch.float32)
    print(result.loops, "loops\n" + result.describe())


def _compared(model: nn.Module, given: dict[str, Any]) -> Comparison:
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return compare(lambda: loss_of(model(**given)), leaves, (), chunked(7, 5))
