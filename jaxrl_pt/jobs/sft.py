"""Supervised fine-tuning: next-token prediction of the assistant's part of conversations.

    L = Σ_t w_t · (−log p(y_t | y_<t)) / n

over the learned tokens of all rows of a batch, where w is the weight of the conversation's source.
n is the number of learned tokens of the whole batch for the loss 'mean', and 1 for 'sum'.
"""

from collections.abc import Callable, Iterator
import contextlib
from pathlib import Path

from jax.sharding import Mesh

from jaxrl_pt import config as cfg
from jaxrl_pt.data import build
from jaxrl_pt.data import tokenizer as tokenizers
from jaxrl_pt.jobs import packed, pretrain, reinforce
from jaxrl_pt.jobs.kind import Kind, Program
from jaxrl_pt.parallel import memory
from jaxrl_pt.parallel import model as models
from jaxrl_pt.run import session as sessions
from jaxrl_pt.run.workdir import claimed
from jaxrl_pt.train import optim
from jaxrl_pt.train import state as states


def _method(run: cfg.Run) -> cfg.SFT:
  assert isinstance(run.objective, cfg.SFT)
  return run.objective


def open_start(run: cfg.Run, start_from: str, workdir: Path
               ) -> tuple[packed.Start, tokenizers.Tokenizer | None]:
  """The policy that a supervised stage starts from, with its tokenizer.

  Args:
    run: the run's settings.
    start_from: the setting that names the policy's work directory; '' for random parameters.
    workdir: the run's own work directory.

  Raises:
    UserError: the run does not fit the devices, its warm-up and decay overlap, the policy has
      another model than the run, or it was trained on prompts that the run holds out.
  """
  if not start_from:
    optim.check_schedule(run.optimizer.schedule, cfg.num_updates(run))
    memory.check_fits(run)
    return packed.RANDOM, None
  start = reinforce.start_policy(run, start_from, workdir)
  check_held_out(run.data, start.session.run.data)
  return (packed.Start(start.params, reinforce.digest(start.params)),
          start.session.data.tokenizer)


def check_held_out(data: cfg.Data, trained: cfg.Data) -> None:
  """Refuses held-out prompts on which the start policy was trained.

  Args:
    data: the run's settings of data.
    trained: those of the start policy's run.
  """
  build.refuse_trained_on(
      trained, 1.0 if data.validation_glob else data.validation_fraction,
      lambda: build.split_keys(data, held_out=True),
      'hold out no more here than there (Data.validation_fraction), or leave them out of one side.')


@contextlib.contextmanager
def opened(run: cfg.Run, start_from: str, workdir: Path, resolved_text: str,
           allow: frozenset[str], stage_of: Callable[[sessions.Session, packed.Start], packed.Stage]
           ) -> Iterator[packed.PackedTraining]:
  """The job of a supervised stage, as `Kind.open` gives it.

  Args:
    run, workdir, resolved_text, allow: as `Kind.open` takes them.
    start_from: as in `open_start`.
    stage_of: (session, start policy) → what the objective does of its own.
  """
  start, tokenizer = open_start(run, start_from, workdir)
  with claimed(workdir):
    session = sessions.open_session(run, workdir, resolved_text, allow=allow, tokenizer=tokenizer)
    stage = stage_of(session, start)
    with contextlib.closing(packed.PackedTraining(session, stage, start)) as job:
      yield job


def _open(run: cfg.Run, workdir: Path, resolved_text: str, allow: frozenset[str]
          ) -> contextlib.AbstractContextManager[packed.PackedTraining]:
  method = _method(run)
  return opened(run, method.start_from, workdir, resolved_text, allow,
                lambda session, start: pretrain.stage(session, method.loss))


def _programs(run: cfg.Run, mesh: Mesh) -> list[Program]:
  model = models.build(run.model, run.compute, mesh)
  optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), model.specs)
  state = states.abstract_state(model, optimizer, mesh)
  step = pretrain.train_step(run, mesh, run.model, optimizer, _method(run).loss)
  return [Program('SFT step', step, (state, packed.abstract_batch(run, mesh)))]


KIND = Kind(_open, _programs, packed.num_tokens, packed.model_flops, packed.keeps_nothing)
