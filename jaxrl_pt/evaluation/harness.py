"""A trained policy as a model of lm-eval (github.com/EleutherAI/lm-evaluation-harness).

Texts become tokens as in lm-eval's own adapter for transformers (`HFLM`), so that the same weights
get the same scores through both: a context and its continuation are encoded as one text and split
where the context's own tokens end, documents are scored in windows that begin with the token that
begins a text, and what is too long is cut off at its start. Scores come from `prompt_scores.Scorer`
and texts from the engine, which also answer the HTTP server.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.data.tokenizer import Tokenizer
from jaxrl_pt.errors import UserError
from jaxrl_pt.run import samples
from jaxrl_pt.run.policy import Policy
from jaxrl_pt.sampling.engine import Request
from jaxrl_pt.sampling.prompt_scores import Scorer

# A request takes so many stop strings of so many bytes. The others are looked for afterwards.
_MOST_STRINGS, _LONGEST_STRING = 8, 32
_MAX_GEN_TOKS = 256  # of a task that does not say; lm-eval's default
# What a task may ask of generation. `max_gen_toks` has other names, which lm-eval makes one.
_KNOWN = ('until', 'max_gen_toks', 'do_sample', 'temperature', 'top_k', 'top_p', 'min_p')


@dataclass(frozen=True)
class Reading:
  """How texts become the tokens that a model reads.

  max_length: the most tokens that the model reads at once.
  begin: the token that every text begins with; None for models that read texts without one.
  prefix: the token before a text of which all tokens are predicted.
  """

  max_length: int
  begin: int | None
  prefix: int


class PolicyLM(TemplateLM):
  """What lm-eval asks of a model, answered by a policy."""

  def __init__(self, policy: Policy, reading: Reading, *, batch_size: int, seed: int,
               render: Callable[[list[dict[str, str]], bool], str] | None = None) -> None:
    """Takes a policy.

    Args:
      policy: the policy.
      reading: how it reads texts.
      batch_size: the number of texts that go through the model at once.
      seed: the seed of the noise where a task samples.
      render: messages, whether the assistant's turn is opened → the text of a conversation. None
        for a model without a chat template.
    """
    super().__init__()
    self._policy, self._reading, self._render = policy, reading, render
    self._batch_size, self._seed = batch_size, seed
    self._tokenizer: Tokenizer = policy.session.data.tokenizer
    self._written = {token: text for text, token in self._tokenizer.special_tokens.items()}
    self._scorer = Scorer(policy.model, reading.max_length + 1, 1)

  # --- Tokens ---------------------------------------------------------------------------

  @property
  def eot_token_id(self) -> int:
    return self._tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    return self._reading.prefix

  @property
  def max_length(self) -> int:
    return self._reading.max_length

  @property
  def tokenizer_name(self) -> str:
    return self._tokenizer.fingerprint

  def apply_chat_template(self, chat_history: list[dict[str, str]],
                          add_generation_prompt: bool = True) -> str:
    if self._render is None:
      raise UserError('A chat template was asked for and this model has none: give a --template.')
    return self._render(chat_history, add_generation_prompt)

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
                 ) -> list[int]:
    """The tokens of a text, in which special tokens are those tokens, as lm-eval takes them.

    Args:
      string: the text.
      add_special_tokens: whether the text gets the token that begins it. None for what the model is
        used to, unless the text already starts with that token.
      kwargs: not read.
    """
    ids = self._tokenizer.encode_parsed(string)
    begins = self._written.get(self._reading.prefix, '')
    if add_special_tokens is None and begins and string.startswith(begins):
      add_special_tokens = False
    has_begin = self._reading.begin is not None and add_special_tokens is not False
    return [self._reading.begin, *ids] if has_begin else ids  # type: ignore[list-item]

  # --- Scores ---------------------------------------------------------------------------

  def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]],
                            **kwargs: Any) -> list[tuple[float, bool]]:
    """Log-probability of each continuation, and whether greedy decoding would write it.

    Args:
      requests: (the texts, context tokens, continuation tokens) of each.
      kwargs: not read.

    Raises:
      UserError: a continuation has no tokens of its own, or more than the model reads at once.
    """
    del kwargs
    for texts, _, continuation in requests:
      if not 0 < len(continuation) <= self.max_length:
        raise UserError(
            f'A continuation has {len(continuation)} tokens and the model takes 1 to '
            f'{self.max_length} ({texts!r:.100}): change the task, or raise --max_length.')
    rows = [(context + continuation)[-(self.max_length + 1):]
            for _, context, continuation in requests]
    found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    # Rows of about one length go together, the longest first, since a pass is as wide as its
    # longest row.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for low in range(0, len(order), self._batch_size):
      chosen = order[low:low + self._batch_size]
      scored = self._scorer.score_rows(self._policy.params, [rows[i] for i in chosen],
                                       self._batch_size, 1)
      for i, score in zip(chosen, scored, strict=True):
        number = len(requests[i][2])
        likeliest = score.top_tokens[-number:, 0]
        found[i] = (float(score.logp[-number:].sum(dtype=np.float64)),
                    bool((likeliest == requests[i][2]).all()))
    return found

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False
                            ) -> list[float]:
    """Log-probability of whole texts, in windows of at most `max_length` tokens.

    Each token is predicted once, from at least one token before it.
    """
    del disable_tqdm
    windows: list[tuple[None, list[int], list[int]]] = []
    owners: list[int] = []
    for number, request in enumerate(requests):
      (text,) = request.args
      of_text = utils.get_rolling_token_windows(
          self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
          context_len=1)
      for context, predicted in map(utils.make_disjoint_window, of_text):
        windows.append((None, context, predicted))
        owners.append(number)
    totals = [0.0] * len(requests)
    for number, (logp, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
      totals[number] += logp
    return totals

  # --- Texts ----------------------------------------------------------------------------

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """Texts that continue contexts, each until one of its stop texts or the end of a document."""
    del disable_tqdm
    asked = [self._request(number, *request.args) for number, request in enumerate(requests)]
    if not asked:
      return []
    prompt_len = max(len(one.prompt) for one, _ in asked)
    engine = samples.make_engine(self._policy, cfg.Engine(
        slots=min(self._batch_size, len(asked)), queue=min(2 * self._batch_size, len(asked)),
        prompt_len=prompt_len, response_len=max(one.max_tokens for one, _ in asked),
        prefill_chunk=min(prompt_len, 128), top_logprobs=0), seed=self._seed)
    answers = engine.run([one for one, _ in asked])
    return [self._text(answer.tokens.tolist(), until)
            for (answer,), (_, until) in zip(answers, asked, strict=True)]

  def _request(self, number: int, context: str, settings: dict[str, Any]
               ) -> tuple[Request, list[str]]:
    """The engine's request, and all texts that end its answer.

    Args:
      number: the request's place among all of them, which addresses its noise.
      context: the text to continue.
      settings: the task's `generation_kwargs`.

    Raises:
      UserError: a setting is not known, or leaves no room for the context.
    """
    known = normalize_gen_kwargs(settings, _MAX_GEN_TOKS)
    if unknown := sorted(set(known) - set(_KNOWN)):
      raise UserError(f'generation_kwargs.{unknown[0]} is not supported: a task may set '
                      f'{", ".join(_KNOWN)}.')
    until: Any = known.get('until') or []
    until = [text for text in ([until] if isinstance(until, str) else until) if text]
    most = known['max_gen_toks']
    if not 0 < most < self.max_length:
      raise UserError(f'max_gen_toks = {most} of {self.max_length} tokens leaves no room for the '
                      'context: set it lower in the task, or raise --max_length.')
    prompt = self.tok_encode(context)[-(self.max_length - most):] or [self.prefix_token_id]
    fitting = [text for text in until if len(text.encode()) <= _LONGEST_STRING and '\0' not in text]
    given: dict[str, Any] = {name: known.get(name) for name in ('top_k', 'top_p', 'min_p')}
    sampler = cfg.Sampler(
        float(known['temperature']) if known['do_sample'] else 0.0,
        **{name: value for name, value in given.items() if value is not None})
    return Request(
        tuple(prompt), number, most,
        sampler=sampler, stop=self._tokenizer.stop_ids,
        stop_strings=tuple(fitting[:_MOST_STRINGS])), until

  def _text(self, tokens: list[int], until: list[str]) -> str:
    """The text of an answer's tokens before the first of the texts that end it.

    The text of the token that ends a document is among them, as in lm-eval's adapter: a model may
    spell it by other tokens.
    """
    text = self._tokenizer.decode(tokens)
    ends = [*until, self._written.get(self.eot_token_id, '')]
    return min([text, *(text.split(end)[0] for end in ends if end)], key=len)


def reading_of(policy: Policy, *, max_length: int | None, add_bos: bool | None,
               described: dict[str, Any]) -> Reading:
  """How a policy reads texts.

  Args:
    policy: the policy.
    max_length: the most tokens at once; None for what the model was made for.
    add_bos: whether texts begin with the token that begins them; None for what it was trained with.
    described: what is carried along of an imported model: its `max_position_embeddings` and its
      `bos_token`; empty for other models.
  """
  tokenizer = policy.session.data.tokenizer
  bos = tokenizer.bos_id
  if bos is None:
    bos = tokenizer.special_tokens.get(described.get('bos_token') or '')
  begin = {None: tokenizer.bos_id, True: bos, False: None}[add_bos]
  longest = described.get('max_position_embeddings') or policy.session.run.data.seq_len
  return Reading(max_length or longest, begin, tokenizer.eos_id if bos is None else bos)
