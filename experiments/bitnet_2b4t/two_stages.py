"""Pretraining with and without 2B4T's two steps: of the learning rate, and of weight decay to 0.

The four arms have the same rate and weight decay up to half of the steps. They therefore branch
there from one state, and two arms of a seed differ in what comes after alone.
"""

from collections.abc import Callable
import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import loader, sources, splits
from jaxrl_pt.models import transformer
from jaxrl_pt.models.base import Model
from jaxrl_pt.models.transformer import PROJECTIONS
from jaxrl_pt.nn import quant as q
from jaxrl_pt.train import losses, optim
from jaxrl_pt.types import Array, Batch, Params, TrainState

BATCH, LENGTH, VOCAB = 8, 128, 512
SECOND_PEAK = 0.64 / 1.2  # over the first: the ratio that gin/run/pretrain_2b4t.gin takes
DECAY = 0.1
TERNARY, FULL = cfg.Quant('ternary', 'int8'), cfg.Quant()
# Rates are tuned with a seed that is not reported, on the end of the validation text, whose start
# is what is reported.
TUNING_SEED, EVAL_BATCHES = 1000, 24


class Arm(NamedTuple):
  """What changes at half of the steps."""

  rate_step: bool
  decay_step: bool


ARMS = {'both steps': Arm(True, True), 'rate step': Arm(True, False),
        'decay step': Arm(False, True), 'no step': Arm(False, False)}


def build(quant: cfg.Quant) -> Model:
  """2B4T's block, small: SubLN, squared ReLU, tied head, fewer key than query heads."""
  config = cfg.Model(num_layers=2, d_model=128, d_ff=384, num_heads=4, num_kv_heads=1, head_dim=32,
                     vocab_size=VOCAB, activation='relu2', sub_norm=True, quant=quant)
  return transformer.build(config, cfg.Compute(unroll=0))


build = functools.cache(build)


def data(folder: Path) -> cfg.Data:
  """WikiText-2 by articles."""
  return cfg.Data(cfg.TextFiles(str(folder / 'train.txt.gz'), r'^ = [^=].* = $'),
                  cfg.TrainedBPE(VOCAB), LENGTH, validation_glob=str(folder / 'valid.txt'))


def open_text(folder: Path, cache: Path) -> tuple[loader.Prepared, str]:
  """The packed text, and in words that no article is on both sides."""
  settings = data(folder)
  held_out = dataclasses.replace(settings.source, glob=settings.validation_glob)
  apart = splits.refuse_overlap(sources.documents(settings.source), sources.documents(held_out),
                                'articles')
  return loader.prepare(settings, cache), str(apart)


# --- Schedules ----------------------------------------------------------------------


def schedules(arm: Arm, peak: float, num_steps: int) -> tuple[optim.Schedule, optim.Schedule]:
  """The rate and the weight decay of an arm, functions of the step.

  `cfg.TwoStage` has both steps at once; the arms with one of them take the other from a cosine
  decay over the whole run, which is TwoStage's first stage.
  """
  warmup = num_steps // 20
  two = cfg.TwoStage(peak, SECOND_PEAK * peak, warmup_steps=warmup, shape='cosine')
  one = cfg.Cosine(peak, warmup_steps=warmup)
  of_decay = cfg.AdamW(two if arm.decay_step else one, weight_decay=DECAY)
  return (optim.learning_rate(two if arm.rate_step else one, num_steps),
          optim.weight_decay(of_decay, num_steps))


@functools.cache
def _adam() -> optax.GradientTransformation:
  return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95))


@functools.cache
def _compiled(quant: cfg.Quant) -> Callable[..., TrainState]:
  """The jitted AdamW step(state, batch, rate, decay) of a model; its state is not donated.

  It is one program for all arms and rates, as both come as arguments.
  """
  model = build(quant)
  loss = losses.next_token(model, 0)
  is_decayed = P.map_specs(lambda spec: spec.is_decayed, model.specs)

  def step(state: TrainState, batch: Batch, rate: Array, decay: Array) -> TrainState:
    grads = jax.grad(lambda params: loss(params, batch) / batch.weights.sum())(state.params)
    updates, opt_state = _adam().update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u, on: p - rate * (u + decay * on * p),
                          state.params, updates, is_decayed)
    return TrainState(state.step + 1, params, opt_state, {})

  return jax.jit(step)


# --- Measures -----------------------------------------------------------------------


@functools.cache
def _evaluation(quant: cfg.Quant) -> Callable[[Params, Batch], dict]:
  return jax.jit(losses.evaluation(build(quant), 0))


