"""What the sampler's program on the device is asked: documents, and requests that continue them.

A document is a sequence of tokens that goes through the model once and whose pages are kept. A
request is one response: it begins with the first tokens of a document, goes on with a few tokens of
its own, and then draws. The samples of a group, the positions of one text and the turns of a
conversation are all requests of this kind.
"""

from typing import Any, NamedTuple

from flax import struct

from jaxrl_pt.config import PromptLookup, ReSA, Sampler, SparseDrafts
from jaxrl_pt.sampling.policies import RowSamplers
from jaxrl_pt.token_bytes import TokenBytes
from jaxrl_pt.types import Array

NO_DOCUMENT = -1
NO_MASK = -1
MOST_STOPS = 8  # stop tokens of a response where their number is not known beforehand
NO_TOKEN = -1  # A stop token that no token equals.


class Shape(NamedTuple):
  """Every size of the program, which is compiled once for them."""

  slots: int  # B, responses that are decoded at once
  page_size: int  # tokens
  num_pages: int  # N, page 0 included
  documents: int  # D
  queue: int  # Q, the rows of requests
  document_len: int  # T, the largest number of tokens of a document
  tail_len: int  # M, the largest number of tokens between a document and a response
  response_len: int  # S, the largest number of tokens of a response
  lanes: int  # A, documents that are prefilled at once
  chunk: int  # C, tokens of a document that go through the model at once
  vocab_size: int
  num_stop: int = 1  # Z, the largest number of stop tokens of a request
  num_forced: int = 0  # F, the largest number of forced tokens of a response
  forced_logp: bool = False  # whether the log-probabilities of forced tokens are noted
  num_strings: int = 0  # X, the largest number of stop strings of a request
  string_len: int = 0  # W, the largest number of bytes of a stop string
  num_banned: int = 0  # the largest number of banned tokens of a request
  num_top: int = 0  # likeliest tokens whose log-probabilities are reported, for requests that ask
  num_masks: int = 0  # the largest number of constrained responses at a time
  sampler: Sampler | None = None  # of all requests; None where each has its own
  sparse: ReSA | None = None  # how sparse attention draws responses; None for dense attention
  drafts: PromptLookup | SparseDrafts | None = None  # how dense attention speculates, if it does
  beside: bool = False  # whether slot b always has request b, and documents as many as one another
  due: int = 0  # the first rows of the queue, for which a call waits; 0 for all of them

  @property
  def table_len(self) -> int:
    """P, the pages of the longest sequence."""
    return pages_of(self.document_len + self.most_fed, self.page_size)

  @property
  def most_fed(self) -> int:
    """The most tokens of a tail and a response that are fed, which the last one never is."""
    return self.tail_len + self.response_len - 1

  @property
  def num_fed(self) -> int:
    """J, the largest number of tokens of a slot that go through the model at once."""
    return 1 if self.drafts is None else 1 + self.drafts.tokens

  @property
  def most_chunks(self) -> int:
    """The largest number of forward passes over the documents if all lanes are always busy.

    Where a call waits for some of the rows, so many of the documents are theirs.
    """
    documents = self.documents * (self.due or self.queue) // self.queue
    return -(-documents // self.lanes) * -(-self.document_len // self.chunk)

  @property
  def most_steps(self) -> int:
    """The largest number of decode steps of the rows in question if there are pages for all slots.

    All slots decode until these rows have begun, and then the last responses end.
    """
    each = self.most_fed
    return each + max((self.due or self.queue) - self.slots, 0) * each // self.slots


def pages_of(num_tokens: Any, page_size: int) -> Any:
  """The number of pages that so many tokens fill, the last one perhaps in part."""
  return -(-num_tokens // page_size)


@struct.dataclass
class Documents:
  """Token sequences, some of which begin like others. The asking side writes them."""

  tokens: Array  # i32[D, T] whole sequences, right-padded
  lengths: Array  # i32[D]
  # A document begins with the first `shared` tokens of its parent, whose pages it then shares if
  # they are still kept.
  parents: Array  # i32[D] or NO_DOCUMENT
  shared: Array  # i32[D]
  # The content's number: another number than before says that the row holds another document.
  content: Array  # i32[D]
  # Requests that ever named this row. A document is given up last while some of them wait.
  asked: Array  # i32[D]


@struct.dataclass
class Requests:
  """The requests, one row for each response. The asking side writes them."""

  document: Array  # i32[Q]
  prefix: Array  # i32[Q] tokens of the document that the response's sequence begins with
  tail: Array  # i32[Q, M] further tokens, which every request has at least one of
  num_tail: Array  # i32[Q]
  ids: Array  # i32[Q] the prompt's id, which addresses the randomness
  samples: Array  # i32[Q] number of the sample of the prompt, which addresses the randomness
  max_tokens: Array  # i32[Q] forced tokens included
  stop: Array  # i32[Q, Z] stop tokens, padded with NO_TOKEN
  # What the response's sequence becomes when it has ended: a document, or NO_DOCUMENT.
  keep: Array  # i32[Q]
  cancelled: Array  # bool[Q]
  # The following are () where `Shape` or `Vocabulary` says that no request has them.
  forced: Any = ()  # i32[Q, F] tokens that the response starts with
  num_forced: Any = ()  # i32[Q]
  max_thought: Any = ()  # i32[Q] drawn tokens before the end of thinking is forced; < 0: none
  max_answer: Any = ()  # i32[Q] tokens after the end of thinking
  # bool[Q] whether the response begins inside a thought. Otherwise one begins with the marker
  # `Vocabulary.think_start`, if the response does.
  begins_thinking: Any = ()
  strings: Any = ()  # u8[Q, X, W] stop strings, right-aligned
  string_lens: Any = ()  # i32[Q, X] bytes, padded with 0
  samplers: RowSamplers | tuple[()] = ()
  wants_top: Any = ()  # bool[Q] whether the likeliest tokens are reported
  mask: Any = ()  # i32[Q] row of `Queue.masks` that the next token must satisfy, or NO_MASK
  batch: Any = ()  # i32[Q] the prompt's batch, which addresses the randomness; () if all share one


def cached_len(requests: Requests, row: Any = slice(None)) -> Array:
  """i32: the tokens that are cached when a response is as long as it may be, in some rows."""
  tail_and_response = requests.num_tail[row] + requests.max_tokens[row] - 1
  return requests.prefix[row] + tail_and_response


@struct.dataclass
class Queue:
  """Documents, and requests in order of arrival."""

  documents: Documents
  rows: Requests
  order: Array  # i32[Q] ring of row numbers
  tail: Array  # i32[] requests queued since the program's state was made
  # u32[R, ⌈V / 32⌉], bit t % 32 of word t // 32 says whether token t may come next. The asking side
  # renews a mask after each token, so that a call may make only one turn while one is in use.
  masks: Any = ()


class Vocabulary(NamedTuple):
  """What the program must know of the tokenizer."""

  think_end: tuple[int, ...] = ()  # the end marker of thinking; () where there is none
  spelled: TokenBytes | None = None  # the bytes of each token; None where nobody has stop strings
  is_token: Array | None = None  # bool[V] False for ids that are never drawn; None if all may be
  think_start: tuple[int, ...] = ()  # the start marker of thinking; () where none is looked for
