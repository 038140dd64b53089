"""Log-probabilities of given texts, by one forward pass over each."""

from collections.abc import Sequence
from dataclasses import dataclass
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt.models.base import Model
from jaxrl_pt.types import Array, Params

_SHORTEST = 64  # tokens of the smallest program


@dataclass(frozen=True)
class Scored:
  """A text of T tokens under the model's own distribution, without temperature and filters."""

  logp: np.ndarray  # f32[T], 0 for the first token, which nothing comes before
  top_tokens: np.ndarray  # i32[T, K] the likeliest tokens at each place, falling; 0 for the first
  top_logp: np.ndarray  # f32[T, K]


class Scorer:
  """Scores texts; its programs are compiled when they are first used, one for each power of two."""

  def __init__(self, model: Model, longest: int, num_top: int) -> None:
    """Texts have at most `longest` tokens, and ask for at most `num_top` likeliest ones."""
    self._longest = longest
    self._run = jax.jit(functools.partial(_score, model, num_top))

  def score(self, params: Params, tokens: Sequence[int], num_top: int) -> Scored:
    """Scores one text.

    Args:
      params: the model's parameters.
      tokens: T token ids, at least one.
      num_top: K.
    """
    width = _SHORTEST
    while width < len(tokens):
      width *= 2
    padded = np.zeros((1, min(width, max(self._longest, len(tokens)))), np.int32)
    padded[0, :len(tokens)] = tokens
    logp, top_logp, top_tokens = jax.device_get(self._run(params, padded))
    first = lambda x: np.concatenate([np.zeros_like(x[:1]), x[:len(tokens) - 1]])
    return Scored(first(logp), first(top_tokens)[:, :num_top], first(top_logp)[:, :num_top])


def _score(model: Model, num_top: int, params: Params, tokens_1T: Array) -> Any:
  """f32[T − 1], f32[T − 1, K], i32[T − 1, K]: of each token but the first, given those before."""
  length = tokens_1T.shape[1]
  hidden_TD = model.apply(params, tokens_1T, jnp.arange(length)[None],
                          jnp.ones_like(tokens_1T))[0, :-1]
  head_DV = model.head(params)

  def of_one(hidden_and_next: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    hidden_D, token = hidden_and_next
    logp_V = jax.nn.log_softmax(jnp.matmul(hidden_D, head_DV, preferred_element_type=jnp.float32))
    return logp_V[token], *jax.lax.top_k(logp_V, num_top)

  # In pieces, since the logits of a long text would take more memory than the model.
  return jax.lax.map(of_one, (hidden_TD, tokens_1T[0, 1:]), batch_size=64)
