"""The tokens that say whether a response thinks first."""

from jaxrl_pt import config as cfg
from jaxrl_pt.data import template_text
from jaxrl_pt.data.tokenizer import Tokenizer


def token_ids(tokenizer: Tokenizer, modes: cfg.ResponseModes) -> tuple[int, ...]:
  """The tokens of the modes `types.THINK` and `types.NO_THINK`; () where responses have no modes.

  Raises:
    UserError: a mode's text is not one token.
  """
  match modes:
    case cfg.SingleMode():
      return ()
    case cfg.HybridModes(think=think, no_think=no_think):
      return (template_text.one_token(tokenizer, 'HybridModes.think', think),
              template_text.one_token(tokenizer, 'HybridModes.no_think', no_think))
