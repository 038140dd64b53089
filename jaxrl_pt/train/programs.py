"""The jitted programs of reinforcement learning: a run dispatches them, preflight compiles them."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.sharding import Mesh
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt.models import transformer
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel import rules
from jaxrl_pt.sampling import in_flight
from jaxrl_pt.sampling import weight_sync as syncing
from jaxrl_pt.sampling.groups import NO_MODES, make_sampler
from jaxrl_pt.train import fused, update
from jaxrl_pt.types import Params
from jaxrl_pt.verifiers.base import DeviceVerifier


def fused_step(run: cfg.Run, mesh: Mesh, method: cfg.Reinforced,
               optimizer: optax.GradientTransformation,
               verifier: DeviceVerifier | fused.PolicyVerifier, stop_ids: tuple[int, ...],
               mode_ids: tuple[int, ...] = NO_MODES) -> Any:
  """The jitted step(state, reference, prompts) of `fused.make_fused_step`.

  The state is donated.
  """
  model = models.build(run.model, run.compute, mesh)
  verify = verifier.verify if isinstance(verifier, DeviceVerifier) else verifier
  return jax.jit(fused.make_fused_step(model, optimizer, run, method, verify, stop_ids,
                                       mode_ids=mode_ids, by_token=method.rollouts.is_gated,
                                       held=held(run, mesh, method.rollouts.slots)),
                 donate_argnums=0)


def sampler(run: cfg.Run, mesh: Mesh, rollouts: cfg.Rollouts, stop_ids: tuple[int, ...],
            mode_ids: tuple[int, ...] = NO_MODES) -> Any:
  """The jitted sample(parameters after the weight sync, prompts, batch, version) → RolloutBatch."""
  model = models.build(run.model, run.compute, mesh, rules.SHARD)
  return jax.jit(make_sampler(model, run.seed, rollouts, stop_ids, mesh if mesh.size > 1 else None,
                              mode_ids))


def in_flight_sampler(run: cfg.Run, mesh: Mesh, rollouts: cfg.Rollouts, stop_ids: tuple[int, ...],
                      mode_ids: tuple[int, ...] = NO_MODES) -> Any:
  """The jitted enqueue and draw of `in_flight.make_sampler`, to which its state is donated.

  The parameters are those after the weight sync.
  """
  model = models.build(run.model, run.compute, mesh, rules.SHARD)
  enqueue, draw = in_flight.make_sampler(model, run.seed, rollouts, stop_ids,
                                         mesh if mesh.size > 1 else None, mode_ids)
  # Each program leaves the state as the next one takes it.
  there = in_flight.shardings(jax.eval_shape(functools.partial(
      in_flight.init, transformer.build(run.model, run.compute), rollouts, mesh)), mesh)
  return in_flight.Sampler(
      jax.jit(enqueue, donate_argnums=0, out_shardings=there),
      # None lets the compiler choose.
      jax.jit(draw, donate_argnums=1,
              out_shardings=in_flight.Drawn._make((there, None, None))))


def learner_step(run: cfg.Run, mesh: Mesh, optimizer: optax.GradientTransformation,
                 rollouts: cfg.Rollouts, algorithm: cfg.Algorithm) -> Any:
  """The jitted learn(state, prompts, rollouts, verdict, reference_logp) of `update.make_learner`.

  The state is donated.
  """
  model = models.build(run.model, run.compute, mesh)
  return jax.jit(update.make_learner(model, optimizer, run, rollouts, algorithm,
                                     by_token=rollouts.is_gated), donate_argnums=0)


def reference_logp(run: cfg.Run, mesh: Mesh, rollouts: cfg.Rollouts, algorithm: cfg.Algorithm
                   ) -> Any:
  """The jitted logp(reference policy's parameters, prompts, rollouts) → f32[N, G, S]."""
  model = models.build(run.model, run.compute, mesh)
  return jax.jit(lambda params, prompts, drawn: fused.response_logp(
      model, params, prompts, drawn, run, rollouts.sampler, algorithm))


def held(run: cfg.Run, mesh: Mesh, slots: cfg.Slots) -> Callable[[Params], Params]:
  """The function from parameters to what a sampler on the mesh's one device reads of them."""
  model = models.build(run.model, run.compute, mesh)
  return syncing.for_one_device(model, mesh.devices.flat[0], run.compute.dtype, slots.head,
                                slots.packed)


def weight_sync(run: cfg.Run, mesh: Mesh, slots: cfg.Slots) -> Callable[[Params, int], Params]:
  """sync(params, version) → the sampler's copy of the parameters, checked on arrival.

  On one device nothing travels: the sampler reads the trainer's own parameters, or packed ones.
  """
  model = models.build(run.model, run.compute, mesh)
  if slots.packed:
    syncing.check_packed(model, mesh.devices.flat[0])
  if mesh.size == 1:
    read = syncing.make_sync_on_one_device(model, mesh.devices.flat[0], run.compute.dtype,
                                           slots.head, slots.packed)
    return lambda params, version: read(params)
  sync = syncing.make_weight_sync(model, mesh, run.model.quant.is_ternary,
                                  run.compute.dtype, slots.head)
  return lambda params, version: sync(params, version).params
