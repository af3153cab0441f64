"""All passes, in the order in which they run."""

from __future__ import annotations

from mstc.passes.base import Pass
from mstc.passes.checkpoints import CHECKPOINTS
from mstc.passes.draws import DRAWS
from mstc.passes.lm_head import LM_HEAD
from mstc.passes.mask_outputs import MASK_OUTPUTS
from mstc.passes.masks import MASKS
from mstc.passes.memory_budget import MEMORY_BUDGET
from mstc.passes.mini_sequence import MINI_SEQUENCE
from mstc.passes.offload import OFFLOAD
from mstc.passes.query_chunks import QUERY_CHUNKS
from mstc.passes.recompute import RECOMPUTE
from mstc.passes.select import SELECT
from mstc.passes.sink_slices import SINK_SLICES
from mstc.passes.token_losses import TOKEN_LOSSES
from mstc.passes.triangles import TRIANGLES
from mstc.passes.unused_outputs import UNUSED_OUTPUTS
from mstc.passes.written_attention import WRITTEN_ATTENTION

PASSES: tuple[Pass, ...] = (
    UNUSED_OUTPUTS,  # first, so that nothing is kept for an output that nobody reads
    MASKS,
    MASK_OUTPUTS,
    WRITTEN_ATTENTION,
    TRIANGLES,  # after those, which read triangles as such; before query_chunks, which cuts masks with the queries
    SELECT,  # before token_losses: head and loss become one region
    TOKEN_LOSSES,  # before lm_head, which ends in sums
    SINK_SLICES,  # of what select left; behind losses that are sums over tokens
    DRAWS,  # before the loops, which take no random op
    QUERY_CHUNKS,  # before mini_sequence, which recomputes what only attention reads
    MEMORY_BUDGET,  # when all but loops is done; chooses for the passes below
    LM_HEAD,  # before mini_sequence, which would otherwise take the head into a plain loop
    MINI_SEQUENCE,
    CHECKPOINTS,  # of blocks in which loops stand now
    RECOMPUTE,  # tags the loops of mini_sequence
    OFFLOAD,
)
