"""Our objectives against TRL's own loss code, in value, gradient and clip fraction.

TRL's trainers read per-token log-probabilities from a model; here a stub hands them over,
and nothing else of the trainer runs.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('trl', reason='trl is not installed: `make parity`')
trainers = pytest.importorskip('trl.trainer.grpo_trainer')
rloo_trainers = pytest.importorskip('trl.trainer.rloo_trainer')

from jaxrl_pt.rl import advantages, kl  # noqa: E402
from jaxrl_pt.rl import objectives as obj  # noqa: E402

pytestmark = pytest.mark.parity

SHAPE = (3, 4, 6)  # prompts, samples, tokens
MAX_TOKENS = 6


def draw():
  """logp, old logp, reference logp, mask and reward; ratios well on both sides of the clips."""
  random = np.random.default_rng(0)
  old = -random.exponential(1.0, SHAPE).astype(np.float32) - 0.1
  logp, reference = old + random.normal(size=(2, *SHAPE)).astype(np.float32) * 0.3
  lengths = random.integers(1, SHAPE[-1] + 1, SHAPE[:2])
  mask = (np.arange(SHAPE[-1]) < lengths[..., None]).astype(np.float32)
  reward = random.integers(0, 2, SHAPE[:2]).astype(np.float32)
  return logp, old, reference, mask, reward


def flat(x):
  return torch.from_numpy(np.array(x, np.float32).reshape(-1, *np.shape(x)[2:]))


def trl_loss(trainer_class, logp, inputs, **settings):
  """(loss, gradient by logp, metrics) of a trainer's `_compute_loss`."""
  logp = flat(logp).requires_grad_()
  accelerator = types.SimpleNamespace(
      num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x,
      reduce=lambda x, reduction: x)
  defaults = dict(
      loss_type='grpo', importance_sampling_level='token', epsilon_low=0.2, epsilon_high=0.28,
      beta=0.0, max_completion_length=MAX_TOKENS, aux_loss_enabled=False,
      top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
      _entropy_bonus_enabled=False, accelerator=accelerator, delta=None)
  values = {**defaults, **settings}
  stub = types.SimpleNamespace(
      **values, args=types.SimpleNamespace(delta=values['delta'], use_bias_correction_kl=False),
      model=types.SimpleNamespace(training=False),
      _metrics={'eval': collections.defaultdict(list)},
      _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None))
  ids = torch.zeros(logp.shape, dtype=torch.long)
  batch = {'prompt_ids': ids, 'prompt_mask': ids, 'completion_ids': ids,
           'num_items_in_batch': inputs['completion_mask'].sum(), **inputs}
  loss = trainer_class._compute_loss(stub, None, batch)
  loss.backward()
  return loss.item(), logp.grad.numpy().reshape(SHAPE), stub._metrics['eval']


def grpo_inputs():
  logp, old, reference, mask, reward = draw()
  advantage = np.asarray(advantages.group_normalised(reward, np.ones_like(reward)))
  inputs = {'advantages': flat(advantage), 'completion_mask': flat(mask),
            'old_per_token_logps': flat(old), 'ref_per_token_logps': flat(reference)}
  spread = np.broadcast_to(advantage[..., None], SHAPE)
  return logp, old, reference, mask, spread, inputs


def ppo(logp, old, advantage, _):
  return obj.ppo_clip(logp, old, advantage, low=0.2, high=0.28)


@pytest.mark.parametrize('settings, surrogate, aggregate', [
    ({'loss_type': 'grpo'}, ppo, obj.sequence_mean_token_mean),
    ({'loss_type': 'dapo'}, ppo, obj.token_mean),
    ({'loss_type': 'bnpo'}, ppo, obj.token_mean),
    ({'loss_type': 'dr_grpo'}, ppo, obj.token_sum_over(SHAPE[0] * SHAPE[1] * MAX_TOKENS)),
    ({'loss_type': 'grpo', 'delta': 1.5},
     lambda logp, old, a, _: obj.dual_clip(logp, old, a, low=0.2, high=0.28, bound=1.5),
     obj.sequence_mean_token_mean),
    ({'loss_type': 'grpo', 'importance_sampling_level': 'sequence', 'epsilon_low': 0.05,
      'epsilon_high': 0.06},
     lambda logp, old, a, mask: obj.gspo(logp, old, a, mask, low=0.05, high=0.06),
     obj.sequence_mean_token_mean),
    ({'loss_type': 'cispo', 'epsilon_high': 1.2},
     lambda logp, old, a, _: obj.cispo(logp, old, a, low=1.0, high=0.2), obj.token_mean),
], ids=['grpo', 'dapo', 'bnpo', 'dr_grpo', 'dual_clip', 'gspo', 'cispo'])
def test_losses_equal_trl(settings, surrogate, aggregate):
  logp, old, _, mask, advantage, inputs = grpo_inputs()
  theirs, their_gradient, metrics = trl_loss(trainers.GRPOTrainer, logp, inputs, **settings)

  def loss(logp):
    result = surrogate(logp, old, advantage, mask)
    return aggregate(result.terms, mask), result.clipped

  (ours, clipped), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logp))
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gradient, their_gradient, rtol=1e-4, atol=1e-6)
  # TRL leaves out of its share what the second clip takes, and for CISPO negative advantages.
  if settings['loss_type'] != 'cispo' and 'delta' not in settings:
    if settings.get('importance_sampling_level') == 'sequence':
      share = obj.sequence_mean_token_mean(clipped, mask)  # TRL counts responses there
    else:
      share = obj.token_mean(clipped, mask)
    assert float(share) > 0.05
    np.testing.assert_allclose(share, metrics['clip_ratio/region_mean'], rtol=1e-5)


def test_kl_in_the_loss_equals_trl():
  logp, old, reference, mask, advantage, inputs = grpo_inputs()
  theirs, their_gradient, _ = trl_loss(trainers.GRPOTrainer, logp, inputs, beta=0.1)

  def loss(logp):
    terms = ppo(logp, old, advantage, mask).terms + 0.1 * kl.k3(logp, reference)
    return obj.sequence_mean_token_mean(terms, mask)

  ours, gradient = jax.value_and_grad(loss)(jnp.asarray(logp))
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gradient, their_gradient, rtol=1e-4, atol=1e-6)


def test_rloo_on_policy_gradient_equals_trl():
  # TRL clips the ratio of the whole response, which is 1 at the one update we make.
  logp, _, _, mask, reward = draw()
  advantage = np.asarray(advantages.leave_one_out(reward, np.ones_like(reward)))
  inputs = {'advantages': flat(advantage), 'completion_mask': flat(mask),
            'old_logps': flat(logp * mask).sum(-1)}
  _, their_gradient, _ = trl_loss(rloo_trainers.RLOOTrainer, logp, inputs)
  gradient = jax.grad(lambda logp: obj.sequence_mean_token_sum(obj.policy_gradient(
      logp, jnp.broadcast_to(advantage[..., None], SHAPE)).terms, mask))(jnp.asarray(logp))
  np.testing.assert_allclose(gradient, their_gradient, rtol=1e-4, atol=1e-6)
