"""RPT's prompts: positions that the start policy is unsure of, as prompts with their truth.

A frozen proxy, the pretrained policy or another checkpoint, scores positions by the entropy of
its prediction; those it is unsure of become prompts. The response is the prediction, or a
thought that ends with one. The same held-out positions are scored before the first step, on
the way, and after the last, under the same decoding (2506.08007).
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
from jaxrl_pt.data import loader, next_token, splits, template_text, templates
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.environments.base import Environment
from jaxrl_pt.environments.rlp import Markers, policy_verifier
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.hosts import on_host
from jaxrl_pt.run import places, policy
from jaxrl_pt.run import session as sessions
from jaxrl_pt.sampling import decode
from jaxrl_pt.token_bytes import TokenBytes, token_table
from jaxrl_pt.train.fused import PolicyVerifier
from jaxrl_pt.types import Array, Batch, Params, Prompts, Weighted
from jaxrl_pt.verifiers import next_token as verifier
from jaxrl_pt.verifiers.base import DeviceVerifier

# Folded into the run's key in place of a step: evaluation draws the same noise every time.
EVALUATION_STREAM = 2**31 - 1
EVALUATION_SAMPLES = 8


def make_environment(session: sessions.Session, method: cfg.RPT, model: Model, start: Params
                     ) -> Environment:
  """Chooses the positions under the proxy; prompts, verifier and held-out accuracy.

  Raises:
    UserError: no position is left, a proxy with another tokenizer, a marker that is not one
      token.
  """
  proxy, proxy_params = _proxy(session, method, model, start)
  entropy = jax.jit(functools.partial(next_token.position_entropy, proxy))
  positions = _choose_positions(session, method, entropy, proxy_params, 'train')
  held_out = _choose_positions(session, method, entropy, proxy_params, 'validation')
  tokenizer = session.data.tokenizer
  template = prompt_template(method.prediction, tokenizer)
  table = _table(session, template)
  take = _taker(session, method, positions, template)
  of_responses: DeviceVerifier | PolicyVerifier
  if isinstance(method.reward, cfg.InformationGain):
    markers = Markers(template.num_after, template.marker)
    of_responses = policy_verifier(markers, method.reward.decay)
  else:
    of_responses = DeviceVerifier(verifier.device_verifier(table, method.reward, template.marker))
  return Environment(
      take, of_responses,
      _make_scorer(session, method, model, table, tokenizer.eos_id, template, held_out),
      _digest(positions))


@dataclass(frozen=True)
class PromptTemplate:
  """What stands after a context, and the token after which a response predicts."""

  tokens: templates.TokenTemplate = templates.TokenTemplate()
  marker: int = verifier.NO_MARKER

  @property
  def num_after(self) -> int:
    """Tokens of a prompt that are not its context's."""
    return len(self.tokens.after)


def prompt_template(prediction: cfg.Prediction, tokenizer: Tokenizer) -> PromptTemplate:
  """The template of a kind of prediction in a tokenizer's tokens.

  Raises:
    UserError: a marker that is not one token.
  """
  match prediction:
    case cfg.Direct():
      return PromptTemplate()
    case cfg.Reason(think=think, answer=answer):
      ids = []
      for name, text in (('think', think), ('answer', answer)):
        found = template_text.encode(tokenizer, template_text.template(text))
        if len(found) != 1:
          raise UserError(f'Reason.{name} = {text!r} is {len(found)} tokens: choose a text that '
                          'is one and that the corpus does not use.')
        ids += found
      return PromptTemplate(templates.TokenTemplate(after=(ids[0],)), ids[1])


def continuation_len(method: cfg.RPT) -> int:
  """Tokens of truth that a prompt carries along."""
  return 4 * method.rollouts.response_tokens


def _table(session: sessions.Session, template: PromptTemplate) -> TokenBytes:
  """Bytes of the vocabulary; markers spell nothing in a prediction."""
  spelled = list(session.data.tokenizer.token_bytes())
  for marker in (*template.tokens.after, template.marker):
    if marker != verifier.NO_MARKER:
      spelled[marker] = b''
  return token_table(spelled, session.run.model.vocab_size)


def _proxy(session: sessions.Session, method: cfg.RPT, model: Model,
           start: Params) -> tuple[Model, Params]:
  """The policy that says which positions are worth a prompt."""
  if not method.proxy_from:
    return model, start
  proxy = policy.load_policy(places.policy(method.proxy_from, session.workdir, 'proxy_from'),
                             mesh=session.run.mesh)
  if proxy.session.data.tokenizer.fingerprint != session.data.tokenizer.fingerprint:
    raise UserError(f'The proxy in {method.proxy_from} has another tokenizer than the policy in '
                    f'{method.start_from}: choose one that was trained with the same.')
  return proxy.model, proxy.params


def _digest(positions: next_token.Positions) -> str:
  return hashlib.sha256(positions.example.tobytes() + positions.t.tobytes()).hexdigest()


# --- Positions and prompts ------------------------------------------------------


