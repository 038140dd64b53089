"""A reward model: a scalar head on a policy, trained on preference pairs (Bradley and Terry, 1952).

    r(x, y) = w · h + b at the last token of prompt and completion,   L = −log σ(r_c − r_r)

The policy's parameters are trained with the head. The head begins at zero and is kept in
`TrainState.method`, with an optimizer of its own that has the run's settings; weight decay acts on
it as on a matrix, and the clip is that of its own gradient.
"""

from collections.abc import Iterator
import contextlib
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import params as P
from jaxrl_pt.data import chat_files, conversations, pack
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import packed, pairs, sft
from jaxrl_pt.jobs.kind import Kind, Program
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel import rules
from jaxrl_pt.run import policy
from jaxrl_pt.run import session as sessions
from jaxrl_pt.train import optim, preferences
from jaxrl_pt.train import state as states
from jaxrl_pt.train import step as steps
from jaxrl_pt.types import Batch, Params


def _method(run: cfg.Run) -> cfg.RewardModel:
  assert isinstance(run.objective, cfg.RewardModel)
  return run.objective


def _loss_of(run: cfg.Run, mesh: Mesh) -> pairs.LossOf:
  return lambda model, segments: preferences.bradley_terry(
      _method(run), models.build(model, run.compute, mesh), segments)


def _head_optimizer(run: cfg.Run) -> optax.GradientTransformation:
  specs = {'weight': P.ParamSpec((run.model.d_model,), jnp.float32, ('embed',), P.zeros, 'head'),
           'bias': P.ParamSpec((), jnp.float32, (), P.zeros, 'bias')}
  return optim.make_optimizer(run.optimizer, cfg.num_updates(run), specs)


def _new_method(run: cfg.Run, mesh: Any, params: Params) -> states.ValueHead:
  """The head before the first step."""
  del mesh, params
  head = states.zero_head(run.model.d_model)
  return states.ValueHead(head, _head_optimizer(run).init(head))


def _stage(session: sessions.Session, start: packed.Start) -> packed.Stage:
  del start
  run, segments = session.run, pairs.num_segments(session.data)
  return pairs.stage(
      session, _loss_of(run, session.mesh),
      lambda split, batch: pairs.no_reference(split, batch, segments),
      lambda optimizer: steps.Optimizers(optimizer, _head_optimizer(run)),
      lambda state: (state.params, state.method.params),
      functools.partial(_new_method, run, session.mesh))


def _open(run: cfg.Run, workdir: Path, resolved_text: str, allow: frozenset[str]
          ) -> contextlib.AbstractContextManager[packed.PackedTraining]:
  return sft.opened(run, _method(run).start_from, workdir, resolved_text, allow, _stage)


def _programs(run: cfg.Run, mesh: Mesh) -> list[Program]:
  model = models.build(run.model, run.compute, mesh)
  optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), model.specs)
  return [pairs.program(run, mesh, 'reward model step', _loss_of(run, mesh),
                        steps.Optimizers(optimizer, _head_optimizer(run)),
                        functools.partial(_new_method, run, mesh))]


def _restored(session: sessions.Session, step: int | None) -> tuple[Params, Any]:
  """The parameters and the head of a checkpoint."""
  new_method = functools.partial(_new_method, session.run, session.mesh)
  return (policy.restore(session, step, 'params').state,
          policy.restore(session, step, 'method', new_method).state.params)


def _evaluate(session: sessions.Session, step: int) -> dict[str, float]:
  segments = pairs.num_segments(session.data)
  return pairs.evaluated(session, _loss_of(session.run, session.mesh), _restored(session, step),
                         lambda split, batch: pairs.no_reference(split, batch, segments))


KIND = Kind(_open, _programs, packed.num_tokens, packed.model_flops, _new_method,
            evaluate=_evaluate)


# --- Scores -----------------------------------------------------------------------


def score(workdir: Path, glob: str, step: int | None = None) -> Iterator[dict[str, Any]]:
  """Yields the reward of each conversation of JSON-lines files.

  Args:
    workdir: the work directory of a reward model.
    glob: files whose rows are conversations (`cfg.Conversations`).
    step: the checkpoint's step; None takes the newest good one.

  Yields:
    {'place': 'file:line', 'reward': …, 'tokens': …}.

  Raises:
    UserError: no checkpoint, no reward model, or a row that is no conversation or is too long.
  """
  session = policy.open_run(workdir, step, cfg.Mesh())
  run = session.run
  if not isinstance(run.objective, cfg.RewardModel):
    raise UserError(f'{workdir} holds a run of {type(run.objective).__name__}: give the work '
                    'directory of a run of RewardModel.')
  trained = _restored(session, step)
  compute = jax.jit(preferences.rewards(session.model(run.model), 1))
  num_rows = rules.whole_rows(session.mesh, 1)
  tokenizer = session.data.tokenizer
  making = sessions.making(run, run.data, workdir, tokenizer)
  template = making.template or chat_files.plain(tokenizer)
  for row, _ in conversations.rows(cfg.Conversations(glob)):
    ids, _ = conversations.encode(row, tokenizer, template)
    batch = _alone(row.place, ids, run.data.seq_len, num_rows)
    reward = compute(trained, session.put_global(batch))
    yield {'place': row.place, 'reward': float(np.asarray(reward)[0, 0]),
           'tokens': int(np.asarray(batch.segments[0]).sum())}


def _alone(place: str, ids: np.ndarray, seq_len: int, num_rows: int) -> Batch:
  """Equal rows of one conversation with its end as the last input, as in training."""
  if len(ids) > seq_len:
    raise UserError(f'{place} has {len(ids)} tokens, and the reward model was trained on at '
                    f'most Data.seq_len = {seq_len}: shorten the row.')
  rows_B3T = np.zeros((num_rows, 3, seq_len), np.int32)
  rows_B3T[:, 0, :len(ids)], rows_B3T[:, 2, :len(ids)] = ids, 1
  return pack.to_batch(rows_B3T, np.zeros(num_rows, np.int32))
