"""Reinforcement pre-training: the loop round the one-program step of `rl_step`.

The pretrained policy is restored and, frozen, scores positions by the entropy of its
prediction; those it is unsure of become prompts. Each step generates, verifies, computes
advantages and updates on the device; the same held-out positions are scored before the
first step, on the way, and after the last, under the same decoding.
"""

from collections.abc import Callable
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics, report
from jaxrl_pt.checkpoint import Checkpointer
from jaxrl_pt.data import loader, next_token
from jaxrl_pt.errors import UserError
from jaxrl_pt.models.base import Model
from jaxrl_pt.train import evaluate, optim, programs, rl_step
from jaxrl_pt.train import session as sessions
from jaxrl_pt.train import state as states
from jaxrl_pt.train.interrupt import stop_on_signals
from jaxrl_pt.types import Array, Batch, Params, Prompts, Weighted
from jaxrl_pt.verifiers import next_token as verifier

# Folded into the run's key in place of a step: evaluation draws the same noise every time.
EVALUATION_STREAM = 2**31 - 1
EVALUATION_SAMPLES = 8


def train(run: cfg.Run, workdir: Path, resolved_text: str) -> None:
  """Runs RPT to its last step in `workdir`, resuming what is there.

  Args:
    run: with an RPT objective, whose start_from names a pretraining work directory.
    workdir: receives config.gin, positions, checkpoints/, metrics.jsonl, report.html.
    resolved_text: the run as gin text, saved with it.

  Raises:
    UserError: a mistake in settings or files, a full disk, a non-finite loss.
  """
  # --- Open ---------------------------------------------------------------------
  method = run.objective
  assert isinstance(method, cfg.RPT)
  start = evaluate.load_policy(Path(method.start_from), mesh=run.mesh)
  _check_start(run, method, start)
  sessions.claim_workdir(workdir, resolved_text)
  session = sessions.open_session(run, workdir, resolved_text, Path(method.start_from) / 'data')
  model = session.model(run.model)
  optimizer = optim.make_optimizer(run.optimizer, run.train.num_steps)
  entropy = jax.jit(functools.partial(next_token.position_entropy, model))
  positions = _choose_positions(session, method, entropy, start.params, 'train')
  held_out = _choose_positions(session, method, entropy, start.params, 'validation')
  stop_id = session.data.tokenizer.eos_id
  table = verifier.token_table(session.data.tokenizer.token_bytes(), run.model.vocab_size)
  step_fn = programs.rpt_step(run, session.mesh, optimizer, table, stop_id)
  score = _make_scorer(session, method, model, table, stop_id, held_out)

  with Checkpointer(workdir / 'checkpoints', run.checkpoint) as checkpointer, \
       stop_on_signals() as stop:
    # --- Restore or start from the pretrained policy -----------------------------
    abstract = states.abstract_state(model, optimizer, session.mesh)
    state, _ = sessions.restore_or_init(
        session, checkpointer, abstract,
        lambda start=start: states.state_of(start.params, optimizer, abstract))
    del start
    first = int(state.step)
    writer = metrics.Writer(workdir, resume_step=first or -1, num_steps=run.train.num_steps,
                            tensorboard=run.train.tensorboard, log_every=run.train.log_every)
    recorder = sessions.Recorder(
        writer, checkpointer, session.mesh,
        metrics.flops_per_token(run.model, method.rollouts.prompt_len / 2))

    with writer:
      if first == 0:
        writer.write(0, score(state.params), {})

      # --- Train ------------------------------------------------------------------
      for step in range(first, run.train.num_steps):
        rows = positions.take(next_token.step_rows(
            len(positions), method.rollouts.num_prompts, run.seed, step))
        prompts = _prompts(session.data.train, rows, method)
        state, values = step_fn(state, session.put_rows(prompts))
        recorder.dispatched(step + 1, values, rows.example, programs.num_tokens(run))

        is_last = step + 1 == run.train.num_steps
        if is_last or (step + 1) % run.train.eval_every == 0:
          recorder.add(score(state.params))
        if is_last or stop.signal_name or (step + 1) % run.checkpoint.every == 0:
          recorder.flush()
          checkpointer.save(step + 1, state,
                            sessions.checkpoint_extras(session, {'step': step + 1}))
          recorder.restart_clock()
        if stop.signal_name and not is_last:
          checkpointer.wait()
          print(f'{stop.signal_name}: checkpoint written at step {step + 1}; run the same '
                'command to go on.', flush=True)
          return
  if jax.process_index() == 0:
    report.write_report(workdir)


