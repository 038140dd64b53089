"""What a run is reinforced on: prompts by number, a judge, and a held-out measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils
import numpy as np

from jaxrl_pt.train.rlp_step import Markers
from jaxrl_pt.types import Params, Prompts, Rollout, Verdict
from jaxrl_pt.verifiers.base import DeviceVerifier


class Ticket(Protocol):
  """Responses handed to a verifier."""

  def result(self) -> Verdict:
    """Waits for the verdict, f32[N, G] arrays."""


@dataclass(frozen=True)
class OnDevice:
  """Judges inside the jitted step."""

  verify: DeviceVerifier


@dataclass(frozen=True)
class OnHost:
  """Judges text while the device goes on: submit(rollout as numpy, references) → ticket."""

  submit: Callable[[Rollout, Sequence[str]], Ticket]


@dataclass(frozen=True)
class InStep:
  """The step judges by itself: RLP, whose reward is what the policy makes of the true text."""

  markers: Markers


@dataclass(frozen=True)
class Task:
  """Prompts, who judges the responses, and how the policy is measured.

  take: (prompts as numpy, references) of batch b = 0, 1, …; a function of b alone.
  score: metrics of the parameters on held-out prompts.
  digest: names the prompts by their content; a run goes on with the same ones only.
  """

  take: Callable[[int], tuple[Prompts, Sequence[str]]]
  judge: OnDevice | OnHost | InStep
  score: Callable[[Params], dict[str, float]]
  digest: str


def on_host(tree: Any) -> Any:
  """Whole arrays as numpy, on every host."""
  if jax.process_count() > 1:
    return multihost_utils.process_allgather(tree, tiled=True)
  return jax.tree.map(np.asarray, tree)


def agreed(verdict: Verdict) -> Verdict:
  """The first host's verdict on all: what timed out on one may not have on another."""
  if jax.process_count() > 1:
    return multihost_utils.broadcast_one_to_all(verdict)
  return verdict


def judged(judge: OnDevice | OnHost, prompts: Prompts, rollout: Rollout,
           references: Sequence[str]) -> tuple[Verdict, Rollout]:
  """Verdict and rollout on the host, waited for."""
  here = on_host(rollout)
  match judge:
    case OnDevice(verify):
      return on_host(jax.jit(verify)(prompts, rollout)), here
    case OnHost(submit):
      return jax.tree.map(np.asarray, agreed(submit(here, references).result())), here
