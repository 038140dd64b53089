"""From an objective to its job: each is known, and an unknown one is a mistake that says so."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_args

import jax
import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt import params as P
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import dpo, pretrain, reward_model, rl, rpt, sft
from jaxrl_pt.jobs import open as opening
from jaxrl_pt.models import transformer
from jaxrl_pt.parallel.mesh import make_mesh

ROOT = Path(__file__).resolve().parents[2]
METHOD = cfg.RL('unused', cfg.Problems(cfg.Arithmetic(9)), cfg.AnswerMatch(),
                rollouts=cfg.Rollouts(4, 4, 1, 2), algorithm=cfg.Algorithm(advantage=cfg.DrGRPO()))
MESH = make_mesh(cfg.Mesh())


def make_run(objective, quant: cfg.Quant = cfg.Quant()) -> cfg.Run:
  model = cfg.Model(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8,
                    vocab_size=11, quant=quant)
  return cfg.Run(
      seed=1, model=model, objective=objective,
      data=cfg.Data(source=cfg.PythonStdlib(), tokenizer=cfg.Bytes(), seq_len=16),
      optimizer=cfg.AdamW(schedule=cfg.ConstantRate(0.01)),
      train=cfg.Train(9, 0 if isinstance(objective, cfg.RL) else 4))


def test_every_objective_has_a_kind_of_its_own(monkeypatch):
  monkeypatch.chdir(ROOT)
  shipped = [gin_bindings.load([str(path)], [])[0].objective
             for path in sorted((ROOT / 'gin/run').glob('*_tiny.gin'))]
  kinds = {type(objective): opening.kind(objective) for objective in shipped}
  assert kinds.keys() == set(get_args(cfg.Objective))
  assert len(set(map(id, kinds.values()))) == len(kinds)
  assert [kinds[kind] for kind in (
      cfg.NextToken, cfg.SFT, cfg.DPO, cfg.RewardModel, cfg.RPT, cfg.RL)] == [
          pretrain.KIND, sft.KIND, dpo.KIND, reward_model.KIND, rpt.KIND, rl.KIND]


@dataclass(frozen=True)
class Distil:
  """An objective that somebody has begun to write."""

  start_from: str = 'a'
  rollouts: ClassVar[None] = None
  algorithm: ClassVar[None] = None
  positions_per_document: ClassVar[int] = 1


def test_an_objective_without_a_job_is_refused_by_name():
  with pytest.raises(UserError, match=r"Run.objective = Distil\(start_from='a'\): there is no job "
                                      r'for it; choose one of @cfg.NextToken\(\), '):
    opening.kind(Distil())


def test_nothing_of_a_run_begins_for_an_objective_without_a_job(tmp_path):
  run = make_run(METHOD)
  object.__setattr__(run, 'objective', Distil())  # `Run` refuses it too.
  for opened in (lambda: opening.train(run, tmp_path / 'work', ''),
                 lambda: opening.programs(run, MESH)):
    with pytest.raises(UserError, match='Distil.* there is no job for it'):
      opened()
  assert not (tmp_path / 'work').exists()


def test_preflight_has_the_programs_of_each_mode():
  on_device = make_run(METHOD)
  on_host = make_run(dataclasses.replace(METHOD, verifier=cfg.MathVerifier()))
  names = [[p.name.split(':')[0] for p in opening.programs(run, MESH)]
           for run in (on_device, on_host)]
  # On one device no weights are synced.
  assert names == [['RL step'], ['sampler', 'learner', 'reference policy']]


def test_preflight_has_both_where_groups_are_drawn_again_later():
  """A step is one program until groups are drawn again; from the first step on it never is."""
  found = []
  for first in (0, 3):
    rollouts = dataclasses.replace(METHOD.rollouts, selection=cfg.DynamicSampling(from_step=first))
    run = make_run(dataclasses.replace(METHOD, rollouts=rollouts))
    found.append([p.name.split(':')[0] for p in opening.programs(run, MESH)])
  stages = ['sampler', 'learner', 'reference policy']
  assert found == [stages, ['RL step', *stages]]


def test_preflight_has_a_program_for_each_kind_of_activations():
  for int4_from, activations in ((1.0, ['int8']), (0.5, ['int8', 'int4'])):
    run = make_run(cfg.NextToken(int4_from=int4_from), cfg.Quant('ternary', 'int8'))
    assert [p.name for p in opening.programs(run, MESH)] == [
        f'pretraining step, {a} activations' for a in activations]


def test_preflight_counts_a_judge_beside_every_program():
  run = gin_bindings.load(['gin/run/judge_reward_tiny.gin'], [])[0]
  num_bytes = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  judge = run.objective.verifier.model
  of_judge = P.num_bytes(transformer.build(judge).specs)
  without = dataclasses.replace(run, objective=dataclasses.replace(
      run.objective, verifier=cfg.MathVerifier()))
  alone = {p.name: num_bytes((p.args, p.beside))
           for p in opening.programs(without, MESH)}
  together = {p.name: num_bytes((p.args, p.beside)) for p in opening.programs(run, MESH)}
  asked = together.pop('judge: prefill and decode of verdicts')
  assert together.keys() == alone.keys() and asked > of_judge
  # Beside the policy's programs are the judge's parameters and the pages of its engine.
  more = {together[name] - alone[name] for name in alone}
  assert len(more) == 1 and more.pop() > of_judge
