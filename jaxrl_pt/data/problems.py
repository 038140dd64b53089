"""Turns problems into prompts: what a step asks is a function of (problems, seed, step).

    cfg.Problems → load → (training, held-out) lists of Problem
                 → encode with the run's tokenizer → ProblemSet
                 → step_prompts(set, num_prompts, seed, step) → Prompts and their references

A device verifier reads the answer's bytes in `Prompts.extras`, a host verifier the reference
text.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from dataclasses import dataclass
import decimal
import functools
import hashlib
import json
from typing import Any

import numpy as np

from jaxrl_pt import config
from jaxrl_pt.data import (
    code_problems,
    generated,
    gym_questions,
    judge_problems,
    judge_prompts,
    knights,
    pack,
    preferences,
    sources,
    template_text,
    token_table,
)
from jaxrl_pt.data.chat import ChatTemplate, prompt_ids
from jaxrl_pt.data.generated import Problem
from jaxrl_pt.data.next_token import step_rows
from jaxrl_pt.data.tokenizer import Tokenizer, begun
from jaxrl_pt.errors import UserError
from jaxrl_pt.types import Prompts

# A JSON number beyond 10^±50 is written with its exponent.
_MAX_ZEROS = 50


@dataclass(frozen=True)
class ProblemSet:
  """Problems with their prompts' tokens and their answers' bytes, as host arrays padded with 0.

  `digest` covers prompts, answers and tokens, and must be the same when a run resumes.
  """

  problems: tuple[Problem, ...]
  tokens: np.ndarray  # i32[R, T] prompts
  lengths: np.ndarray  # i32[R]
  answers: np.ndarray  # i32[R, W] bytes of the reference answers
  answer_lengths: np.ndarray  # i32[R]

  def __len__(self) -> int:
    return len(self.problems)

  @functools.cached_property
  def digest(self) -> str:
    """sha256 of all texts and tokens."""
    texts = json.dumps([(p.id, p.prompt, p.answer) + ((p.system,) if p.system else ())
                        for p in self.problems])
    return hashlib.sha256(texts.encode() + self.tokens.tobytes()
                          + self.answers.tobytes()).hexdigest()

  def prompts(self, rows: np.ndarray) -> tuple[Prompts, list[str]]:
    """The prompts of `rows`, i64[N], as numpy arrays, and their reference answers.

    The prompts have the ids of the problems, so that a prompt's noise does not depend on where in a
    batch it stands.
    """
    chosen = [self.problems[row] for row in rows]
    ids: Any = np.array([p.id for p in chosen], np.int32)
    arrays: Any = [x[rows] for x in (self.tokens, self.lengths, self.answers,
                                     self.answer_lengths)]
    tokens, lengths, answers, answer_lengths = arrays
    extras = {'answer': answers, 'answer_lengths': answer_lengths}
    return Prompts(tokens, lengths, ids, extras=extras), [p.answer for p in chosen]


def step_prompts(problems: ProblemSet, num_prompts: int, seed: int, step: int
                 ) -> tuple[Prompts, list[str]]:
  """What step `step` (from 0) asks; each epoch has all problems in an order f(seed, epoch)."""
  return problems.prompts(step_rows(len(problems), num_prompts, seed, step))


# --- Loading --------------------------------------------------------------------


def load(problems: config.Problems) -> tuple[list[Problem], list[Problem]]:
  """Loads (training, held-out) problems, put in the template and in the source's order.

  A hash of the prompt alone decides which problems are held out, so equal prompts fall on the same
  side; of a judge's problems, a hash of the query. The held-out prompts are distinct: one that the
  source repeats is measured once, by its first reference answer.

  Raises:
    UserError: a file cannot be read, a row has no answer, a task does not exist, or no problem is
      left to train on.
  """
  before, _, after = problems.template.partition('{prompt}')
  sides: tuple[list[Problem], list[Problem]] = [], []
  measured = set()
  for p in _problems(problems):
    held_out = pack.hold_out(p.key or p.prompt) < problems.held_out
    if held_out and p.prompt in measured:
      continue
    if held_out:
      measured.add(p.prompt)
    sides[held_out].append(dataclasses.replace(p, prompt=before + p.prompt + after))
  name = type(problems.source).__name__
  if not sides[0]:
    raise UserError(f'{name} has no problem to train on: give more, or lower Problems.held_out.')
  if problems.held_out and not sides[1]:
    raise UserError(f'None of the {len(sides[0])} problems of {name} is held out: give more, or '
                    'set Problems.held_out higher, or to 0 for none.')
  return sides


def prompts(problems: config.Problems, held_out: bool) -> Iterator[str]:
  """Yields what one side asks as the source has it, without the template: the keys of the split."""
  keys = (p.key or p.prompt for p in _problems(problems))
  return (key for key in keys if (pack.hold_out(key) < problems.held_out) == held_out)


def _problems(problems: config.Problems) -> Iterator[Problem]:
  match problems.source:
    case config.JsonlProblems() as source:
      return _jsonl(source)
    case config.KnightsAndKnaves(size=size) as source:
      return (knights.puzzle(source, i) for i in range(size))
    case config.ReasoningGym() as source:
      return _reasoning_gym(source)
    case config.CodeProblems() as source:
      return code_problems.problems(source)
    case config.JudgePairs() as source:
      return judge_problems.problems(source, preferences.pairs(source.source), problems.is_chat)
    case config.NumberedGames(size=size, seed=seed):
      return (Problem(i, f'game {seed}.{i}', '', f'game {i}') for i in range(size))
    case (config.Arithmetic() | config.RedundantChecks() | config.HybridSums()) as source:
      return (generated.problem(source, i) for i in range(source.size))


def _jsonl(source: config.JsonlProblems) -> Iterator[Problem]:
  for i, (place, row) in enumerate(sources.json_rows(source.glob)):
    texts = []
    for setting, field in (('prompt_field', source.prompt_field),
                           ('answer_field', source.answer_field)):
      value = row.get(field)
      if isinstance(value, (int, float, decimal.Decimal)) and not isinstance(value, bool):
        value = _written_out(value, place, field)
      texts.append(sources.text_of(value, place, f'JsonlProblems.{setting}', field, row))
    if texts[1].strip().lower() in ('', 'nan'):
      raise UserError(f'{place} has no answer in the field {source.answer_field!r} (it holds '
                      f'{texts[1]!r}), so no response could be right: write one, or leave the '
                      'row out.')
    yield Problem(i, texts[0], texts[1], place)


def _written_out(number: int | float | decimal.Decimal, place: str, field: str) -> str:
  """A JSON number as its file writes it, without an exponent: 0.00001, where str says 1e-05.

  Raises:
    UserError: it is NaN or infinite, which JSON does not have and Python reads.
  """
  if isinstance(number, float):  # only these constants are: other numbers are read as Decimal
    raise UserError(f'{place} has {number} in the field {field!r}, which is no number to ask for '
                    'or to answer: write one, or leave the row out.')
  exact = decimal.Decimal(number)
  is_short = abs(exact.adjusted()) <= _MAX_ZEROS
  return f'{exact:f}' if is_short else str(number)


def _reasoning_gym(source: config.ReasoningGym) -> Iterator[Problem]:
  """Yields problems whose reference is the problem itself: its name and what the library knows."""
  for i, question in enumerate(gym_questions.questions(source)):
    entry = {} if question.entry is None else {'entry': question.entry}
    reference = json.dumps({**gym_questions.reference(source), 'index': i, **entry})
    yield Problem(i, question.text, reference, f'problem {i} of {source.task}', question.answer)


# --- Encoding -------------------------------------------------------------------


def encode(problems: Sequence[Problem], tokenizer: Tokenizer, prompt_len: int,
           with_answers: bool = True, template: str = '{prompt}', chat: ChatTemplate | None = None
           ) -> ProblemSet:
  """Encodes all prompts, each begun as a document is, and the bytes of all answers.

  Args:
    problems: at least one.
    tokenizer: of the run.
    prompt_len: T, the most tokens that a prompt may have.
    with_answers: False where the verifier reads text: bytes of the answers, which may be long,
      are then left out.
    template: the prompt template in which the problems were put when they were loaded.
    chat: the chat template that asks for the answer to a problem; None where there is no chat.

  Raises:
    UserError: a prompt is empty or longer than `prompt_len`.
  """
  prompts = []
  if chat is None:
    all_ids = [begun(tokenizer, ids) if ids else []
               for ids in _prompt_ids(problems, tokenizer, template)]
  else:
    all_ids = [prompt_ids(chat, tokenizer, judge_prompts.messages(p.system, p.prompt))
               for p in problems]
  for problem, tokens in zip(problems, all_ids, strict=True):
    if not 1 <= len(tokens) <= prompt_len:
      raise UserError(f'The prompt of {problem.place} has {len(tokens)} tokens, and '
                      f'Rollouts.prompt_len is {prompt_len}: ' + (
                          'raise it, or leave the row out.' if tokens else
                          'a prompt needs at least one; leave the row out.'))
    prompts.append(tokens)
  answers = [list(p.answer.encode()) if with_answers else [] for p in problems]
  tokens_RT, lengths = _padded(prompts, prompt_len)
  answers_RW, answer_lengths = _padded(answers, max(1, max(map(len, answers))))
  return ProblemSet(tuple(problems), tokens_RT, lengths, answers_RW, answer_lengths)


def _prompt_ids(problems: Sequence[Problem], tokenizer: Tokenizer, template: str
                ) -> list[list[int]]:
  """The ids of prompts, in which only the template's special tokens are special tokens."""
  before, _, after = template.partition('{prompt}')
  if not token_table.find_special(tokenizer.special_tokens, before + '\0' + after):
    return tokenizer.encode_batch([p.prompt for p in problems])
  inner = lambda text: text[len(before):len(text) - len(after)]
  return [template_text.encode(tokenizer, template_text.around(inner(p.prompt), before, after))
          for p in problems]


def _padded(rows: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
  table = np.zeros((len(rows), width), np.int32)
  for i, row in enumerate(rows):
    table[i, :len(row)] = row
  return table, np.array([len(row) for row in rows], np.int32)