def _choose_positions(
    session: sessions.Session, method: cfg.RPT, entropy: Callable[[Params, Batch], Array],
    params: Params, split: str) -> next_token.Positions:
  """Positions of a split whose entropy under the proxy is at least the minimum.

  Of the split, `scored_examples` examples spread evenly over it are scored; of the
  validation split's positions, `eval_positions` are taken by a fixed permutation.

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
  """Full batches of at most `num_examples` examples at even distances."""
  count = min(num_examples, len(packed))
  ids = np.unique(np.linspace(0, len(packed) - 1, count).astype(np.int64))
  ids = np.concatenate([ids, np.full(-len(ids) % batch_size, -1)])
  return [loader.padded_batch(packed, ids[i:i + batch_size])
          for i in range(0, len(ids), batch_size)]


def _taker(session: sessions.Session, method: cfg.RPT, positions: next_token.Positions,
           template: PromptTemplate) -> Callable[[int], tuple[Prompts, tuple[str, ...]]]:
  """take(batch) → the prompts of a batch, whose references they carry themselves.

  Raises:
    UserError: no document has as many positions as are to share one.
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
    plain = _prompts(packed, positions.take(rows), method, PromptTemplate())
    shared = next_token.share_documents(plain, per_document)
    after = np.broadcast_to(np.array(template.tokens.after, np.int32),
                            (len(shared.tokens), template.num_after))
    return (dataclasses.replace(shared, suffix=after) if template.num_after else shared), ()

  return take_documents


def _prompts(packed: loader.Packed, rows: next_token.Positions, method: cfg.RPT,
             template: PromptTemplate) -> Prompts:
  """Prompts of these positions in their template. The truth is four times as many tokens as the
  response may have; a right prediction that it spells in still more tokens counts as wrong."""
  examples = packed.batch(np.unique(rows.example))
  contexts = next_token.build_prompts(
      examples, rows, prompt_len=method.rollouts.prompt_len - template.num_after,
      num_continuation=continuation_len(method))
  return templates.apply(template.tokens, contexts)


# --- Held-out accuracy ----------------------------------------------------------


def _make_scorer(session: sessions.Session, method: cfg.RPT, model: Model,
                 table: TokenBytes, stop_id: int, template: PromptTemplate,
                 held_out: next_token.Positions) -> Callable[[Params], dict[str, float]]:
  """score(params) → validation/{easy,medium,hard}_{sampled,argmax,count}, and _direct where the
  policy reasons."""
  key = jax.random.fold_in(jax.random.key(session.run.seed), EVALUATION_STREAM)
  accuracy = jax.jit(lambda params, prompts: next_token_accuracy(
      model, params, prompts, key, table, method=method, num_samples=EVALUATION_SAMPLES,
      stop_id=stop_id, template=template))
  rows = _prompts(session.data.validation, held_out, method, template)
  distinct = next_token.distinct_rows(rows)  # A context that text repeats is measured once.
  rows = jax.tree.map(lambda x: x[distinct], rows)
  # No more rows at once than there are: those beyond would be drawn for nothing.
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
                        stop_id: int = decode.NO_STOP, template: PromptTemplate = PromptTemplate()
                        ) -> dict[str, Weighted]:
  """Prefix-match accuracy by difficulty, sampled as in training and by the argmax.

  The splits are nested as the paper writes them: entropy above each of
  `method.difficulty`. To be called under `jit`; sum the results over batches.

  Args:
    prompts: rows without a continuation (`pad_prompts`) are not counted.
    num_samples: responses per prompt when sampling; the argmax draws one.
    template: of the prompts; where it asks for a thought, 'argmax' thinks too, and 'direct' is the
      likeliest next token of the context itself, as of a model that only predicts.

  Returns:
    {easy,medium,hard}_{sampled,argmax,direct}; the count of an argmax entry is that of positions.
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
    drawn = decode.generate(model, params, asked, key, sampler=sampler, num_samples=samples,
                            num_tokens=num_tokens, stop_id=stop_id)
    correct = verifier.device_verifier(table, marker=marker)(asked, drawn).correct
    for split, threshold in zip(('easy', 'medium', 'hard'), method.difficulty, strict=True):
      counted = (prompts.extras['entropy'] > threshold) & (
          prompts.extras['continuation_lengths'] > 0)
      mask = jnp.broadcast_to(counted[:, None], correct.shape)
      results[f'{split}_{name}'] = Weighted.of(correct, mask)
  return results


# --- What the start policy has read -----------------------------------------------


def check_held_out(ours: cfg.Data, theirs: cfg.Data, start_from: str) -> None:
  """Refuses to measure a run on documents that the policy that it starts from was trained on.

  Args:
    ours: the run's corpus.
    theirs: that of its start policy.
    start_from: where that policy is, for messages.

  Raises:
    UserError: they share documents. It says how many of how many.
  """
  if _split_of(ours) == _split_of(theirs):
    return
  if isinstance(ours.source, cfg.Seqio) or isinstance(theirs.source, cfg.Seqio):
    return  # Their documents are ids of one vocabulary or another, not texts.
  splits.refuse_overlap(_read(theirs, start_from), loader.split_keys(ours, held_out=True),
                        'documents', f'split Data as the policy in {start_from} did.')


def _split_of(data: cfg.Data) -> tuple[object, ...]:
  """The settings that decide which documents are on which side."""
  return data.source, data.validation_fraction, data.validation_glob


def _read(data: cfg.Data, start_from: str) -> Iterator[str]:
  try:
    yield from loader.split_keys(data, held_out=False)
  except UserError as error:
    print(f'Not checked: whether the policy in {start_from} has read the held-out documents, since '
          f'its corpus cannot be read. {error}', flush=True)
