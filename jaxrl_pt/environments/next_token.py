"""RPT's environment: prompts that ask for the next tokens at positions of a corpus.

A frozen proxy (the policy that the run starts from, or another checkpoint) scores positions by the
entropy of its prediction, and positions of high entropy become prompts. The response is the
prediction, or a thought that ends with one. Held-out accuracy is measured on the same positions
with the same decoding before, during and after training (2506.08007).
"""

from collections.abc import Callable, Iterator
import dataclasses
from dataclasses import dataclass
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt.data import build, loader, next_token, splits, template_text, templates
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.environments.base import Task
from jaxrl_pt.environments.rlp import Markers, policy_verifier
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.hosts import on_host
from jaxrl_pt.run import places, policy
from jaxrl_pt.run import session as sessions
from jaxrl_pt.sampling import groups
from jaxrl_pt.token_bytes import TokenBytes, token_table
from jaxrl_pt.train.fused import PolicyVerifier
from jaxrl_pt.types import Array, Batch, Params, Prompts, Weighted
from jaxrl_pt.verifiers import next_token as verifier
from jaxrl_pt.verifiers.base import DeviceVerifier

# Folded into the run's key in place of a batch's number, so that every evaluation draws the same
# noise, which no training batch draws.
EVALUATION_STREAM = 2**31 - 1
EVALUATION_SAMPLES = 8  # sampled responses to each held-out prompt


def make_environment(session: sessions.Session, method: cfg.RPT, model: Model,
                     reference_params: Params) -> Task:
  """Chooses positions under the proxy and makes them an environment.

  Args:
    session: the run's session.
    method: the run's objective.
    model: the policy's model.
    reference_params: the reference policy's parameters, which are the proxy's if the run names no
      other.

  Raises:
    UserError: no position is left, the proxy has another tokenizer, or a marker is not one token.
  """
  proxy, proxy_params = _proxy(session, method, model, reference_params)
  entropy = jax.jit(functools.partial(next_token.position_entropy, proxy))
  positions = _choose_positions(session, method, entropy, proxy_params, 'train')
  held_out = _choose_positions(session, method, entropy, proxy_params, 'validation')
  tokenizer = session.data.tokenizer
  template = prompt_template(method.prediction, tokenizer)
  table = _table(session, template)
  take = _taker(session, method, positions, template)
  response_verifier: DeviceVerifier | PolicyVerifier
  if isinstance(method.reward, cfg.InformationGain):
    markers = Markers(template.num_after, template.marker)
    response_verifier = policy_verifier(markers, method.reward.decay)
  else:
    response_verifier = DeviceVerifier(
        verifier.device_verifier(table, method.reward, template.marker))
  return Task(
      take, response_verifier,
      _make_scorer(session, method, model, table, tokenizer.stop_ids, template, held_out),
      _digest(positions))


@dataclass(frozen=True)
class PromptTemplate:
  """The tokens that stand after a context, and the token after which a response predicts."""

  tokens: templates.TokenTemplate = templates.TokenTemplate()
  marker: int = verifier.NO_MARKER  # the answer marker, or NO_MARKER if all of it is prediction

  @property
  def num_after(self) -> int:
    """The number of a prompt's tokens that stand after its context."""
    return len(self.tokens.after)


def prompt_template(prediction: cfg.Prediction, tokenizer: Tokenizer) -> PromptTemplate:
  """The prompt template of a kind of prediction, in a tokenizer's tokens.

  Raises:
    UserError: a marker is not one token.
  """
  match prediction:
    case cfg.Direct():
      return PromptTemplate()
    case cfg.Reason(think=think, answer=answer):
      before = template_text.one_token(tokenizer, 'Reason.think', think)
      return PromptTemplate(templates.TokenTemplate(after=(before,)),
                            template_text.one_token(tokenizer, 'Reason.answer', answer))


def continuation_len(method: cfg.RPT) -> int:
  """The number of true next tokens that a prompt carries for the verifier."""
  return 4 * method.rollouts.response_tokens


