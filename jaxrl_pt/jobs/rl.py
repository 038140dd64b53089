"""Reinforcement learning on problems whose answers can be verified."""

from collections.abc import Iterator
import contextlib
import functools
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt.environments import judge_reward, multi_turn, problems
from jaxrl_pt.environments.base import Task
from jaxrl_pt.jobs import programs, reinforce
from jaxrl_pt.jobs.kind import Kind, Program
from jaxrl_pt.run import session as sessions
from jaxrl_pt.run.workdir import claimed
from jaxrl_pt.types import Params
from jaxrl_pt.verifiers import exact
from jaxrl_pt.verifiers.base import DeviceVerifier

_ANSWER_BYTES = 16  # bytes of the longest answer, for preflight, which has no problems


def _method(run: cfg.Run) -> cfg.RL:
  assert isinstance(run.objective, cfg.RL)
  return run.objective


@contextlib.contextmanager
def _open(run: cfg.Run, workdir: Path, resolved_text: str, allow: frozenset[str]
          ) -> Iterator[reinforce.Reinforcement]:
  method = _method(run)
  start = reinforce.start_policy(run, method.start_from, workdir)
  problems.check_held_out(method.problems, start.session.run)
  with claimed(workdir):
    # The problems are encoded by the start policy's own tokenizer.
    session = sessions.open_session(run, workdir, resolved_text, data=start.session.data,
                                    allow=allow, data_dir=start.session.workdir / 'data')
    with _reopen(session, start.params) as job:
      yield job


@contextlib.contextmanager
def _reopen(session: sessions.Session, reference_params: Params
            ) -> Iterator[reinforce.Reinforcement]:
  """The job; its verifier's processes run as long as the context lasts."""
  method = _method(session.run)
  new_method = functools.partial(reinforce.new_method, session.run, session.mesh)
  with _environment(session, method, reference_params) as environment:
    yield reinforce.Reinforcement(session, method, reference_params, environment, new_method)


def _environment(session: sessions.Session, method: cfg.RL, start: Params
                 ) -> contextlib.AbstractContextManager[Task]:
  match method.verifier:
    case cfg.Interactive():
      return multi_turn.open_environment(session, method)
    case cfg.JudgeReward():
      whole = reinforce.adapted(session.model(session.run.model), start, session.run.seed)
      return judge_reward.open_environment(session, method, whole)
    case _:
      return problems.open_environment(session, method)


def _programs(run: cfg.Run, mesh: Mesh) -> list[Program]:
  method = _method(run)
  verifier = None
  if isinstance(method.verifier, cfg.AnswerMatch):
    verifier = DeviceVerifier(exact.device_verifier(
        programs.longest_tokens(run.model), b'#', programs.STOP_IDS))
  prompts = programs.abstract_prompts(method.rollouts, mesh, {
      'answer': ((_ANSWER_BYTES,), jnp.int32), 'answer_lengths': ((), jnp.int32)})
  return programs.of_step(run, mesh, method, prompts, verifier,
                          functools.partial(reinforce.new_method, run, mesh))


KIND = Kind(_open, _programs, reinforce.num_tokens, reinforce.model_flops, reinforce.new_method,
            _reopen)
