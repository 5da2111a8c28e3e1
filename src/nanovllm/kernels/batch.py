"""The tensors of one step, which the model gets as an argument."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class ForwardBatch:
    """The entries of a step; decodes, which have one query token each, come first. The query
    tokens of all entries are concatenated.
    """

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64, in their sequence
    # [tokens] int64: block * block_size + offset, where each token's K and V go
    slot_mapping: Tensor
    block_tables: Tensor  # [entries, max_blocks] int32; columns past an entry's blocks are not read
    seq_lens: Tensor  # [entries] int32: tokens of the sequence after this step
    query_start_loc: Tensor  # [entries + 1] int32: where each entry's query tokens begin
    num_decodes: int
    host_query_lens: list[int]
    host_seq_lens: list[int]
    attention: Any = None  # what the attention backend prepared once for all layers
