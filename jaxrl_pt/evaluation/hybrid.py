"""`jaxrl-pt eval --gin_file gin/eval/hybrid.gin`: Hybrid Accuracy of a policy.

The engine draws, for each held-out problem, N responses in each forced mode, K whose mode the
policy chooses, one greedily, and N that think within each of some budgets; the run's own verifier
scores them. `hybrid_accuracy` turns the numbers into results, and `hybrid_report` shows them.

Budgets share their noise with the responses that think without one: a response whose thought ends
within the budget is the same response. Free responses have noise of their own, so that what the
policy chooses says nothing of the responses that the better mode was found by.
"""

from collections.abc import Callable, Sequence
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt.data import modes, problems
from jaxrl_pt.data.problems import ProblemSet
from jaxrl_pt.environments import problems as environment
from jaxrl_pt.errors import UserError
from jaxrl_pt.evaluation import hybrid_accuracy as hybrid
from jaxrl_pt.evaluation.verified import Verified, verified
from jaxrl_pt.run import samples
from jaxrl_pt.run.policy import Policy, load_policy
from jaxrl_pt.sampling.engine import Engine, Request
from jaxrl_pt.serving.text import Markers
from jaxrl_pt.serving.thinking import Thinker
from jaxrl_pt.types import NO_MODE, NO_THINK, THINK


@dataclass(frozen=True)
class Asked:
  """One kind of responses to every problem; the fields are those of `engine.Request`."""

  name: str
  num_samples: int
  sampler: cfg.Sampler
  forced: tuple[int, ...] = ()
  max_thought: int | None = None
  first_sample: int = 0


@dataclass(frozen=True)
class Drawn:
  """What became of one kind of responses: f[P, G] each, and the modes i[P, G]."""

  score: np.ndarray
  correct: np.ndarray
  valid: np.ndarray
  length: np.ndarray  # tokens, forced ones included
  mode: np.ndarray

  def of_prompt(self, name: str) -> np.ndarray:
    """f[P]: the mean over a problem's verified responses, NaN where there are none."""
    return hybrid.mean_of_valid(getattr(self, name), self.valid)