def _table(session: sessions.Session, template: PromptTemplate) -> TokenBytes:
  """The bytes of the vocabulary's tokens, where markers have none: they spell no prediction."""
  spelled = list(session.data.tokenizer.token_bytes())
  for marker in (*template.tokens.after, template.marker):
    if marker != verifier.NO_MARKER:
      spelled[marker] = b''
  return token_table(spelled, session.run.model.vocab_size)


def _proxy(session: sessions.Session, method: cfg.RPT, model: Model,
           reference_params: Params) -> tuple[Model, Params]:
  """The proxy, whose entropy chooses positions: that of `proxy_from`, or the reference policy."""
  if not method.proxy_from:
    return model, reference_params
  proxy = policy.load_policy(places.policy(method.proxy_from, session.workdir, 'proxy_from'),
                             mesh=session.run.mesh)
  if proxy.session.data.tokenizer.fingerprint != session.data.tokenizer.fingerprint:
    raise UserError(f'The proxy in {method.proxy_from} has another tokenizer than the policy in '
                    f'{method.start_from}: choose one that was trained with the same.')
  return proxy.model, proxy.params


def _digest(positions: next_token.Positions) -> str:
  """A hash of the positions, without their entropies."""
  return hashlib.sha256(positions.example.tobytes() + positions.t.tobytes()).hexdigest()


# --- Positions and prompts ------------------------------------------------------


def _choose_positions(
    session: sessions.Session, method: cfg.RPT, entropy: Callable[[Params, Batch], Array],
    params: Params, split: str) -> next_token.Positions:
  """The positions of a split whose entropy under the proxy is at least the minimum.

  At most `RPT.scored_examples` examples are scored, spread evenly over the split. Of the validation
  split's positions a fixed permutation chooses `RPT.eval_positions`.

  Args:
    session, method: the run's session and objective.
    entropy: (parameters, batch) → f32[B, T], the entropy at each position, nats.
    params: the proxy's parameters.
    split: 'train' or 'validation'.

  Raises:
    UserError: no position is left.
  """
  held_out = split == 'validation'
  packed = session.data.validation if held_out else session.data.train
  minimum = method.difficulty[0] if held_out else method.min_entropy
  prompt_len = method.rollouts.prompt_len
  predictable = np.array([len(b) > 0 for b in session.data.tokenizer.token_bytes()]
                         + [False] * (session.run.model.vocab_size
                                      - session.data.tokenizer.vocab_size))

  def score() -> next_token.Positions:
    parts = []
    for batch in _spread(packed, session.run.train.batch_size, method.scored_examples):
      values = on_host(entropy(params, session.put_global(batch)))
      parts.append(next_token.select_positions(values, batch, min_entropy=minimum,
                                               min_context=min(8, prompt_len),
                                               predictable=predictable))
    return next_token.concatenate(parts)

  key = next_token.table_key(params, split=split, min_entropy=minimum, digest=packed.digest,
                             prompt_len=prompt_len, examples=method.scored_examples)
  positions = next_token.load_or_score(session.workdir / f'positions-{split}.npz', key, score)
  if len(positions) == 0:
    raise UserError(f'No position of the {split} split has an entropy of {minimum:g} nats: lower '
                    'RPT.min_entropy and RPT.difficulty.')
  if held_out:
    order = np.random.default_rng(0).permutation(len(positions))
    positions = positions.take(np.sort(order[:method.eval_positions]))
  return positions


def _spread(packed: loader.Packed, batch_size: int, num_examples: int) -> list[Batch]:
  """Batches of at most `num_examples` examples at even distances; padding fills the last batch."""
  count = min(num_examples, len(packed))
  ids = np.unique(np.linspace(0, len(packed) - 1, count).astype(np.int64))
  ids = np.concatenate([ids, np.full(-len(ids) % batch_size, -1)])
  return [loader.padded_batch(packed, ids[i:i + batch_size])
          for i in range(0, len(ids), batch_size)]


