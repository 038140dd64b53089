"""What a learner reads of a policy for each response token: log-probability, entropy, value."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxrl_pt import config as cfg
from jaxrl_pt.models.base import Model
from jaxrl_pt.models.logprobs import TokenScores, token_logprobs
from jaxrl_pt.sampling import branch, policies
from jaxrl_pt.train import accumulate, group_parts
from jaxrl_pt.types import Array, Params, Prompts, SelectedBlocks


def response_scores(model: Model, params: Params, prompts: Prompts, tokens_NGS: Array,
                    sampler: cfg.Sampler, loss_chunk: int = 0,
                    selected: SelectedBlocks | tuple[()] = ()) -> TokenScores:
  """Scores of response tokens under the distribution that the sampler draws from.

  Values and gradients equal those of `Model.apply` on the N · G whole sequences, or with `selected`
  those of the sparse steps that drew the responses.

  Args:
    model, params: the policy.
    prompts: N prompts.
    tokens_NGS: i32[N, G, S] tokens of G responses to each prompt.
    sampler: temperature and filters.
    loss_chunk: tokens whose logits exist at a time (`logprobs.token_logprobs`); 0 takes all.
    selected: the blocks of the context that each token was drawn from; () for all of it.

  Returns:
    TokenScores of f32[N, G, S] arrays, which hold garbage where a response has ended.
  """
  hidden = branch.response_hidden(model, params, prompts, tokens_NGS, selected=selected)
  return of_hidden(model, params, hidden, tokens_NGS, sampler, loss_chunk)


def of_hidden(model: Model, params: Params, hidden_NGSD: Array, tokens_NGS: Array,
              sampler: cfg.Sampler, loss_chunk: int) -> TokenScores:
  """The same of hidden states f[N, G, S, D] that have been computed already."""
  return token_logprobs(
      hidden_NGSD, model.head(params), tokens_NGS, loss_chunk,
      lambda logits, tokens: policies.learner_logits(logits, tokens, sampler))


def values(head: Any, hidden_NGSD: Array) -> Array:
  """f32[N, G, S]: the value head's predictions, linear in the hidden state; 0 without a head."""
  if not head:
    return jnp.zeros(hidden_NGSD.shape[:-1])
  return hidden_NGSD.astype(jnp.float32) @ head['weight'] + head['bias']


def by_rows(function: Callable[[Prompts, Array, Any], Any], train: cfg.Train,
            algorithm: cfg.Algorithm, prompts: Prompts, tokens_NGS: Array, selected: Any) -> Any:
  """function(prompts, tokens, selected), computed for as few responses at a time as an update's.

  Args:
    function: its results are arrays [N, G, …].
    train, algorithm: the settings that cut a batch into micro-batches.
    prompts, tokens_NGS: the batch's prompts and responses.
    selected: the blocks of the context that the tokens were drawn from, or ().
  """
  num_docs, parts = prompts.tokens.shape[0], train.group_parts
  rows = group_parts.repeat(prompts, parts), *group_parts.split_responses(
      (tokens_NGS, selected), num_docs, parts)
  results = accumulate.mapped(lambda rows: function(*rows), rows,
                              algorithm.minibatches * train.accumulation, num_docs * parts)
  return group_parts.join_responses(results, num_docs, parts)
