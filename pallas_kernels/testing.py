"""How kernels are run without a TPU: in Pallas' interpreters, on a CPU."""

from typing import Any

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

# The plain interpreter takes every type, 2- and 4-bit integers too, and checks nothing else.
PLAIN = True


def tpu_interpreter(**kwargs: Any) -> pltpu.InterpretParams:
  """The TPU interpreter: memory spaces, DMAs and semaphores are simulated, races are found
  and memory that was never written reads as NaN. It does not take 2- and 4-bit integers."""
  return pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan', **kwargs)


def races_found() -> bool:
  """Whether the TPU interpreter saw a race in the last kernel that it ran. It only prints
  them; to ask is the caller's part (and has no public name in JAX)."""
  races = interpret_pallas_call.races
  if races is None:
    raise RuntimeError('no kernel has run in the TPU interpreter')
  return races.races_found
