"""`jaxrl-pt eval --tasks`: lm-eval's tasks on a trained policy, offline."""

from collections.abc import Callable, Sequence
import contextlib
import importlib.metadata
import json
from pathlib import Path
import sys
from typing import Any

from lm_eval import evaluator, utils

from jaxrl_pt import files
from jaxrl_pt.data import chat_files
from jaxrl_pt.errors import UserError
from jaxrl_pt.evaluation import harness, task_files
from jaxrl_pt.run import places
from jaxrl_pt.run.policy import Policy, load_policy

# What is kept of lm-eval's results; the rest says what machine this is.
_KEPT = ('results', 'groups', 'group_subtasks', 'versions', 'n-shot', 'n-samples',
         'higher_is_better', 'configs')
# Stands in a conversation where an answer goes on.
_MARK = 'THE-ANSWER-GOES-ON-HERE '
_VERSIONS = ('jaxrl_pt', 'lm_eval', 'datasets', 'jax')


def evaluate_tasks(workdir: Path, tasks: Sequence[str], *, step: int | None,
                   include_path: Path | None, limit: int | None, num_fewshot: int | None,
                   max_length: int | None, add_bos: bool | None, batch_size: int, seed: int,
                   is_chat: bool = False, template: Path | None = None) -> dict[str, Any]:
  """Evaluates a checkpoint's policy on tasks of lm-eval.

  Args:
    workdir: a work directory.
    tasks: names of tasks, groups or tags.
    step: the checkpoint's step; None takes the newest good one.
    include_path: a folder with tasks of one's own; None for none.
    limit: the number of documents of each task; None takes all.
    num_fewshot: the number of solved examples in each prompt; None takes the task's own.
    max_length, add_bos: as `harness.reading_of` takes them.
    batch_size, seed: as `harness.PolicyLM` takes them.
    is_chat: whether prompts are put into a chat template.
    template: a file with a chat template in Jinja2; None takes the model's own.

  Returns:
    The step, versions of the libraries and what lm-eval reports.

  Raises:
    UserError: no checkpoint; or a task is unknown, cannot be read or needs code or the network.
  """
  manager = task_files.manager_of(tasks, include_path)
  task_files.render_in_sandbox()
  policy = load_policy(workdir, step)
  carried = places.carried(policy.session.run, workdir)
  reading = harness.reading_of(policy, max_length=max_length, add_bos=add_bos,
                               described=_described(carried))
  model = harness.PolicyLM(policy, reading, batch_size=batch_size, seed=seed,
                           render=_renderer(policy, carried, template) if is_chat else None)
  try:
    # What lm-eval says on its way is no result.
    with contextlib.redirect_stdout(sys.stderr):
      results: Any = evaluator.simple_evaluate(
          model, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, log_samples=False,
          task_manager=manager, apply_chat_template=is_chat, bootstrap_iters=1000)
  except UserError:
    raise
  except Exception as e:  # A task's settings, templates and files can fail in any way.
    reason = ' '.join(str(e).split())[:300].rstrip('.') or 'no reason given'
    raise UserError(f'lm-eval cannot evaluate {", ".join(tasks)} ({type(e).__name__}: {reason}): '
                    'look at the files of the task; --debug shows where it fails.') from e
  return {'step': policy.step,
          'versions_of': {name: importlib.metadata.version(name) for name in _VERSIONS},
          'max_length': reading.max_length, 'limit': limit, 'num_fewshot': num_fewshot,
          'seed': seed, 'chat_template': is_chat,
          **{name: results[name] for name in _KEPT if name in results}}


def _described(carried: Path | None) -> dict[str, Any]:
  """What is known of an imported model; empty for one that was trained here."""
  found: dict[str, Any] = {}
  for name in ('config.json', 'tokenizer_config.json') if carried is not None else ():
    if carried is not None and (carried / name).is_file():
      found |= files.read_object(carried / name)
  if isinstance(found.get('bos_token'), dict):
    found['bos_token'] = found['bos_token'].get('content')
  return found


def _renderer(policy: Policy, carried: Path | None, template: Path | None
              ) -> Callable[[list[dict[str, str]], bool], str]:
  """Writes messages as the text of a conversation.

  Args:
    policy: the policy.
    carried: the folder with its chat template, if there is one.
    template: a file with a chat template in Jinja2; None takes the model's own, or plain text.

  Returns:
    messages, whether the assistant's turn is opened → text. Where it is not, the last message is
    what the assistant's turn begins with (a task's `gen_prefix`), and the text ends with it. As in
    transformers it then stands where the template puts an answer, which need not be where the
    template opens a turn: some open one with a thought.
  """
  given = None if template is None else chat_files.read_template(template)
  chat = chat_files.of_model(carried, policy.session.data.tokenizer, given)

  def render(messages: list[dict[str, str]], is_opened: bool) -> str:
    if is_opened:
      return chat.render(messages, add_generation_prompt=True)
    *turns, last = messages
    text = chat.render([*turns, {**last, 'content': last['content'] + _MARK}])
    place = text.rfind(_MARK.rstrip())
    if place < 0:
      raise UserError(f'{chat.name} does not write what an answer begins with: leave gen_prefix '
                      'out of the task, or give another --template.')
    # The space at the mark's end is gone where the template strips what is said.
    return text[:place] if text.startswith(_MARK, place) else text[:place].rstrip()

  return render


def table(results: dict[str, Any]) -> str:
  """lm-eval's own table of the results, and one of the groups where there are any."""
  tables = [utils.make_table(results)]
  if results.get('groups'):
    tables.append(utils.make_table(results, 'groups'))
  return '\n'.join(tables)


def as_json(command: str, results: dict[str, Any]) -> str:
  """The results as JSON, beside the command that they come from."""
  return json.dumps({'command': command, **results}, indent=2, ensure_ascii=False,
                    default=utils.handle_non_serializable)


def write(path: Path, command: str, results: dict[str, Any]) -> None:
  """Writes `as_json` to a file, whole or not at all.

  Raises:
    Unwritable: the file cannot be written.
  """
  files.write_text(path, as_json(command, results) + '\n')
