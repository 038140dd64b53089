"""The learner's side of branch rollouts: a document and all its branches in one packed row.

A branch is a prompt that ends at a position of a document, together with one response. The sampler
(`groups.generate`) prefills a document once for all its branches; here one forward pass under a
tree mask gives the hidden states of all of them. Values and gradients equal those of whole
sequences up to the order of sums.

E is the model width and D counts documents.
"""

import jax.numpy as jnp

from jaxrl_pt.models import kv_cache
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import resa_replay
from jaxrl_pt.sampling.prefill import Prefilled
from jaxrl_pt.types import Array, Params, Prompts, SelectedBlocks


def documents(tokens_DT: Array, lengths_DP: Array, ids_DP: Array, suffix_DM: Array | tuple[()] = ()
              ) -> Prompts:
  """Prompts that end at P positions of each of D documents.

  Args:
    tokens_DT: i32[D, T] right-padded documents.
    lengths_DP: i32[D, P] in [1, T], how many tokens of the document belong to each prompt.
    ids_DP: i32[D, P] ids of the prompts, which address the randomness.
    suffix_DM: i32[D, M] tokens that follow each prompt's part of a document, or () for none.
  """
  return Prompts(tokens_DT, lengths_DP.reshape(-1), ids_DP.reshape(-1), suffix_DM)


def response_hidden(model: Model, params: Params, prompts: Prompts, tokens_NGS: Array,
                    prefilled: Prefilled | None = None,
                    selected: SelectedBlocks | tuple[()] = ()) -> Array:
  """f[N, G, S, E]: the hidden state that each response token is predicted from.

  Each document goes through the model once, or not at all where `prefilled` holds its forward pass
  by the same parameters. The result is differentiable in `prefilled`, too. With `selected`, a token
  sees no more of its context than the sampler's sparse attention did (`resa_replay`).
  """
  if isinstance(selected, SelectedBlocks) and tokens_NGS.shape[-1] > 1:
    return resa_replay.response_hidden(model, params, prompts, tokens_NGS, selected, prefilled)
  num_docs, (num_samples, num_tokens) = prompts.tokens.shape[0], tokens_NGS.shape[1:]
  lengths_DR = jnp.repeat(prompts.lengths.reshape(num_docs, -1), num_samples, 1)
  own = tokens_NGS.reshape(num_docs, -1, num_tokens)
  if prompts.num_suffix:
    suffix = jnp.repeat(prompts.suffix[:, None], own.shape[1], 1)
    own = jnp.concatenate([suffix, own], -1)
  if prefilled is None:
    hidden = tree_hidden(model, params, prompts.tokens, lengths_DR, own)
  else:
    hidden = own_hidden(model, params, prefilled, lengths_DR, own)
  return hidden[:, :, prompts.num_suffix:].reshape(*tokens_NGS.shape, hidden.shape[-1])


def tree_hidden(model: Model, params: Params, tokens_DT: Array, lengths_DR: Array,
                own_DRS: Array) -> Array:
  """Hidden states that each branch's own tokens are predicted from, in one packed forward pass.

  Row d holds [document d | own tokens of its R branches]. The tree mask lets branch r see the
  document's positions below lengths[d, r] and its own tokens. The result is differentiable in
  `params`.

  Args:
    model: the model that scores the responses.
    params: its parameters.
    tokens_DT: i32[D, T] right-padded documents.
    lengths_DR: i32[D, R] in [1, T], how many tokens of its document each branch sees.
    own_DRS: i32[D, R, S] the branches' own tokens: suffix and response.

  Returns:
    f[D, R, S, E]; entry s is the hidden state of the token before own token s.
  """
  length = tokens_DT.shape[1]
  fed, fed_positions = _fed(lengths_DR, own_DRS)
  positions = jnp.broadcast_to(jnp.arange(length), tokens_DT.shape)
  hidden, _ = model.extend(
      params, jnp.concatenate([tokens_DT, fed], 1), jnp.concatenate([positions, fed_positions], 1),
      (), kv_cache.tree(model.ops, length, lengths_DR))
  return _before_each(hidden[:, :length], hidden[:, length:], lengths_DR)


def own_hidden(model: Model, params: Params, prefilled: Prefilled, lengths_DR: Array,
               own_DRS: Array) -> Array:
  """`tree_hidden` where the documents have gone through the model: only the own tokens still do."""
  fed, positions = _fed(lengths_DR, own_DRS)
  hidden = jnp.zeros((*fed.shape, prefilled.hidden.shape[-1]), prefilled.hidden.dtype)
  if fed.size:
    hidden, _ = model.extend(params, fed, positions, (),
                             kv_cache.branches_of(prefilled.cache, lengths_DR))
  return _before_each(prefilled.hidden, hidden, lengths_DR)


def _fed(lengths_DR: Array, own_DRS: Array) -> tuple[Array, Array]:
  """i32[D, R · (S − 1)] the own tokens that another one follows, and their positions."""
  fed_DRS = own_DRS[..., :-1]
  positions = lengths_DR[..., None] + jnp.arange(fed_DRS.shape[-1])
  return (fed_DRS.reshape(own_DRS.shape[0], -1), positions.reshape(own_DRS.shape[0], -1))


def _before_each(hidden_DTE: Array, fed_DQE: Array, lengths_DR: Array) -> Array:
  """f[D, R, S, E]: states of the last document token that each branch sees, then of its own."""
  # The gradients of all branches that start at one token are summed in float32, as it is read.
  first = jnp.take_along_axis(hidden_DTE.astype(jnp.float32), (lengths_DR - 1)[..., None], axis=1)
  first = first.astype(hidden_DTE.dtype)
  own = fed_DQE.reshape(*lengths_DR.shape, -1, fed_DQE.shape[-1])
  return jnp.concatenate([first[:, :, None], own], 2)
