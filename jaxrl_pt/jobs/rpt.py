"""Reinforcement Pre-Training and RLP, whose prompts ask for the next tokens of a corpus."""

from collections.abc import Iterator
import contextlib
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt.environments import next_token, rlp
from jaxrl_pt.jobs import programs, reinforce
from jaxrl_pt.jobs.kind import Kind, Program
from jaxrl_pt.run import session as sessions
from jaxrl_pt.run.workdir import claimed
from jaxrl_pt.train import state as states
from jaxrl_pt.train.fused import PolicyVerifier
from jaxrl_pt.types import Params
from jaxrl_pt.verifiers import next_token as verifiers
from jaxrl_pt.verifiers.base import DeviceVerifier


def _method(run: cfg.Run) -> cfg.RPT:
  assert isinstance(run.objective, cfg.RPT)
  return run.objective


@contextlib.contextmanager
def _open(run: cfg.Run, workdir: Path, resolved_text: str, allow: frozenset[str]
          ) -> Iterator[reinforce.Reinforcement]:
  method = _method(run)
  start = reinforce.start_policy(run, method.start_from, workdir)
  next_token.check_held_out(run.data, start.session.run.data, method.start_from)
  with claimed(workdir):
    session = sessions.open_session(run, workdir, resolved_text, allow=allow,
                                    data_dir=start.session.workdir / 'data')
    sessions.check_tokenizer(session.data, start.session.data.tokenizer.fingerprint,
                             start.session.workdir)
    with _reopen(session, start.params) as job:
      yield job


@contextlib.contextmanager
def _reopen(session: sessions.Session, reference_params: Params
            ) -> Iterator[reinforce.Reinforcement]:
  """The job, for which the proxy first chooses positions."""
  method = _method(session.run)
  environment = next_token.make_environment(session, method, session.model(session.run.model),
                                            reference_params)
  yield reinforce.Reinforcement(session, method, reference_params, environment,
                                functools.partial(_new_method, session.run, session.mesh))


def _new_method(run: cfg.Run, mesh: Mesh, params: Params) -> Any:
  method = _method(run)
  average = params if isinstance(method.reward, cfg.InformationGain) else ()
  return states.new_method(method.rollouts, method.algorithm, run.model.d_model, average,
                           reinforce.sampler_between_steps(run, mesh))


def _programs(run: cfg.Run, mesh: Mesh) -> list[Program]:
  method, table = _method(run), programs.longest_tokens(run.model)
  prompts = programs.abstract_prompts(method.rollouts, mesh, {
      'continuation': ((next_token.continuation_len(method),), jnp.int32),
      'continuation_lengths': ((), jnp.int32), 'entropy': ((), jnp.float32)},
      method.positions_per_document)
  verifier: DeviceVerifier | PolicyVerifier
  if isinstance(method.reward, cfg.InformationGain):
    verifier = rlp.policy_verifier(rlp.Markers(1, programs.STOP_IDS[0] + 1), method.reward.decay)
  else:
    marker = verifiers.NO_MARKER if method.prediction == cfg.Direct() else programs.STOP_IDS[0] + 1
    verifier = DeviceVerifier(verifiers.device_verifier(table, method.reward, marker))
  return programs.of_step(run, mesh, method, prompts, verifier,
                          functools.partial(_new_method, run, mesh))


KIND = Kind(_open, _programs, reinforce.num_tokens, reinforce.model_flops, _new_method, _reopen)
