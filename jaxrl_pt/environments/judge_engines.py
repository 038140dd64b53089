"""The engines of a judge that lies on the mesh of a run beside the policy: one for a data shard.

    judge's parameters → weight sync → engines of the shards → verdicts

Each host asks the engines of its own devices, and all hosts get all verdicts. All comparisons of a
query are asked of one engine, where their prompts share pages.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.environments import judging
from jaxrl_pt.environments.judging import EngineJudge, Judged
from jaxrl_pt.errors import UserError
from jaxrl_pt.parallel import model as models
from jaxrl_pt.parallel import rules
from jaxrl_pt.parallel.mesh import shard_meshes
from jaxrl_pt.run import places, policy
from jaxrl_pt.run import session as sessions
from jaxrl_pt.run.policy import Policy
from jaxrl_pt.sampling import weight_sync
from jaxrl_pt.sampling.engine import Engine
from jaxrl_pt.serving.comparing import Shown
from jaxrl_pt.train import programs
from jaxrl_pt.types import Params

# (comparisons, votes of each) → what the judge said.
Ask = Callable[[Sequence[Shown], int], Judged]


def load_judge(session: sessions.Session, settings: cfg.JudgeReward) -> Policy:
  """Restores the judge of a run onto the run's mesh.

  Raises:
    UserError: there is no such policy, it has another model than the settings say, or another
      tokenizer than the run.
  """
  path = places.policy(settings.judge_from, session.workdir, 'judge_from')
  judge = policy.load_policy(path, mesh=session.run.mesh)
  ours, theirs = (dataclasses.asdict(model) for model in (settings.model, judge.model.config))
  for name, value in ours.items():
    if value != theirs[name]:
      raise UserError(f'JudgeReward.model has {name} = {value!r}, but the judge in {path} ends '
                      f'with {theirs[name]!r}: set it to that.')
  if judge.session.data.tokenizer.fingerprint != session.data.tokenizer.fingerprint:
    raise UserError(f'The judge in {path} has another tokenizer than the policy whose responses it '
                    'is to compare: choose a judge that was trained from the same policy or with '
                    'the same Data.tokenizer.')
  return judge


def judge_run(run: cfg.Run, settings: cfg.JudgeReward) -> cfg.Run:
  """The run with the judge's model in place of the policy's, for the programs of the judge."""
  return dataclasses.replace(run, model=settings.model)


class JudgeEngines:
  """Asks a judge on the mesh of a run. Final."""

  def __init__(self, session: sessions.Session, settings: cfg.JudgeReward, judge: Policy) -> None:
    """Compiles nothing yet.

    Args:
      session: the run's session.
      settings: the judge's sizes and how verdicts are drawn.
      judge: from `load_judge`.

    Raises:
      UserError: the judge's tokenizer cannot write the verdicts, or a data shard spans hosts.
    """
    self._run, self._mesh = judge_run(session.run, settings), session.mesh
    self._judge = judge
    self._speaker = judging.of_policy(judge, None, settings.sampler, settings.response_tokens,
                                      is_direct=False)
    self._config = judging.engine_config(self._speaker, settings.prompt_len, settings.slots)
    self._sync = programs.weight_sync(self._run, session.mesh, cfg.Slots())
    self._meshes = shard_meshes(session.mesh)
    hosts = [{device.process_index for device in mesh.devices.flat} for mesh in self._meshes]
    if any(len(of_shard) > 1 for of_shard in hosts):
      raise UserError('RL.verifier = @cfg.JudgeReward() has an engine for each data shard, and a '
                      'shard here spans several hosts: lower Mesh.tensor × Mesh.context to the '
                      'devices of one host.')
    self._own = [i for i, of_shard in enumerate(hosts) if of_shard == {jax.process_index()}]
    self._engines: list[Engine] = []

  @contextlib.contextmanager
  def asking(self) -> Iterator[Ask]:
    """Yields `EngineJudge.ask` by all engines, which hold the judge's weights for so long.

    All hosts must ask the same, and get the same.
    """
    self._load()
    try:
      yield self._ask
    finally:
      for engine in self._engines:
        engine.unload()  # The learner has no use for the judge's copy.

  def _ask(self, comparisons: Sequence[Shown], num_votes: int) -> Judged:
    numbers: dict[str, int] = {}
    shards = np.array([numbers.setdefault(shown.query, len(numbers)) % len(self._meshes)
                       for shown in comparisons])
    parts = [np.flatnonzero(shards == shard) for shard in self._own]
    judges = [EngineJudge(engine, self._speaker) for engine in self._engines]
    with futures.ThreadPoolExecutor(len(judges)) as threads:
      found = list(threads.map(
          lambda judge, rows: judge.ask([comparisons[c] for c in rows], num_votes), judges, parts))
    return _joined(len(comparisons), num_votes, parts, found)

  def _load(self) -> None:
    """Hands the parameters over to the engines, with the step of the judge's checkpoint."""
    synced, step = self._sync(self._judge.params, self._judge.step), self._judge.step
    held = [synced if self._mesh.size == 1 else weight_sync.on_shard(synced, self._meshes[shard])
            for shard in self._own]
    if not self._engines:
      meshes = [self._meshes[shard] for shard in self._own]
      # Each compiles its program for its own devices, all at once.
      with futures.ThreadPoolExecutor(len(meshes)) as threads:
        self._engines = list(threads.map(self._make_engine, meshes, held))
    for engine, params in zip(self._engines, held, strict=True):
      engine.load(params, step)

  def _make_engine(self, mesh: Mesh, params: Params) -> Engine:
    tokenizer = self._speaker.tokenizer
    model = models.build(self._run.model, self._run.compute, mesh, rules.SAMPLE)
    return Engine(model, params, self._config, seed=self._run.seed,
                  token_bytes=tokenizer.token_bytes(), unused_ids=tokenizer.unused_ids,
                  version=self._judge.step, mesh=mesh)


def _joined(num: int, num_votes: int, parts: Sequence[np.ndarray], found: Sequence[Judged]
            ) -> Judged:
  """What all engines of all hosts said; texts are those of this host's engines alone.

  Args:
    num: comparisons.
    num_votes: of each.
    parts: the numbers of the comparisons that each engine of this host was asked.
    found: what each of them said.
  """
  votes, lengths = np.zeros((2, num, num_votes), np.int32)
  too_long = np.zeros(num, np.int32)
  responses = [[''] * num_votes for _ in range(num)]
  for rows, judged in zip(parts, found, strict=True):
    votes[rows], lengths[rows] = judged.votes + 1, judged.num_tokens  # 0 stands for another host's.
    too_long[rows] = judged.too_long
    for c, texts in zip(rows.tolist(), judged.responses, strict=True):
      responses[c] = texts
  if jax.process_count() > 1:
    votes, lengths, too_long = (x.sum(0) for x in multihost_utils.process_allgather(
        (votes, lengths, too_long)))
  return Judged((votes - 1).astype(np.int8), lengths, responses, too_long > 0)