def evaluate(workdir: Path, settings: cfg.HybridAccuracy, *, step: int | None = None,
             say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
  """Measures a checkpoint's policy.

  Args:
    workdir: a work directory written by `train`; its policy may have learned by another objective
      than that of `settings.run`.
    settings: what is measured.
    step: the checkpoint's step; None takes the newest good one.
    say: gets a line for each kind of responses that has been drawn.

  Returns:
    The results, which JSON can hold; `summary` describes them.

  Raises:
    UserError: no checkpoint, a mode that is not one token, problems that the policy was trained on
      or that cannot be read, or a verifier that does not verify them.
  """
  return measure(load_policy(workdir, step), settings, say)


def measure(policy: Policy, settings: cfg.HybridAccuracy, say: Callable[[str], None]
            ) -> dict[str, Any]:
  """`evaluate` of a policy that has been loaded."""
  method = settings.method
  tokenizer, vocab_size = policy.session.data.tokenizer, policy.model.config.vocab_size
  mode_ids = modes.token_ids(tokenizer, settings.modes)
  chosen = _problems(settings, policy)
  chat = environment.chat_template(policy.session) if method.problems.is_chat else None
  encoded = problems.encode(
      chosen, tokenizer, method.rollouts.prompt_len, isinstance(method.truth, cfg.AnswerMatch),
      method.problems.template, chat)
  with environment.open_verifier(method, tokenizer, vocab_size, chosen) as verifier:
    engine = _engine(policy, settings)
    drawn = {}
    for asked in kinds(settings, mode_ids):
      responses = engine.run(_requests(asked, encoded, method, tokenizer.stop_ids))
      found = verified(responses, encoded, verifier, method.rollouts.num_prompts,
                       tokenizer.stop_ids)
      drawn[asked.name] = _drawn(found, mode_ids)
      say(f'{asked.name}: {drawn[asked.name].length.mean():.1f} tokens, accuracy '
          f'{hybrid.mean(drawn[asked.name].of_prompt("correct")):.3f}')
  return {'step': policy.step, 'problems': len(encoded), 'samples': settings.samples,
          'free_samples': settings.free_samples, 'margin': settings.margin,
          'sampler': dataclasses.asdict(settings.sampler), 'seed': settings.seed,
          **summary(drawn, [p.level for p in chosen], settings)}


def _problems(settings: cfg.HybridAccuracy, policy: Policy) -> list[problems.Problem]:
  """The problems that are measured.

  Raises:
    UserError: there are none, or the policy was trained on some of them.
  """
  asked = settings.method.problems
  training, held_out = problems.load(asked)
  if settings.problems == 'all':
    return [*training, *held_out][:settings.num_problems]
  if not held_out:
    raise UserError('Problems.held_out = 0 leaves no problem to measure: set it as in the run, or '
                    "HybridAccuracy.problems = 'all' for problems that nobody was trained on.")
  environment.check_held_out(asked, policy.session.run)
  return held_out[:settings.num_problems]


def kinds(settings: cfg.HybridAccuracy, mode_ids: tuple[int, ...]) -> list[Asked]:
  """Every kind of responses that is drawn, the longest first."""
  thinks, at_once = ((mode_ids[mode],) for mode in (THINK, NO_THINK))
  num, sampler = settings.samples, settings.sampler
  budgets = [Asked(f'budget {budget}', num, sampler, thinks, budget)
             for budget in _budgets(settings)]
  return [Asked('think', num, sampler, thinks),
          # Samples with other numbers have other noise.
          Asked('free', settings.free_samples, sampler, first_sample=num),
          Asked('greedy', 1, cfg.Sampler(temperature=0.0)), *reversed(budgets),
          Asked('no_think', num, sampler, at_once)]


def _budgets(settings: cfg.HybridAccuracy) -> list[int]:
  """The budgets in tokens, rising."""
  most = settings.method.rollouts.response_tokens
  return sorted({int(share * most) for share in settings.budgets})


def _engine(policy: Policy, settings: cfg.HybridAccuracy) -> Engine:
  rollouts, m = settings.method.rollouts, settings.modes
  queue = max(4 * settings.slots, settings.samples, settings.free_samples)
  config = cfg.Engine(
      slots=settings.slots, queue=queue, prompt_len=rollouts.prompt_len,
      response_len=rollouts.response_tokens, prefill_chunk=min(128, rollouts.prompt_len),
      prefill_rows=8, kv=rollouts.slots.kv, top_logprobs=0, constrained=1)
  thinker = Thinker(policy.session.data.tokenizer, Markers(m.think, m.think_end, m.no_think))
  return samples.make_engine(policy, config, seed=settings.seed, thinker=thinker)


def _requests(asked: Asked, encoded: ProblemSet, method: cfg.RL, stop_ids: tuple[int, ...]
              ) -> list[Request]:
  return [Request(tuple(tokens[:length].tolist()), problem.id, method.rollouts.response_tokens,
                  asked.num_samples, asked.sampler, stop_ids, (), asked.forced, asked.max_thought,
                  first_sample=asked.first_sample)
          for problem, tokens, length in zip(encoded.problems, encoded.tokens, encoded.lengths,
                                             strict=True)]


def _drawn(found: Verified, mode_ids: tuple[int, ...]) -> Drawn:
  """One kind of responses with their modes."""
  first = found.tokens[..., 0]
  mode = np.where(first == mode_ids[THINK], THINK,
                  np.where(first == mode_ids[NO_THINK], NO_THINK, NO_MODE))
  return Drawn(found.score, found.correct, found.valid, found.there.sum(-1), mode)


# --- Results --------------------------------------------------------------------------


def summary(drawn: dict[str, Drawn], levels: Sequence[str], settings: cfg.HybridAccuracy
            ) -> dict[str, Any]:
  """The results of what was drawn; every interval is [2.5 %, 97.5 %] of the bootstrap over prompts.

  Args:
    drawn: by the names of `kinds`.
    levels: the P problems' levels.
    settings: what is measured.

  Returns:
    h_acc: by the greedy choice, by the drawn ones, and how often thinking is the better mode.
    by_difficulty: of each level and of all, the shares of thinking, accuracies and tokens.
    curve: tokens and accuracy at each budget; null for none.
    at_equal_tokens: the free policy against those that have no choice; see `_equal_tokens`.
  """
  forced = [drawn['think'], drawn['no_think']]
  stacked = lambda name: np.stack([getattr(kind, name) for kind in forced], 1)
  better = hybrid.better_mode(stacked('score'), stacked('length'), stacked('valid'),
                              settings.margin)
  right = {name: hybrid.choice_is_better(drawn[name].mode, better) for name in ('greedy', 'free')}
  names = hybrid.difficulties(list(levels), drawn['no_think'].of_prompt('score'))
  groups = {name: names == name for name in sorted(set(names.tolist()))}
  groups['all'] = np.ones(len(names), bool)
  return {
      'h_acc': {'greedy': _estimate(right['greedy'], settings),
                'drawn': _estimate(right['free'], settings),
                'think_is_better': _number(hybrid.mean(_where_known(better == THINK, better))),
                'prompts_without_verdict': int((better == NO_MODE).sum())},
      'by_difficulty': {name: _of_group(drawn, better, right, rows, settings)
                        for name, rows in groups.items()},
      **_equal_tokens(drawn, settings)}


def _of_group(drawn: dict[str, Drawn], better: np.ndarray, right: dict[str, np.ndarray],
              rows: np.ndarray, settings: cfg.HybridAccuracy) -> dict[str, Any]:
  """The numbers of some of the problems."""
  average = lambda values: _number(hybrid.mean(values[rows]))
  names = 'free', 'greedy', 'think', 'no_think'
  thinks = (drawn['free'].mode == THINK).mean(-1)
  return {
      'problems': int(rows.sum()), 'think_drawn': _estimate(thinks[rows], settings),
      'think_greedy': average((drawn['greedy'].mode[:, 0] == THINK).astype(float)),
      'no_mode_drawn': average((drawn['free'].mode == NO_MODE).mean(-1)),
      'think_is_better': average(_where_known(better == THINK, better)),
      'h_acc_greedy': average(right['greedy']), 'h_acc_drawn': average(right['free']),
      'accuracy': {name: average(_per_prompt(drawn[name], 'correct')) for name in names},
      'tokens': {name: average(_per_prompt(drawn[name], 'length')) for name in names}}


def _equal_tokens(drawn: dict[str, Drawn], settings: cfg.HybridAccuracy) -> dict[str, Any]:
  """The accuracy of free choice, and of policies without one that take as many tokens on average.

  'always_think' has its thoughts cut at budgets (`hybrid_accuracy.at_tokens`), 'never_think' takes
  fewer tokens and cannot make use of more, 'mixture' chooses the mode by a coin.
  """
  budgets = [*(f'budget {b}' for b in _budgets(settings)), 'think']
  fields = ('correct', 'length')
  of = lambda names: [np.stack([_per_prompt(drawn[n], f) for n in names], -1) for f in fields]
  free = [_per_prompt(drawn['free'], f) for f in fields]
  curve, ends = of(budgets), of(['think', 'no_think'])

  def compared(accuracy: np.ndarray, tokens: np.ndarray, curve_accuracy: np.ndarray,
               curve_tokens: np.ndarray, end_accuracy: np.ndarray, end_tokens: np.ndarray
               ) -> dict[str, np.ndarray]:
    """By name, f[...] of columns f[..., P] and f[..., P, C]."""
    spent, reached = hybrid.mean(tokens), hybrid.mean(accuracy)
    ends_reached, ends_spent = hybrid.mean(end_accuracy, -2), hybrid.mean(end_tokens, -2)
    others = {
        'always_think': hybrid.at_tokens(hybrid.mean(curve_tokens, -2),
                                         hybrid.mean(curve_accuracy, -2), spent),
        'never_think': ends_reached[..., NO_THINK],
        'mixture': hybrid.mixture_at_tokens(ends_spent, ends_reached, spent)}
    return {'free': reached, 'tokens': spent, **others,
            **{f'free_minus_{name}': reached - other for name, other in others.items()}}

  columns = (*free, *curve, *ends)
  point = compared(*columns)
  found: dict[str, Any] = {}
  for name, value in point.items():
    ends_of = metrics.interval(lambda *resampled, name=name: compared(*resampled)[name], columns,
                               settings.resamples, settings.seed)
    found[name] = {'value': _number(value), 'interval': [_number(x) for x in ends_of]}
  reached, spent = (hybrid.mean(values, 0) for values in curve)
  return {'at_equal_tokens': found,
          'curve': [{'budget': None if name == 'think' else int(name.split()[1]),
                     'tokens': _number(t), 'accuracy': _number(a)}
                    for name, t, a in zip(budgets, spent, reached, strict=True)]}


def _per_prompt(drawn: Drawn, name: str) -> np.ndarray:
  """f[P]: means over responses, of which all have a length, verified or not."""
  return drawn.length.mean(-1) if name == 'length' else drawn.of_prompt(name)


def _where_known(values: np.ndarray, better: np.ndarray) -> np.ndarray:
  return np.where(better == NO_MODE, np.nan, values)


def _estimate(values: np.ndarray, settings: cfg.HybridAccuracy) -> dict[str, Any]:
  """The mean of a column, f[P], and its interval."""
  ends = metrics.interval(hybrid.mean, (values,), settings.resamples, settings.seed)
  return {'value': _number(hybrid.mean(values)), 'interval': [_number(x) for x in ends]}


def _number(value: Any) -> float | None:
  """A number as JSON has it: None in place of NaN."""
  return None if np.isnan(value) else round(float(value), 6)
