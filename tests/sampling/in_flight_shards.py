"""Child of test_shards.py: rollouts in flight over three steps on meshes of 8 fake CPU devices.

One row of JSON for each mesh, as `tests.sampling.shards` prints them.
"""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.sampling import groups, in_flight
from jaxrl_pt.types import Prompts
from tests.sampling.shards import CONFIG, LENGTH, PROMPTS, ROLLOUTS, STOP, groups_of_devices

STEPS = 3
FLYING = dataclasses.replace(ROLLOUTS, mode=cfg.InFlight(1), slots=dataclasses.replace(
    ROLLOUTS.slots, slots=4))


def prompts_of(batch: int) -> Prompts:
  random = np.random.default_rng(batch)
  return Prompts(jnp.asarray(random.integers(0, 16, (PROMPTS, LENGTH)), jnp.int32),
                 jnp.asarray(random.integers(1, LENGTH + 1, PROMPTS), jnp.int32),
                 jnp.array([0, 1, 2, 3, 4, 4, 6, -7]) + batch)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('meshes', nargs='+')
  model = transformer.build(CONFIG)
  params = P.init(model.specs, jax.random.key(0))
  params = {**params, 'embed': params['embed'] * 5}
  on_policy = dataclasses.replace(ROLLOUTS, slots=cfg.Slots())
  sample = jax.jit(groups.make_sampler(model, 5, on_policy, (STOP,)))
  number = jnp.asarray
  alone = [sample(params, prompts_of(b), number(b), number(0)) for b in range(STEPS)]
  for shape in (tuple(map(int, text.split(','))) for text in parser.parse_args().meshes):
    mesh = make_mesh(cfg.Mesh(*shape, context=1))
    start = jax.jit(lambda mesh=mesh: in_flight.init(model, FLYING, mesh))
    there = in_flight.shardings(jax.eval_shape(start), mesh)
    state = jax.device_put(start(), there)
    enqueue, draw = in_flight.make_sampler(
        models.build(CONFIG, cfg.Compute(), mesh, rules.SHARD), 5, FLYING, (STOP,), mesh)
    enqueue = jax.jit(enqueue, donate_argnums=0, out_shardings=there)
    own = jax.device_put(params, rules.param_shardings(model.specs, mesh, rules.SAMPLE))
    compiled, drawn, carried = None, [], 0.0
    for batch in range(STEPS):
      for entering in in_flight.entering(FLYING, batch):
        prompts = jax.device_put(prompts_of(entering), rules.row_sharding(mesh))
        state = enqueue(state, prompts, number(entering))
      arguments = own, state, number(batch), number(batch)
      if compiled is None:
        shardings = in_flight.Drawn._make((there, None, None))
        compiled = jax.jit(draw, donate_argnums=1, out_shardings=shardings).lower(
            *arguments).compile()
      state, rollouts, metrics = compiled(*arguments)
      drawn.append(rollouts)
      carried += float(metrics['carried_responses'].sum)
    same = [bool((a.tokens == b.tokens).all() & (a.in_response == b.in_response).all())
            for a, b in zip(drawn, alone, strict=True)]
    print(json.dumps({
        'mesh': shape, 'same': all(same) and carried > 0,
        'logp': max(float(jnp.abs(a.logp - b.logp).max())
                    for a, b in zip(drawn, alone, strict=True)),
        'lengths': sorted({int(n) for a in drawn for n in a.lengths().ravel()}),
        'joined': groups_of_devices(compiled.as_text()),
        'tensor': [[d.id for d in row] for row in mesh.devices.reshape(-1, shape[2])]}),
          flush=True)


if __name__ == '__main__':
  main()
