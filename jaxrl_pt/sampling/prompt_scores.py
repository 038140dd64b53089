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
    return self.score_rows(params, [tokens], 1, num_top)[0]

  def score_rows(self, params: Params, texts: Sequence[Sequence[int]], num_rows: int, num_top: int
                 ) -> list[Scored]:
    """Scores several texts in one forward pass.

    Args:
      params: the model's parameters.
      texts: at most B texts of T token ids, at least one each. Each may have its own T; the longest
        decides what the pass costs.
      num_rows: B, for which the program is compiled.
      num_top: K.
    """
    most = max(map(len, texts))
    width = _SHORTEST
    while width < most - 1:  # The last token is only predicted.
      width *= 2
    padded_BT = np.zeros((num_rows, 1 + min(width, max(self._longest, most, 2) - 1)),
                         np.int32)
    for row_T, tokens in zip(padded_BT, texts, strict=False):
      row_T[:len(tokens)] = tokens
    logp_BT, top_logp_BTK, top_tokens_BTK = jax.device_get(self._run(params, padded_BT))

    def of_text(b: int, length: int) -> Scored:
      first = lambda x: np.concatenate([np.zeros_like(x[:1]), x[:length - 1]])
      return Scored(first(logp_BT[b]), first(top_tokens_BTK[b])[:, :num_top],
                    first(top_logp_BTK[b])[:, :num_top])

    return [of_text(b, len(tokens)) for b, tokens in enumerate(texts)]


def _score(model: Model, num_top: int, params: Params, tokens_BT: Array) -> Any:
  """f32[B, T − 1], f32[B, T − 1, K], i32[B, T − 1, K]: of each token but the first."""
  inputs_BT = tokens_BT[:, :-1]
  positions_BT = jnp.broadcast_to(jnp.arange(inputs_BT.shape[1]), inputs_BT.shape)
  hidden_BTD = model.apply(params, inputs_BT, positions_BT, jnp.ones_like(inputs_BT))
  head_DV = model.head(params)

  def of_one(hidden_and_next: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    hidden_D, token = hidden_and_next
    logp_V = jax.nn.log_softmax(jnp.matmul(hidden_D, head_DV, preferred_element_type=jnp.float32))
    return logp_V[token], *jax.lax.top_k(logp_V, num_top)

  # In pieces, since the logits of a long text would take more memory than the model.
  flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), tokens_BT[:, 1:].reshape(-1)
  of_all = jax.lax.map(of_one, flat, batch_size=64)
  return jax.tree.map(lambda x: x.reshape(*inputs_BT.shape, *x.shape[1:]), of_all)
