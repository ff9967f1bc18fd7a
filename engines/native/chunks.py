"""Whether our own kernel attends chunks of prompts: measured at start, because it depends on the machine.

Where a CPU multiplies bfloat16 in pairs and has no tile registers, torch's libraries may be faster than widening it.
"""

from __future__ import annotations

from functools import partial

import torch

from loraplex.engines.native.timing import least_seconds
from loraplex.kernels.attention.cpu_prefill import PrefillRuns
from loraplex.kernels.attention.paged import Form, attend_chunk, chunk_mask

_CHUNK, _BEFORE = 128, 1024  # tokens, and positions before them
_GROUP = 4  # query heads that share a key head


@torch.inference_mode()
def is_faster(key_heads: int, width: int, value_width: int, dtype: torch.dtype) -> bool:
    """Than torch's attention of a chunk behind others, whose keys and values are gathered, and masked."""
    length = _BEFORE + _CHUNK
    keys = torch.randn(length, key_heads, width).to(dtype)
    values = torch.randn(length, key_heads, value_width).to(dtype)
    query = torch.randn(_GROUP * key_heads, _CHUNK, width).to(dtype)
    out = query.new_empty(_CHUNK, _GROUP * key_heads, value_width)
    slots, form = torch.arange(length), Form(width**-0.5)
    runs, mask = PrefillRuns([(0, _CHUNK, _BEFORE, slots)]), chunk_mask(_BEFORE, _CHUNK, form, query)
    ours = least_seconds(partial(runs.attend, query, keys, values, form, out))
    return ours <= least_seconds(partial(attend_chunk, query[None], keys, values, slots, mask, form))
