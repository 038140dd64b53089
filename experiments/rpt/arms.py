"""The pieces that the arms of the experiment share: training, reinforcing, measuring."""

from collections.abc import Callable
from dataclasses import dataclass
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import next_token, splits, templates
from jaxrl_pt.environments.rlp import Markers, logp_after_thought, policy_verifier
from jaxrl_pt.models import transformer
from jaxrl_pt.models.base import Model
from jaxrl_pt.sampling import groups
from jaxrl_pt.token_bytes import TokenBytes, token_table
from jaxrl_pt.train import fused, losses, optim, step
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Batch, Params, Prompts, RolloutBatch, TrainState, Verdict
from jaxrl_pt.verifiers import next_token as verifier


@dataclass(frozen=True)
class Setting:
  """A model, its markers and the sizes of a reasoning response.

  prompt_len: of a context with its think marker; response: tokens of thought, marker,
  prediction and end. Settings hash, so that seeds share compiled programs.
  """

  config: cfg.Model
  token_bytes: tuple[bytes, ...]
  think: int
  answer: int
  end: int
  prompt_len: int
  response: int

  @functools.cached_property
  def model(self) -> Model:
    """With its layers unrolled."""
    return build(self.config)

  @functools.cached_property
  def table(self) -> TokenBytes:
    """What the verifier compares."""
    return token_table(self.token_bytes, self.config.vocab_size)


@functools.cache
def build(config: cfg.Model) -> Model:
  """The model of a shape, with its layers unrolled."""
  return transformer.build(config, cfg.Compute(unroll=0))


def batch_of(tokens: np.ndarray, weights: np.ndarray, ids: np.ndarray) -> Batch:
  """One document a row: tokens i32[B, T + 1], weights f32[B, T] of what is predicted."""
  num_rows, length = weights.shape
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), weights.shape)
  return Batch(tokens[:, :-1], tokens[:, 1:], positions, np.ones((num_rows, length), np.int32),
               weights.astype(np.float32), ids.astype(np.int32))


# --- Held out -----------------------------------------------------------------------


def unseen(training: np.ndarray, documents: np.ndarray,
           positions: next_token.Positions) -> tuple[next_token.Positions, splits.Apart]:
  """Positions whose context no training document begins with, each context once.

  Args:
    training, documents: i32[·, T + 1] tokens, a document a row; positions are of `documents`.

  Returns:
    Those positions in their order, and the counts of contexts on both sides.
  """
  read = {row[:t].tobytes() for row in training for t in range(1, training.shape[1])}
  kept, contexts = [], set()
  for place, (row, t) in enumerate(zip(positions.example, positions.t, strict=True)):
    context = documents[row, :t + 1].tobytes()
    if context not in read and context not in contexts:
      contexts.add(context)
      kept.append(place)
  return positions.take(np.array(kept, int)), splits.refuse_overlap(read, contexts, 'contexts')


# --- Floating-point operations ------------------------------------------------------


def training_flops(config: cfg.Model, num_tokens: int) -> float:
  """6 · parameters · tokens: forward and backward."""
  return 6.0 * P.count(build(config).specs) * num_tokens


def rollout_flops(setting: Setting, rollouts: cfg.Rollouts) -> float:
  """Of one RPT step: sampling forward, the learner forward and backward."""
  responses = rollouts.num_prompts * rollouts.group_size * rollouts.response_tokens
  tokens = rollouts.num_prompts * rollouts.prompt_len + responses
  return 8.0 * P.count(setting.model.specs) * tokens


# --- Supervised ---------------------------------------------------------------------


@functools.cache
def _supervised_step(config: cfg.Model, peak: float, num_steps: int) -> tuple:
  adam = cfg.AdamW(cfg.Cosine(peak, peak / 20, min(20, num_steps)), weight_decay=0.01)
  optimizer = optim.make_optimizer(adam, num_steps, build(config).specs)
  rate = optim.learning_rate(adam.schedule, num_steps)
  model = build(config)
  return optimizer, jax.jit(step.make_train_step(
      model.specs, losses.next_token(model, 0), optimizer, rate))


def supervise(config: cfg.Model, params: Params, take: Callable[[int], Batch], num_steps: int,
              peak: float) -> Params:
  """Next-token prediction over the batches of `take`."""
  optimizer, train_step = _supervised_step(config, peak, num_steps)
  state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), {})
  for i in range(num_steps):
    state, _ = train_step(state, take(i))
  return state.params


# --- Reinforced ---------------------------------------------------------------------


class Curve(NamedTuple):
  """What a reinforced run gives."""

  params: Params
  rows: list[dict]  # of each step
  scores: list  # what `measure` said at the marked steps


def _run(setting: Setting, rollouts: cfg.Rollouts, rate: float, num_steps: int,
         algorithm: cfg.Algorithm, **fields: object) -> cfg.Run:
  return cfg.Run(
      seed=0, model=setting.config,
      data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),  # Not read.
      objective=cfg.RPT('unused', rollouts=rollouts, algorithm=algorithm, **fields),
      optimizer=cfg.AdamW(cfg.ConstantRate(rate, min(5, num_steps)), weight_decay=0.0),
      train=cfg.Train(num_steps, rollouts.num_prompts))


