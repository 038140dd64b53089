"""Attention of new tokens to keys and values that lie in pages of a pool."""

from pallas_kernels.paged_attention.api import check, paged_attention

__all__ = ['check', 'paged_attention']