def _check_start(run: cfg.Run, method: cfg.RPT, start: evaluate.Policy) -> None:
  if run.train.accumulation != 1:
    raise UserError(f'Train.accumulation = {run.train.accumulation} is for pretraining only: set '
                    'it to 1 and lower Rollouts.num_prompts if memory is short.')
  ours, theirs = dataclasses.asdict(run.model), dataclasses.asdict(start.model.config)
  for name, value in ours.items():
    if value != theirs[name]:
      raise UserError(f'Model.{name} = {value!r}, but the policy in {method.start_from} ends with '
                      f'{theirs[name]!r}: set it to that.')


# --- Positions and prompts ------------------------------------------------------


def _choose_positions(
    session: sessions.Session, method: cfg.RPT, entropy: Callable[[Params, Batch], Array],
    params: Params, split: str) -> next_token.Positions:
  """Positions of a split whose entropy under the starting policy is at least the minimum.

  Of the split, `scored_examples` examples spread evenly over it are scored; of the
  validation split's positions, `eval_positions` are taken by a fixed permutation.

  Raises:
    UserError: no position is left.
  """
  held_out = split == 'validation'
  packed = session.data.validation if held_out else session.data.train
  minimum = method.difficulty[0] if held_out else method.min_entropy
  predictable = np.array([len(b) > 0 for b in session.data.tokenizer.token_bytes()]
                         + [False] * (session.run.model.vocab_size
                                      - session.data.tokenizer.vocab_size))

  def score() -> next_token.Positions:
    parts = []
    for batch in _spread(packed, session.run.train.batch_size, method.scored_examples):
      values = np.asarray(entropy(params, session.put_global(batch)))
      parts.append(next_token.select_positions(values, batch, min_entropy=minimum,
                                               min_context=min(8, method.rollouts.prompt_len),
                                               predictable=predictable))
    return next_token.concatenate(parts)

  key = next_token.table_key(params, split=split, min_entropy=minimum, digest=packed.digest,
                             prompt_len=method.rollouts.prompt_len,
                             examples=method.scored_examples)
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


def _prompts(packed: loader.Packed, rows: next_token.Positions, method: cfg.RPT) -> Prompts:
  """Prompts of these positions. The truth is four times as many tokens as the prediction may
  have; a right prediction that the truth spells in still more tokens counts as wrong."""
  examples = packed.batch(np.unique(rows.example))
  return next_token.build_prompts(examples, rows, prompt_len=method.rollouts.prompt_len,
                                  num_continuation=programs.continuation_len(method))


# --- Held-out accuracy ----------------------------------------------------------


def _make_scorer(session: sessions.Session, method: cfg.RPT, model: Model,
                 table: verifier.TokenBytes, stop_id: int,
                 held_out: next_token.Positions) -> Callable[[Params], dict[str, float]]:
  """score(params) → validation/{easy,medium,hard}_{sampled,argmax,count}."""
  key = jax.random.fold_in(jax.random.key(session.run.seed), EVALUATION_STREAM)
  accuracy = jax.jit(lambda params, prompts: rl_step.next_token_accuracy(
      model, params, prompts, key, table, method=method, num_samples=EVALUATION_SAMPLES,
      stop_id=stop_id))
  rows = _prompts(session.data.validation, held_out, method)
  size = 4 * method.rollouts.num_prompts
  total = -(-len(held_out) // size) * size
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


