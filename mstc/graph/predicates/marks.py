"""What is known of tensors that pass from one compiled graph to another.

Where a model arrives as several graphs (behind a graph break), one graph makes a mask and others read it. The
graph that makes it proves what it is and marks the tensor; a graph that gets the tensor may rest on the
mark, which is looked up before each call. A mark belongs to one tensor object at one version: it goes with the
tensor, and holds no longer once the tensor is written to.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from mstc.graph.predicates.constants import Bands, Ramp

_marks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def mark(tensor: torch.Tensor, description: Ramp | Bands) -> None:
    """Note what the tensor holds now; one that tracks no versions gets no mark."""
    if not tensor.is_inference():
        _marks[tensor] = (tensor._version, description)


def marked(tensor: torch.Tensor) -> Ramp | Bands | None:
    """What the tensor was marked to hold, unless it was written to since."""
    if tensor.is_inference() or tensor not in _marks:
        return None
    version, description = _marks[tensor]
    return description if version == tensor._version else None