def _taker(session: sessions.Session, method: cfg.RPT, positions: next_token.Positions,
           template: PromptTemplate) -> Callable[[int], tuple[Prompts, tuple[str, ...]]]:
  """take(batch) → (prompts, ()): the prompts carry their reference answers themselves.

  Raises:
    UserError: no document has `RPT.positions_per_document` positions.
  """
  packed, seed, num_prompts = session.data.train, session.run.seed, method.rollouts.num_prompts
  per_document = method.positions_per_document
  if per_document == 1:
    def take(batch: int) -> tuple[Prompts, tuple[str, ...]]:
      rows = next_token.step_rows(len(positions), num_prompts, seed, batch)
      return _prompts(packed, positions.take(rows), method, template), ()
    return take

  documents = next_token.document_rows(
      packed.batch(np.unique(positions.example)), positions,
      prompt_len=method.rollouts.prompt_len - template.num_after, num_positions=per_document)
  if len(documents) == 0:
    raise UserError(f'No document has {per_document} positions of at least {method.min_entropy:g} '
                    f'nats in its first {method.rollouts.prompt_len} tokens: lower '
                    'RPT.positions_per_document or RPT.min_entropy.')

  def take_documents(batch: int) -> tuple[Prompts, tuple[str, ...]]:
    rows = next_token.step_documents(documents, num_prompts // per_document, per_document, seed,
                                     batch)
    contexts = _prompts(packed, positions.take(rows), method, PromptTemplate())
    shared = next_token.share_documents(contexts, per_document)
    after = np.broadcast_to(np.array(template.tokens.after, np.int32),
                            (len(shared.tokens), template.num_after))
    return (dataclasses.replace(shared, suffix=after) if template.num_after else shared), ()

  return take_documents


def _prompts(packed: loader.Packed, rows: next_token.Positions, method: cfg.RPT,
             template: PromptTemplate) -> Prompts:
  """The prompts of some positions, in the prompt template.

  Their continuation has `continuation_len` true tokens. A right prediction whose bytes take still
  more true tokens counts as wrong.
  """
  examples = packed.batch(np.unique(rows.example))
  contexts = next_token.build_prompts(
      examples, rows, prompt_len=method.rollouts.prompt_len - template.num_after,
      num_continuation=continuation_len(method))
  return templates.apply(template.tokens, contexts)


# --- Held-out accuracy ----------------------------------------------------------


