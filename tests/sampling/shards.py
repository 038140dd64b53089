"""Child of test_shards.py: draws on meshes of 8 fake CPU devices and prints, as JSON, what differs.

One row for each mesh: whether its tokens are those of one device, the largest difference of
log-probabilities, and the groups of devices that its collectives join.
"""

import argparse
import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.models import transformer
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.mesh import make_mesh
from jaxrl_pt.sampling.groups import make_sampler
from jaxrl_pt.types import Prompts

CONFIG = cfg.Model(num_layers=2, d_model=16, d_ff=32, num_heads=8, num_kv_heads=8, head_dim=4,
                   vocab_size=16)
PROMPTS, LENGTH, STOP = 8, 9, 7
ROLLOUTS = cfg.Rollouts(num_prompts=PROMPTS, group_size=3, prompt_len=LENGTH, response_tokens=10,
                        slots=cfg.Slots(slots=2, page_size=4, prefill_chunk=4))
SPARSE = cfg.ReSA(4, 0.1, min_blocks=1, refresh=cfg.RefreshEvery(3), replay=True)


COLLECTIVE = re.compile(r' (?:all-|reduce-scatter|collective-|ragged-all)[\w-]*\(')


def groups_of_devices(text: str) -> list[list[int]]:
  """The groups of devices that the collectives in loops of a compiled program join.

  Before it decodes, the program may join what it likes: it looks once for prompts that stand in
  the batch several times. A permute has pairs of a source and a target in place of groups.
  """
  found: set[tuple[int, ...]] = set()
  for line in text.splitlines():
    name = re.search(r'op_name="([^"]*)"', line)
    in_loop = name is None or '/while/' in name[1]
    if in_loop and COLLECTIVE.search(line) and '-done(' not in line:
      found |= set(map(tuple, groups_of(line)))
  return sorted(map(list, found))


def groups_of(line: str) -> list[list[int]]:
  """The groups of one collective, in any of the notations that XLA has for them."""
  numbers = lambda text: [int(n) for n in re.findall(r'\d+', text)]
  if 'replica_groups={}' in line:  # All of them.
    return [list(range(len(jax.devices())))]
  if named := re.search(r"replica_groups=mesh\[(.*?)\] \{([^}]*)\}", line):
    assert ' device_ids=' not in named[1], line  # The devices in another order than 0, 1, 2, ….
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    joined = re.findall(r"'(\w+)'", named[2])
    order = [list(sizes).index(name) for name in [*(n for n in sizes if n not in joined), *joined]]
    grid = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    return grid.transpose(order).reshape(-1, math.prod(sizes[n] for n in joined)).tolist()
  if iota := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line):
    dims = numbers(iota[2])
    grid = np.arange(math.prod(dims)).reshape(dims)
    if iota[3]:
      grid = grid.transpose(numbers(iota[3]))
    return grid.reshape(numbers(iota[1])).tolist()
  listed = re.search(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}', line)
  assert listed, line
  return [numbers(group) for group in re.findall(r'\{([\d,]+)\}', listed[1])]


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('meshes', nargs='+')
  parser.add_argument('--sparse', action='store_true')
  args = parser.parse_args()
  rollouts = dataclasses.replace(ROLLOUTS, sparse=SPARSE) if args.sparse else ROLLOUTS
  random = np.random.default_rng(0)
  prompts = Prompts(jnp.asarray(random.integers(0, 16, (PROMPTS, LENGTH)), jnp.int32),
                    jnp.asarray(random.integers(1, LENGTH + 1, PROMPTS), jnp.int32),
                    jnp.array([0, 1, 2, 3, 4, 4, 6, -7]))  # One of them stands there twice.
  model = transformer.build(CONFIG)
  params = P.init(model.specs, jax.random.key(0))
  params = {**params, 'embed': params['embed'] * 5}
  number = jnp.asarray(3, jnp.int32)
  alone = jax.jit(make_sampler(model, 5, rollouts, (STOP,)))(params, prompts, number, number)
  for shape in (tuple(map(int, argument.split(','))) for argument in args.meshes):
    mesh = make_mesh(cfg.Mesh(*shape, context=1))
    sample = jax.jit(make_sampler(models.build(CONFIG, cfg.Compute(), mesh, rules.SHARD), 5,
                                  rollouts, (STOP,), mesh))
    arguments = (jax.device_put(params, rules.param_shardings(model.specs, mesh, rules.SAMPLE)),
                 jax.device_put(prompts, rules.row_sharding(mesh)), number, number, None,
                 jnp.asarray(random.permutation(PROMPTS), jnp.int32))  # Laid out in any order.
    compiled = sample.lower(*arguments).compile()
    drawn = compiled(*arguments)
    joined = groups_of_devices(compiled.as_text())
    tensor = [[d.id for d in row] for row in mesh.devices.reshape(-1, shape[2])]
    print(json.dumps({
        'mesh': shape, 'same': bool((drawn.tokens == alone.tokens).all()
                                    & (drawn.in_response == alone.in_response).all()),
        'logp': float(jnp.abs(drawn.logp - alone.logp).max()),
        'lengths': sorted(set(map(int, drawn.lengths().ravel()))),
        'joined': joined, 'tensor': tensor}), flush=True)


if __name__ == '__main__':
  main()
