"""The learner's side of branch rollouts: a document and all its branches in one packed row.

A branch is a prompt that ends at a position of a document, with a response: the sampler
(`decode.generate`) prefills the document once for all of them, and here one forward pass under
a tree mask scores all of them. Values and gradients equal those of whole sequences up to the
order of sums.
"""

import jax.numpy as jnp

from jaxrl_pt.models import kv_cache
from jaxrl_pt.models.base import Model
from jaxrl_pt.types import Array, Params, Prompts


def documents(tokens_DT: Array, lengths_DP: Array, ids_DP: Array, suffix_DM: Array | tuple[()] = ()
              ) -> Prompts:
  """Prompts that end at P positions of each of D documents, without a known continuation.

  Args:
    tokens_DT: i32[D, T] right-padded documents.
    lengths_DP: i32[D, P] in [1, T].
    ids_DP: i32[D, P].
    suffix_DM: i32[D, M] what follows each context.
  """
  num_prompts = lengths_DP.size
  return Prompts(tokens_DT, lengths_DP.reshape(-1), ids_DP.reshape(-1),
                 jnp.zeros((num_prompts, 0), jnp.int32), jnp.zeros(num_prompts, jnp.int32),
                 jnp.zeros(num_prompts), suffix_DM)


def response_hidden(model: Model, params: Params, prompts: Prompts, tokens_NGS: Array) -> Array:
  """f[N, G, S, D]: the hidden state before each response token, each document computed once."""
  num_docs, (num_samples, num_tokens) = prompts.tokens.shape[0], tokens_NGS.shape[1:]
  lengths_DR = jnp.repeat(prompts.lengths.reshape(num_docs, -1), num_samples, 1)
  own = tokens_NGS.reshape(num_docs, -1, num_tokens)
  if prompts.num_suffix:
    suffix = jnp.repeat(prompts.suffix[:, None], own.shape[1], 1)
    own = jnp.concatenate([suffix, own], -1)
  hidden = tree_hidden(model, params, prompts.tokens, lengths_DR, own)[:, :, prompts.num_suffix:]
  return hidden.reshape(*tokens_NGS.shape, hidden.shape[-1])


def tree_hidden(model: Model, params: Params, tokens_DT: Array, lengths_DR: Array,
                own_DRS: Array) -> Array:
  """Hidden states from which each branch's own tokens are predicted, in one packed forward.

  Row d holds [document d | own tokens of its R branches]; the tree mask lets branch r see the
  document's positions below lengths[d, r] and itself. A differentiable function of `params`.

  Args:
    tokens_DT: i32[D, T] right-padded documents.
    lengths_DR: i32[D, R] in [1, T].
    own_DRS: i32[D, R, S] tokens of each branch: suffix and response.

  Returns:
    f[D, R, S, E]; entry s is the state after the token before own token s.
  """
  num_docs, length = tokens_DT.shape
  _, num_branches, num_own = own_DRS.shape
  fed_DRS, num_fed = own_DRS[..., :-1], num_branches * (num_own - 1)
  positions = jnp.broadcast_to(jnp.arange(length), tokens_DT.shape)
  own_positions = lengths_DR[..., None] + jnp.arange(num_own - 1)
  hidden, _ = model.extend(
      params, jnp.concatenate([tokens_DT, fed_DRS.reshape(num_docs, num_fed)], 1),
      jnp.concatenate([positions, own_positions.reshape(num_docs, num_fed)], 1), (),
      kv_cache.tree(model.ops, length, lengths_DR))
  first = jnp.take_along_axis(hidden[:, :length], (lengths_DR - 1)[..., None], axis=1)
  own = hidden[:, length:].reshape(num_docs, num_branches, num_own - 1, hidden.shape[-1])
  return jnp.concatenate([first[:, :, None], own], 2)