def _make_scorer(session: sessions.Session, method: cfg.RPT, model: Model,
                 table: TokenBytes, stop_ids: tuple[int, ...], template: PromptTemplate,
                 held_out: next_token.Positions) -> Callable[[Params], dict[str, float]]:
  """score(params) → validation/{easy,medium,hard}_{sampled,argmax,count} on held-out positions.

  If the policy reasons before it predicts, there is validation/{easy,medium,hard}_direct too.
  """
  key = jax.random.fold_in(jax.random.key(session.run.seed), EVALUATION_STREAM)
  accuracy = jax.jit(lambda params, prompts: next_token_accuracy(
      model, params, prompts, key, table, method=method, num_samples=EVALUATION_SAMPLES,
      stop_ids=stop_ids, template=template))
  rows = _prompts(session.data.validation, held_out, method, template)
  # A context that the text repeats is measured once.
  distinct = next_token.distinct_rows(rows)
  rows = jax.tree.map(lambda x: x[distinct], rows)
  # A batch has no more rows than there are prompts, since responses to padding count for nothing.
  size = min(4 * method.rollouts.num_prompts, rules.whole_rows(session.mesh, len(distinct)))
  total = -(-len(distinct) // size) * size
  rows = next_token.pad_prompts(rows, total)
  batches = [session.put_rows(jax.tree.map(lambda x, i=i: x[i:i + size], rows))
             for i in range(0, total, size)]

  def score(params: Params) -> dict[str, float]:
    sums: dict[str, Any] = {}
    for batch in batches:
      for name, value in accuracy(params, batch).items():
        old = sums.get(name)
        sums[name] = value if old is None else Weighted(old.sum + value.sum,
                                                        old.count + value.count)
    results = {f'validation/{k}': v for k, v in metrics.host_values(sums).items()}
    counts = {f'validation/{k.removesuffix("_argmax")}_count': float(v.count)
              for k, v in sums.items() if k.endswith('_argmax')}
    return {**results, **counts}

  return score


def next_token_accuracy(model: Model, params: Params, prompts: Prompts, key: Array,
                        table: TokenBytes, *, method: cfg.RPT, num_samples: int,
                        stop_ids: tuple[int, ...] = groups.NO_STOP,
                        template: PromptTemplate = PromptTemplate()) -> dict[str, Weighted]:
  """Prefix-match accuracy by difficulty, sampled as in training and by the argmax.

  The splits are nested, as in the paper: a position is in each split whose threshold in
  `method.difficulty` its entropy exceeds. Call it under `jit`, and add up the results of batches.

  Args:
    model, params: the policy.
    prompts: held-out prompts. Rows without a continuation, which are padding, are not counted.
    key: the key of the sampler's noise.
    table: the bytes of the vocabulary's tokens.
    method: the run's objective.
    num_samples: responses per prompt when sampling; the argmax draws one.
    stop_ids: the tokens of which any ends a response.
    template: the prompts' template. If it asks for a thought, 'argmax' thinks too, and 'direct' is
      the likeliest next token of the context alone, as of a model that only predicts.

  Returns:
    {easy,medium,hard}_{sampled,argmax,direct}. The count of an argmax entry is the number of
    positions.
  """
  greedy = cfg.Sampler(temperature=0.0, banned=method.rollouts.sampler.banned)
  thinks = prompts, template.marker, method.rollouts.response_tokens
  modes = {'sampled': (method.rollouts.sampler, num_samples, *thinks),
           'argmax': (greedy, 1, *thinks)}
  if template.marker != verifier.NO_MARKER:
    contexts = dataclasses.replace(
        prompts, lengths=jnp.maximum(prompts.lengths - template.num_after, 1))
    modes['direct'] = greedy, 1, contexts, verifier.NO_MARKER, 1
  results = {}
  for name, (sampler, samples, asked, marker, num_tokens) in modes.items():
    rollouts = groups.generate(model, params, asked, key, sampler=sampler, num_samples=samples,
                               num_tokens=num_tokens, stop_ids=stop_ids)
    correct = verifier.device_verifier(table, marker=marker)(asked, rollouts).correct
    for split, threshold in zip(('easy', 'medium', 'hard'), method.difficulty, strict=True):
      counted = (prompts.extras['entropy'] > threshold) & (
          prompts.extras['continuation_lengths'] > 0)
      mask = jnp.broadcast_to(counted[:, None], correct.shape)
      results[f'{split}_{name}'] = Weighted.of(correct, mask)
  return results


# --- What the start policy has read -----------------------------------------------


def check_held_out(ours: cfg.Data, theirs: cfg.Data, start_from: str) -> None:
  """Refuses held-out documents on which the policy that the run starts from was trained.

  Args:
    ours: the run's corpus.
    theirs: the corpus of the policy that the run starts from.
    start_from: where that policy is, for messages.

  Raises:
    UserError: some held-out documents were trained on; it says how many of how many.
  """
  if _split_of(ours) == _split_of(theirs):
    return
  if isinstance(ours.source, cfg.Seqio) or isinstance(theirs.source, cfg.Seqio):
    return  # seqio's documents are ids of a vocabulary, which cannot be compared with texts.
  splits.refuse_overlap(_trained_on(theirs, start_from), build.split_keys(ours, held_out=True),
                        'documents', f'split Data as the policy in {start_from} did.')


def _split_of(data: cfg.Data) -> tuple[object, ...]:
  """The settings that decide which documents are held out."""
  return data.source, data.validation_fraction, data.validation_glob


def _trained_on(data: cfg.Data, start_from: str) -> Iterator[str]:
  """The keys of the documents that the policy in `start_from` was trained on.

  If its corpus cannot be read, this prints a note and gives no keys.
  """
  try:
    yield from build.split_keys(data, held_out=False)
  except UserError as error:
    print(f'Not checked: whether the policy in {start_from} has read the held-out documents, since '
          f'its corpus cannot be read. {error}', flush=True)
