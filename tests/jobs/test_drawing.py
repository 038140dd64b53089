"""How a trained model draws: as its run says, but for what an evaluation sets."""

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings
from jaxrl_pt.errors import UserError
from jaxrl_pt.jobs import diffusion


def test_an_evaluation_may_draw_otherwise_than_the_run():
  run, _ = gin_bindings.load(['gin/run/maag_tiny.gin'], [])
  as_trained = diffusion.solver_of(run)
  assert (as_trained.process, as_trained.num_steps) == (run.objective.process, 8)
  other = diffusion.solver_of(run, cfg.Drawing(sampling_steps=4))
  assert (other.process, other.num_steps) == (run.objective.process, 4)
  other = diffusion.solver_of(run, cfg.Drawing(sampling_shift=0.5))
  assert other.process.sampling_shift == 0.5 and other.num_steps == 8
  assert other.process.shift == run.objective.process.shift


def test_levels_of_a_process_that_has_none_are_refused():
  run, _ = gin_bindings.load(['gin/run/maag_recurrent_tiny.gin'], [])
  with pytest.raises(UserError, match=r'trained by @cfg.VDiffusion\(\): leave it at 0'):
    diffusion.solver_of(run, cfg.Drawing(sampling_shift=0.5))
