"""Hybrid Accuracy and accuracy at equal tokens, as functions of arrays.

    m_gt   = the mode with the larger mean score; within the margin the one with shorter responses
    H_acc  = share of the prompts whose freely chosen mode is m_gt

Axes: P prompts, N responses in each mode, K free responses, C points of a curve, R resamples.

Source: LHRM 2505.14631, section 2 (Hybrid Accuracy). The paper leaves open what happens if the
lengths are equal too, if a response has no mode, and how sure the number is; see the functions.
"""

import numpy as np

from jaxrl_pt.types import NO_MODE, NO_THINK, THINK

Floats = np.ndarray
_ROUNDING = 1e-6  # Means of equal scores may differ by so much.


def mean_of_valid(values: Floats, valid: Floats) -> Floats:
  """f[...]: the mean over the last axis of what is valid; NaN where nothing is."""
  counts = valid.sum(-1)
  with np.errstate(invalid='ignore', divide='ignore'):
    return np.where(counts > 0, (values * valid).sum(-1) / counts, np.nan)


def better_mode(score: Floats, length: Floats, valid: Floats, margin: float) -> np.ndarray:
  """m_gt of each prompt.

  Where the means of both modes are within the margin and their lengths are equal, answering at once
  is better: it costs no more. Responses that were not verified do not count; a prompt that has none
  left in a mode has no better mode.

  Args:
    score, length, valid: f[P, 2, N] of the forced responses, those of THINK before NO_THINK.
    margin: the largest difference of mean scores that counts as none.

  Returns:
    i[P] of THINK, NO_THINK and NO_MODE.
  """
  scores, lengths = mean_of_valid(score, valid), mean_of_valid(length, valid)
  ahead = scores[:, THINK] - scores[:, NO_THINK]
  shorter = np.where(lengths[:, THINK] < lengths[:, NO_THINK], THINK, NO_THINK)
  best = np.where(np.abs(ahead) <= margin + _ROUNDING, shorter,
                  np.where(ahead > 0, THINK, NO_THINK))
  return np.where(np.isnan(ahead), NO_MODE, best)


def choice_is_better(chosen: np.ndarray, better: np.ndarray) -> Floats:
  """The share of each prompt's free responses whose mode is the better one.

  A response that begins with neither mode's token has chosen wrongly.

  Args:
    chosen: i[P, K] modes that the policy chose.
    better: i[P] from `better_mode`.

  Returns:
    f[P], NaN where there is no better mode; their mean is H_acc.
  """
  return np.where(better == NO_MODE, np.nan, (chosen == better[:, None]).mean(-1))


def mean(values: Floats, axis: int = -1) -> Floats:
  """The mean of what is not NaN along an axis; NaN where nothing is."""
  there = ~np.isnan(values)
  with np.errstate(invalid='ignore', divide='ignore'):
    return np.where(there, values, 0).sum(axis) / there.sum(axis)


def at_tokens(tokens: Floats, accuracy: Floats, wanted: Floats) -> Floats:
  """The best accuracy that a policy with several budgets reaches with so many tokens on average.

    max over i, j with t_i ≤ w of   a_i + (a_j − a_i) · clip((w − t_i) / (t_j − t_i), 0, 1)

  Some of its responses have budget i and the others budget j, which is linear interpolation
  between two points, and of all pairs the best. A point with fewer tokens counts as it is.

  Args:
    tokens, accuracy: f[..., C] mean tokens and accuracies at each budget, in any order.
    wanted: f[...] numbers of tokens, w.

  Returns:
    f[...], NaN where every budget takes more tokens.
  """
  t_i, t_j, a_i, a_j = (x for each in (tokens, accuracy)
                        for x in (each[..., :, None], each[..., None, :]))
  with np.errstate(invalid='ignore', divide='ignore'):
    share = np.clip((wanted[..., None, None] - t_i) / (t_j - t_i), 0.0, 1.0)
  reached = a_i + (a_j - a_i) * np.where(t_j > t_i, share, 0.0)
  reached = np.where(t_i <= wanted[..., None, None], reached, -np.inf).max((-2, -1))
  return np.where(np.isinf(reached), np.nan, reached)


def mixture_at_tokens(tokens: Floats, accuracy: Floats, wanted: Floats) -> Floats:
  """The accuracy of choosing the mode by a coin that costs `wanted` tokens on average.

    a_N + (a_T − a_N) · clip((wanted − t_N) / (t_T − t_N), 0, 1)

  Args:
    tokens, accuracy: f[..., 2] of the forced modes, THINK before NO_THINK.
    wanted: f[...].
  """
  thinks, at_once = tokens[..., THINK], tokens[..., NO_THINK]
  with np.errstate(invalid='ignore', divide='ignore'):
    share = np.clip((wanted - at_once) / (thinks - at_once), 0.0, 1.0)
  share = np.where(thinks == at_once, 0.5, share)
  return accuracy[..., NO_THINK] + share * (accuracy[..., THINK] - accuracy[..., NO_THINK])


def difficulties(levels: list[str], no_think_score: Floats) -> np.ndarray:
  """What each prompt is called: its level, or else a third by its mean score without thinking.

  Prompts of one score are in one third, so that a third may be empty.

  Args:
    levels: the levels of the P prompts, '' where the source names none.
    no_think_score: f[P], NaN where it is not known.

  Returns:
    P texts.
  """
  if all(levels):
    return np.array(levels)
  low, high = np.nanquantile(no_think_score, (1 / 3, 2 / 3))
  return np.where(no_think_score <= low, 'hardest third',
                  np.where(no_think_score > high, 'easiest third', 'middle third'))