@functools.cache
def _rpt_step(setting: Setting, rollouts: cfg.Rollouts, rate: float, num_steps: int) -> tuple:
  run = _run(setting, rollouts, rate, num_steps, cfg.Algorithm())
  optimizer = optim.make_optimizer(run.optimizer, num_steps, setting.model.specs)
  verify = verifier.device_verifier(setting.table, marker=setting.answer)
  return optimizer, run, jax.jit(
      fused.make_fused_step(setting.model, optimizer, run, run.objective, verify, (setting.end,)))


@functools.cache
def _rlp_step(setting: Setting, rollouts: cfg.Rollouts, rate: float, num_steps: int) -> tuple:
  algorithm = cfg.Algorithm(advantage=cfg.RLOO(), surrogate=cfg.PPOClip(),
                            aggregation=cfg.SequenceMeanTokenSum())
  run = _run(setting, rollouts, rate, num_steps, algorithm, reward=cfg.InformationGain(),
             prediction=cfg.Reason())
  optimizer = optim.make_optimizer(run.optimizer, num_steps, setting.model.specs)
  verify = policy_verifier(Markers(1, setting.answer), run.objective.reward.decay)
  return optimizer, run, jax.jit(
      fused.make_fused_step(setting.model, optimizer, run, run.objective, verify))


def reinforce(setting: Setting, params: Params, take: Callable[[int], Prompts],
              rollouts: cfg.Rollouts, *, rate: float, num_steps: int,
              measure: Callable[[Params], object] = lambda params: None,
              marked: tuple[int, ...] = (), rlp: bool = False) -> Curve:
  """RPT, or RLP, on the prompts of `take`; `measure` before the first and after marked steps."""
  make = _rlp_step if rlp else _rpt_step
  optimizer, run, train_step = make(setting, rollouts, rate, num_steps)
  method = states.new_method(rollouts, run.objective.algorithm, setting.config.d_model,
                             params if rlp else ())
  state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), method)
  rows, scores = [], [measure(params)]
  for i in range(num_steps):
    state, metrics, _, verdict = train_step(state, {}, take(i))
    reward = np.asarray(verdict.reward)
    rows.append({**{k: float(metrics[k].mean()) for k in (
        'reward', 'response_length', 'zero_advantage_groups', 'entropy', 'mismatch')},
        'advantage_variance': float(reward.var(-1, ddof=1).mean()),
        'all_wrong': float((np.asarray(verdict.correct).sum(-1) == 0).mean())})
    if i + 1 in marked:
      scores.append(measure(state.params))
  return Curve(state.params, rows, scores)


# --- Measured -----------------------------------------------------------------------


def reasoning_prompts(setting: Setting, contexts: Prompts) -> Prompts:
  """Contexts followed by the think marker."""
  return templates.apply(templates.TokenTemplate(after=(setting.think,)), contexts)


@functools.cache
def _verify(setting: Setting, temperature: float, num_samples: int, reasoning: bool) -> Callable:
  marker = setting.answer if reasoning else verifier.NO_MARKER
  verify = verifier.device_verifier(setting.table, marker=marker)

  def draw_and_verify(params: Params, prompts: Prompts) -> tuple[Verdict, RolloutBatch]:
    drawn = groups.generate(
        setting.model, params, prompts, jax.random.key(11),
        sampler=cfg.Sampler(temperature=temperature), num_samples=num_samples,
        num_tokens=setting.response if reasoning else 1, stop_ids=(setting.end,))
    return verify(prompts, drawn), drawn

  return jax.jit(draw_and_verify)


def correct(setting: Setting, params: Params, contexts: Prompts, *, reasoning: bool,
            temperature: float = 0.0, num_samples: int = 1) -> np.ndarray:
  """f32[N]: share of each context's predictions that are right.

  With `reasoning`, think, answer, predict; else the next token itself.
  """
  prompts = reasoning_prompts(setting, contexts) if reasoning else contexts
  verify = _verify(setting, temperature, num_samples, reasoning)
  return np.asarray(verify(params, prompts)[0].correct).mean(-1)


@functools.cache
def _thinker(setting: Setting, num_samples: int) -> Callable:
  def think(params: Params, prompts: Prompts) -> jax.Array:
    thoughts = groups.generate(
        setting.model, params, prompts, jax.random.key(12), sampler=cfg.Sampler(),
        num_samples=num_samples, num_tokens=setting.response - 2, stop_ids=(setting.answer,))
    return logp_after_thought(setting.model, params, prompts, thoughts, setting.answer)

  return jax.jit(think)


def truth_after_thought(setting: Setting, params: Params, contexts: Prompts,
                        num_samples: int = 4) -> np.ndarray:
  """f32[N, G]: log p of the truth after sampled thoughts, which the budget ends if need be."""
  return np.asarray(_thinker(setting, num_samples)(params, reasoning_prompts(setting, contexts)))


@functools.cache
def entropy(config: cfg.Model) -> Callable[[Params, Batch], jax.Array]:
  """The compiled entropy of a proxy's predictions."""
  return jax.jit(functools.partial(next_token.position_entropy, build(config)))
