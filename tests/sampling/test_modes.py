"""Forced and free modes: `groups.generate` against a loop that puts the token there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.sampling import groups, in_flight
from jaxrl_pt.types import NO_MODE, NO_THINK, THINK
from tests.sampling.test_groups import (
  KEY,
  MODEL,
  PARAMS,
  STOP,
  TOKENS,
  logits_after,
  make_prompts,
  slow_draw,
)

IDS = (3, 15)  # Tokens of a response that thinks, and of one that answers at once.
ASKED = dict(sampler=cfg.Sampler(0.9), num_samples=4, num_tokens=6, stop_ids=(STOP,), version=5,
             mode_ids=IDS)


@functools.cache
def generated(forces_modes: bool, slots: cfg.Slots):
  return jax.jit(functools.partial(groups.generate, MODEL, slots=slots, forces_modes=forces_modes,
                                   **ASKED))(PARAMS, make_prompts(TOKENS), KEY)


def slow_forced(prompt, prompt_id, sample, forced):
  """(tokens, log-probabilities) of a response that begins with a token that was not drawn."""
  key = jax.random.fold_in(jax.random.fold_in(KEY, prompt_id), sample)
  first = jax.nn.log_softmax(logits_after(prompt) / 0.9)[forced]
  tokens, logps = [*prompt, forced], [float(first)]
  while len(tokens) < len(prompt) + 6 and tokens[-1] != STOP:
    token, logp = slow_draw(key, len(tokens), logits_after(tokens), cfg.Sampler(0.9))
    tokens.append(int(token))
    logps.append(float(logp))
  return tokens[len(prompt):], logps


@pytest.mark.parametrize('slots', [cfg.Slots(), cfg.Slots(slots=3, page_size=4)],
                         ids=['a slot for each', 'refilled'])
def test_half_of_a_group_is_made_to_think_and_half_not_to(slots):
  drawn = generated(True, slots)
  np.testing.assert_array_equal(drawn.mode, [[THINK, THINK, NO_THINK, NO_THINK]] * len(TOKENS))
  for n, prompt in enumerate(TOKENS):
    for g in range(4):
      tokens, logps = slow_forced(prompt, n, g, IDS[g // 2])
      count = len(tokens)
      np.testing.assert_array_equal(drawn.tokens[n, g, :count], tokens)
      np.testing.assert_allclose(drawn.logp[n, g, :count], logps, atol=2e-5)
      np.testing.assert_array_equal(drawn.in_response[n, g], np.arange(6) < count)
  assert not np.asarray(drawn.sampled[..., 0]).any()  # It was not drawn.
  np.testing.assert_array_equal(drawn.sampled[..., 1:], drawn.in_response[..., 1:])


def test_free_modes_are_what_the_first_token_says_and_change_nothing_else():
  free = generated(False, cfg.Slots())
  asked = {**ASKED, 'mode_ids': ()}
  plain = jax.jit(functools.partial(groups.generate, MODEL, **asked))(
      PARAMS, make_prompts(TOKENS), KEY)
  assert plain.mode == ()
  for field in ('tokens', 'in_response', 'sampled', 'logp', 'version'):
    np.testing.assert_array_equal(getattr(free, field), getattr(plain, field))
  first = np.asarray(free.tokens[..., 0])
  want = np.where(first == IDS[0], THINK, np.where(first == IDS[1], NO_THINK, NO_MODE))
  np.testing.assert_array_equal(free.mode, want)


@pytest.mark.slow
def test_modes_are_forced_in_flight_too():
  rollouts = cfg.Rollouts(2, 4, 8, 6, mode=cfg.InFlight(), slots=cfg.Slots(slots=3, page_size=4),
                          modes=cfg.HybridModes())
  prompts = make_prompts(TOKENS[:2])
  enqueue, draw = map(jax.jit, in_flight.make_sampler(MODEL, 7, rollouts, (STOP,), mode_ids=IDS))
  sampler = in_flight.init(MODEL, rollouts)
  for batch in range(2):
    sampler = enqueue(sampler, prompts, jnp.asarray(batch))
  drawn = draw(PARAMS, sampler, jnp.asarray(0), jnp.asarray(0)).rollouts
  on_policy = dataclasses.replace(rollouts, mode=cfg.OnPolicy())
  whole = jax.jit(groups.make_sampler(MODEL, 7, on_policy, (STOP,), mode_ids=IDS))(
      PARAMS, prompts, jnp.asarray(0), jnp.asarray(0))
  for field in ('tokens', 'in_response', 'sampled', 'mode'):
    np.testing.assert_array_equal(getattr(drawn, field), getattr(whole, field))
  np.testing.assert_allclose(drawn.logp, whole.logp, atol=2e-5)
  assert (drawn.mode[:, 0] == THINK).all() and (drawn.mode[:, -1] == NO_THINK).all()
