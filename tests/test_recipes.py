"""The run files of BitNet v2's sizes say what the paper's table says."""

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt.models import transformer
from jaxrl_pt.params import count
from jaxrl_pt.train import optim
from tests.golden import regenerate

# 2504.18415, appendix: hidden, GLU, heads, layers, and the peaks of the rate in both stages.
SIZES = {'400m': (1024, 4096, 16, 24, 1.8e-3, 1.2e-3), '1_3b': (2048, 8192, 32, 18, 1.2e-3, 8e-4),
         '3b': (4096, 8192, 32, 20, 1.2e-3, 6.4e-4), '7b': (4096, 16384, 32, 24, 1e-3, 6e-4)}


def _run(name: str) -> cfg.Run:
  path = regenerate.ROOT / 'gin' / 'run' / f'{name}.gin'
  return gin_bindings.load([str(path)], regenerate.REQUIRED.get(name, ()))[0]


@pytest.mark.parametrize('size', SIZES)
def test_bitnet_v2_follows_its_table(size):
  run = _run(f'pretrain_bitnet_v2_{size}')
  width, ff, heads, layers, first, second = SIZES[size]
  model, steps = run.model, run.train.num_steps
  assert (model.d_model, model.d_ff) == (width, ff)
  assert (model.num_heads, model.num_kv_heads, model.num_layers) == (heads, heads, layers)
  assert model.head_dim * heads == width
  # 100B tokens in batches of 1M, rows of 2048.
  assert run.data.seq_len == 2048
  assert run.train.batch_size * 2048 == pytest.approx(1e6, rel=0.05)
  assert steps * run.train.batch_size * 2048 == pytest.approx(100e9, rel=1e-4)
  # Both peaks begin decays over the whole run, to 3e-5, after 375 steps of warm-up.
  rate = optim.learning_rate(run.optimizer.schedule, steps)
  on_line = lambda peak, step: peak + (3e-5 - peak) * (step - 375) / (steps - 375)
  half = round(steps / 2)
  assert float(rate(374)) == pytest.approx(first)
  assert float(rate(half - 1)) == pytest.approx(on_line(first, half - 1), rel=1e-3)
  assert float(rate(half)) == pytest.approx(on_line(second, half), rel=1e-3)
  assert float(rate(steps)) == pytest.approx(3e-5, rel=1e-3)
  decay = optim.weight_decay(run.optimizer, steps)
  assert [float(decay(step)) for step in (0, half - 1, half, steps)] == [
      pytest.approx(0.1), pytest.approx(0.1), 0, 0]
  assert (run.optimizer.b1, run.optimizer.b2) == (0.9, 0.95)
  _check_late_int4(run)


def _check_late_int4(run: cfg.Run) -> None:
  """Activations are int8 over 95 % of the steps and int4 after that; all else stays."""
  steps = run.train.num_steps
  late = round(0.95 * steps)
  kinds = [cfg.model_at(run, step).quant for step in (0, late - 1, late, steps - 1)]
  assert [kind.activations for kind in kinds] == ['int8', 'int8', 'int4', 'int4']
  assert all(kind.weights == 'ternary' and kind.hadamard for kind in kinds)


def test_the_tiny_recipe_has_the_parts_of_the_pods():
  run, pod = _run('pretrain_bitnet_v2_tiny'), _run('pretrain_bitnet_v2_7b')
  _check_late_int4(run)
  of_tiny, of_pod = run.optimizer.schedule, pod.optimizer.schedule
  assert of_tiny.shape == of_pod.shape == 'linear'
  assert of_tiny.switch_fraction == of_pod.switch_fraction == 0.5
  assert of_tiny.second_peak_rate / of_tiny.peak_rate == pytest.approx(
      of_pod.second_peak_rate / of_pod.peak_rate)
  assert run.model.activation == pod.model.activation and not run.model.tied_head
  assert count(transformer.build(run.model).specs) < 1.2e6


def test_the_tiny_2b4t_has_the_parts_of_the_pod():
  run, pod = _run('pretrain_2b4t_tiny'), _run('pretrain_2b4t')
  of_tiny, of_pod = run.optimizer.schedule, pod.optimizer.schedule
  assert of_tiny.shape == of_pod.shape == 'cosine'
  assert of_tiny.second_peak_rate / of_tiny.peak_rate == pytest.approx(
      of_pod.second_peak_rate / of_pod.peak_rate, rel=0.01)
  assert run.optimizer.weight_decay_shape == pod.optimizer.weight_decay_shape == 'cosine'
  assert run.model.quant == pod.model.quant == cfg.Quant('ternary', 'int8')
  assert run.model.sub_norm and run.model.tied_head and run.model.activation == 'relu2'


def test_the_stages_of_2b4t_have_the_numbers_of_the_paper():
  sft, dpo = _run('sft_2b4t'), _run('dpo_2b4t')
  assert sft.model == dpo.model == _run('pretrain_2b4t').model
  # Token losses are summed; a clip of the norm, made for means, would act in every step.
  assert sft.objective.loss == 'sum' and sft.optimizer.clip_norm == 0
  assert (dpo.objective.loss, dpo.objective.beta) == ('sigmoid', 0.1)
  assert dpo.optimizer.schedule.peak_rate == 2e-7
  assert sft.optimizer.schedule.peak_rate > _run('sft_7b').optimizer.schedule.peak_rate


def test_the_tiny_stages_of_2b4t_follow_one_another():
  runs = [_run(f'{stage}_2b4t_tiny') for stage in ('pretrain', 'sft', 'dpo')]
  assert len({run.model for run in runs}) == 1
  assert runs[1].objective.start_from == 'runs/pretrain_2b4t_tiny'
  assert runs[2].objective.start_from == 'runs/sft_2b4t_tiny'
  sft, dpo = _run('sft_2b4t'), _run('dpo_2b4t')
  assert runs[1].objective.loss == sft.objective.loss
  assert runs[1].optimizer.clip_norm == sft.optimizer.clip_norm
  assert runs[2].objective.beta == dpo.objective.beta


def test_the_tiny_judge_that_rewards_has_the_shape_of_the_one_that_is_trained():
  method, judge = _run('judge_reward_tiny').objective, _run('rrm_tiny')
  assert method.verifier.model == judge.model != _run('judge_reward_tiny').model
  assert method.verifier.judge_from == 'runs/rrm_tiny'
  pods = [_run(f'judge_reward_{size}') for size in ('7b', '32b')]
  assert all(pod.objective.verifier.model == pod.model for pod in pods)
