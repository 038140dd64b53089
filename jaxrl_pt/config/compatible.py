"""Settings of rollouts and of the algorithm that do not go together."""

from jaxrl_pt.config.algorithm import Algorithm, NoCorrection, PolicyGradient
from jaxrl_pt.config.environments import Interactive
from jaxrl_pt.config.hybrid import (
  FORCED_MODES,
  AdaptThink,
  DecoupledModes,
  ModeAdvantage,
  SingleMode,
  Thinkless,
)
from jaxrl_pt.config.pairs import MarkedVerdict, Verdicts
from jaxrl_pt.config.rollouts import Dense, OnPolicy, Rollouts
from jaxrl_pt.config.verifiers import AnswerMatch, JudgeVerifier, Verifier
from jaxrl_pt.errors import UserError


def check_method(name: str, rollouts: Rollouts, algorithm: Algorithm) -> None:
  """Checks that the rollouts and the algorithm of a method go together."""
  if rollouts.group_size == 1 and algorithm.advantage.grouped:
    raise UserError(f'Rollouts.group_size = 1, but {type(algorithm.advantage).__name__} compares '
                    'the responses of a group: set it to at least 2.')
  sampler = rollouts.sampler
  if sampler.temperature == 0 or sampler.top_k == 1 or sampler.min_p == 1:
    raise UserError(f'{name} learns from responses that differ, but {sampler} leaves the likeliest '
                    'token alone: choose Sampler.temperature above 0, Sampler.top_k other than 1 '
                    'and Sampler.min_p below 1.')
  if rollouts.num_prompts % algorithm.minibatches:
    raise UserError(f'Algorithm.minibatches = {algorithm.minibatches} does not divide '
                    f'Rollouts.num_prompts = {rollouts.num_prompts}: change one of them.')
  if rollouts.mode != OnPolicy() and algorithm.correction == NoCorrection():
    raise UserError(f'{name} draws off-policy: choose an Algorithm.correction, such as '
                    '@cfg.TokenTIS(), or Rollouts.mode = @cfg.OnPolicy().')
  if rollouts.sparse != Dense() and not rollouts.is_replayed and (
      algorithm.correction == NoCorrection()):
    raise UserError(f'{name} draws by sparse attention and learns by dense attention, which is '
                    'another policy: choose an Algorithm.correction, such as @cfg.TokenTIS(), or '
                    'ReSA.replay = True.')
  if rollouts.slots.coarse and algorithm.correction == NoCorrection():
    raise UserError(f'{name} draws with {rollouts.slots.coarse} and learns without, which is '
                    'another policy: choose an Algorithm.correction, such as @cfg.TokenTIS(), or '
                    "'int8'.")
  if rollouts.is_replayed and (rollouts.mode != OnPolicy() or rollouts.dump_every):
    raise UserError('ReSA.replay = True needs Rollouts.mode = @cfg.OnPolicy() and '
                    'Rollouts.dump_every = 0: what each token was drawn from is not kept.')


def check_modes(rollouts: Rollouts, algorithm: Algorithm) -> None:
  """Refuses advantages and aggregations of modes where there are none, or not as they need them."""
  advantage = algorithm.advantage
  name = f'Algorithm.advantage = @cfg.{type(advantage).__name__}()'
  if isinstance(algorithm.aggregation, DecoupledModes) and rollouts.modes == SingleMode():
    raise UserError('Algorithm.aggregation = @cfg.DecoupledModes() weighs the token of a mode: '
                    'choose Rollouts.modes = @cfg.HybridModes(), or another aggregation.')
  if not isinstance(advantage, ModeAdvantage):
    return
  if rollouts.modes == SingleMode():
    raise UserError(f'{name} compares responses that think with such that do not: choose '
                    'Rollouts.modes = @cfg.HybridModes().')
  if isinstance(advantage, FORCED_MODES) and not rollouts.forces_modes:
    raise UserError(f'{name} needs both modes in each group: set HybridModes.forced = True.')
  if isinstance(advantage, Thinkless) and rollouts.forces_modes:
    raise UserError(f'{name} learns from modes that the policy chose: set HybridModes.forced = '
                    'False.')
  if isinstance(advantage, AdaptThink) and algorithm.surrogate == PolicyGradient():
    raise UserError(f'{name} weighs the mode by a ratio: choose a surrogate that has one, such as '
                    '@cfg.PPOClip().')


def check_turns(rollouts: Rollouts) -> None:
  """Refuses settings that rollouts of several turns do not have."""
  if rollouts.mode != OnPolicy():
    raise UserError('RL.verifier = @cfg.Interactive() rewards an episode while it is drawn, so '
                    'that nothing is left to do beside the next batch: choose Rollouts.mode = '
                    '@cfg.OnPolicy().')
  if rollouts.sparse != Dense():
    raise UserError('RL.verifier = @cfg.Interactive() draws by dense attention: leave '
                    'Rollouts.sparse at @cfg.Dense().')
  if rollouts.modes != SingleMode():
    raise UserError('RL.verifier = @cfg.Interactive() has no modes of responses: leave '
                    'Rollouts.modes at @cfg.SingleMode().')


def check_judge(verdict: Verdicts, verifier: Verifier | Interactive) -> None:
  """Refuses a verifier that reads another form of verdict than the judge is asked for."""
  match verifier:
    case JudgeVerifier(verdict=read):
      is_read = read == verdict
    case AnswerMatch(marker=marker):
      is_read = isinstance(verdict, MarkedVerdict) and verdict.marker == marker
    case _:
      is_read = True  # A verifier of the user's own, or several.
  if not is_read:
    raise UserError(f'RL.verifier = {verifier!r} does not read the verdicts that the judge is '
                    f'asked for, JudgePrompt.verdict = {verdict!r}: give both the same.')
