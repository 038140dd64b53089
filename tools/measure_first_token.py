"""Has a model learned what begins a document? `python tools/measure_first_token.py WORKDIR`.

On the held-out text of a pretraining run, in nats a token: the loss at the first token of each
document, after the beginning token, beside what the frequencies of all training tokens and those
of documents' first tokens (each with one added) would give for the same tokens.
"""

from pathlib import Path
import sys

import jax
import numpy as np

from jaxrl_pt.data import loader
from jaxrl_pt.models import logprobs
from jaxrl_pt.run.policy import load_policy

ROWS = 16  # of a batch


def main(workdir: Path) -> None:
  policy = load_policy(workdir)
  data, model = policy.session.data, policy.model
  bos, size = data.tokenizer.bos_id, model.config.vocab_size
  firsts = lambda batch: (batch.positions == 0) & (batch.tokens == bos) & (batch.weights > 0)
  everywhere, beginnings = np.ones(size), np.ones(size)
  for batch in loader.eval_batches(data.train, ROWS):
    np.add.at(everywhere, batch.targets[batch.weights > 0], 1)
    np.add.at(beginnings, batch.targets[firsts(batch)], 1)

  @jax.jit
  def score(params, batch):
    hidden = model.apply(params, batch.tokens, batch.positions, batch.segments)
    return logprobs.token_logprobs(hidden, model.head(params), batch.targets).logp

  losses, targets = [], []
  for batch in loader.eval_batches(data.validation, ROWS):
    losses.append(-np.asarray(score(policy.params, batch))[firsts(batch)])
    targets.append(batch.targets[firsts(batch)])
  target = np.concatenate(targets)
  print(f'{len(target)} documents; nats at their first token: '
        f'{np.concatenate(losses).mean():.2f} by the model, '
        f'{-np.log(everywhere / everywhere.sum())[target].mean():.2f} by the frequency of tokens, '
        f'{-np.log(beginnings / beginnings.sum())[target].mean():.2f} by that of first tokens')


if __name__ == '__main__':
  main(Path(sys.argv[1]))
