"""ReSA's decoding step over a paged key/value cache."""

from pallas_kernels.sparse_decode.api import (
    block_scores,
    describe_blocks,
    select_blocks,
    sparse_attention,
    sparse_decode,
    update_descriptors,
)
from pallas_kernels.sparse_decode.reference import DENSE, Selection

__all__ = ['DENSE', 'Selection', 'block_scores', 'describe_blocks', 'select_blocks',
           'sparse_attention', 'sparse_decode', 'update_descriptors']