def held_out_loss(quant: cfg.Quant, params: Params, packed: loader.Packed,
                  at_end: bool = False) -> float:
  """Nats per token of the start of a split, or of its end, which share no row."""
  assert len(packed) >= 2 * EVAL_BATCHES * BATCH
  first = len(packed) - EVAL_BATCHES * BATCH if at_end else 0
  total = count = 0.0
  for low in range(first, first + EVAL_BATCHES * BATCH, BATCH):
    value = _evaluation(quant)(params, packed.batch(np.arange(low, low + BATCH)))['loss']
    total, count = total + float(value.sum), count + float(value.count)
  return total / count


def codes(params: Params) -> dict[str, np.ndarray]:
  """The ternary codes of every projection, int8[L, I, O]."""
  return {name: np.asarray(q.ternary(params['layers'][name])[0], np.int8) for name in PROJECTIONS}


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
  """The share of codes that differ."""
  differ = sum(int((before[name] != after[name]).sum()) for name in before)
  return differ / sum(x.size for x in before.values())


# --- Training -----------------------------------------------------------------------


class Start(NamedTuple):
  """A run up to some step."""

  state: TrainState
  step: int


def begin(quant: cfg.Quant, seed: int) -> Start:
  """New parameters with an optimiser's new state."""
  params = P.init(build(quant).specs, jax.random.key(seed))
  return Start(TrainState(jnp.zeros((), jnp.int32), params, _adam().init(params), {}), 0)


def go_on(quant: cfg.Quant, arm: Arm, peak: float, num_steps: int, start: Start,
          batches: list[Batch], seen: Callable[[int, Params], None] = lambda step, params: None
          ) -> Start:
  """Trains from `start` on the batches of the steps that follow; `seen` looks at each state."""
  rate, decay = schedules(arm, peak, num_steps)
  state = start.state
  for i, batch in enumerate(batches, start.step + 1):
    state = _compiled(quant)(state, batch, rate(i - 1), decay(i - 1))
    seen(i, state.params)
  return Start(state, start.step + len(batches))


def batches_of(text: loader.Prepared, seed: int, num_steps: int) -> list[Batch]:
  """What the steps of a seed read."""
  iterator = loader.train_iterator(text.train, seed=seed, batch_size=BATCH)
  taken = [next(iterator) for _ in range(num_steps)]
  iterator.close()
  return taken


def tuning_loss(quant: cfg.Quant, peak: float, num_steps: int, text: loader.Prepared) -> float:
  """The loss of a rate: of a ternary model with both steps, in full precision with none."""
  arm = ARMS['both steps' if quant == TERNARY else 'no step']
  done = go_on(quant, arm, peak, num_steps, begin(quant, TUNING_SEED),
               batches_of(text, TUNING_SEED, num_steps))
  return held_out_loss(quant, done.state.params, text.validation, at_end=True)


def full_precision(peak: float, num_steps: int, seed: int, text: loader.Prepared) -> float:
  """The held-out loss of the full-precision twin, whose recipe has no steps."""
  done = go_on(FULL, ARMS['no step'], peak, num_steps, begin(FULL, seed),
               batches_of(text, seed, num_steps))
  return held_out_loss(FULL, done.state.params, text.validation)


def four_arms(peak: float, num_steps: int, seed: int, text: loader.Prepared) -> dict[str, Any]:
  """Trains the arms of a seed.

  Returns:
    'at_switch', the loss where they part; by arm 'curve', [step, loss] after it; 'flipped', the
    share of ternary codes that the last tenth of the steps changed.
  """
  half, late = num_steps // 2, num_steps - num_steps // 10
  batches = batches_of(text, seed, num_steps)
  start = go_on(TERNARY, ARMS['no step'], peak, num_steps, begin(TERNARY, seed),
                batches[:half])
  row: dict[str, Any] = {
      'at_switch': held_out_loss(TERNARY, start.state.params, text.validation),
      'curve': {}, 'flipped': {}}
  marked = {half + num_steps // 40, half + num_steps // 20, half + num_steps // 10,
            half + num_steps // 4, num_steps}
  for name, arm in ARMS.items():
    curve: list[list[float]] = []
    kept: dict[int, dict[str, np.ndarray]] = {}

    def look(i: int, params: Params, curve: list = curve, kept: dict = kept) -> None:
      if i in marked:
        curve.append([i, held_out_loss(TERNARY, params, text.validation)])
      if i in (late, num_steps):
        kept[i] = codes(params)

    go_on(TERNARY, arm, peak, num_steps, start, batches[half:], look)
    row['curve'][name] = curve
    row['flipped'][name] = changed(kept[late], kept[num_steps])
  return row
