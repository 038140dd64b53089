"""A corpus of modular chains: filler that is certain, results that take k serial steps.

A document is a start state and blocks `then f g h … . . gives s`: 1 to 6 of three operations
(random permutations of the states, which do not commute), padded with dots, and the state that
they lead to. Operations come at random, so no one can predict them; fillers are certain; the
result after k operations takes k steps that depend on each other.

A document is held out by a hash of its content, so that no copy of it is trained on. There are
few short chains (48 of one operation), and most of them are drawn again and again.
"""

from typing import NamedTuple

import numpy as np

from jaxrl_pt.data import pack

NUM_STATES, NUM_OPS, SLOTS, BLOCKS = 16, 3, 6, 1
END, THINK, ANSWER, DOT, THEN, GIVES, FIRST_OP = 0, 1, 2, 3, 4, 5, 6
FIRST_STATE = FIRST_OP + NUM_OPS
VOCAB = FIRST_STATE + NUM_STATES
OP_CHANCES = (0.6, 0.3, 0.1)  # 0.90 nats: with the chain's end, never above 1.5
BLOCK = SLOTS + 3
LENGTH = 1 + BLOCKS * BLOCK
RESULTS = 1 + BLOCK * np.arange(BLOCKS) + SLOTS + 2  # places of the results in a document
TABLES = np.stack([np.random.default_rng(i).permutation(NUM_STATES) for i in range(NUM_OPS)])
# A thought: the start, up to six states, then marker, prediction and end.
RESPONSE = 1 + SLOTS + 3
HELD_OUT = 0.2  # share of all documents that there are


class Documents(NamedTuple):
  """Documents and how their results come about."""

  tokens: np.ndarray  # i32[B, LENGTH]
  steps: np.ndarray  # i32[B, BLOCKS] operations of each chain
  states: np.ndarray  # i32[B, BLOCKS, SLOTS + 1] after 0, 1, … operations

  def take(self, rows: np.ndarray) -> 'Documents':
    """Some of them."""
    return Documents(self.tokens[rows], self.steps[rows], self.states[rows])


def token_bytes() -> list[bytes]:
  """Bytes of each token; markers and the end have none."""
  return [b'', b'', b'', *(bytes([65 + i]) for i in range(VOCAB - 3))]


def split(num_training: int, num_held_out: int, seed: int) -> tuple[Documents, Documents]:
  """(training, held-out) documents of a seed, which have its own contents held out.

  Training draws repeat themselves, as the corpus does; the held-out ones are distinct.
  """
  drawn = documents(2 * num_training, np.random.default_rng([seed, 7]))
  place = np.array([pack.hold_out(b'%d:' % seed + row.tobytes()) for row in drawn.tokens])
  training = np.flatnonzero(place >= HELD_OUT)[:num_training]
  measured = np.flatnonzero(place < HELD_OUT)
  _, first = np.unique(drawn.tokens[measured], axis=0, return_index=True)
  measured = measured[np.sort(first)][:num_held_out]
  if len(training) < num_training or len(measured) < num_held_out:
    raise ValueError(f'only {len(training)} and {len(measured)} documents: draw more')
  return drawn.take(training), drawn.take(measured)


def documents(num_docs: int, rng: np.random.Generator) -> Documents:
  """Documents as they come, with repetitions."""
  tokens = np.zeros((num_docs, LENGTH), np.int32)
  steps = rng.integers(1, SLOTS + 1, (num_docs, BLOCKS))
  states = np.zeros((num_docs, BLOCKS, SLOTS + 1), np.int32)
  state = rng.integers(0, NUM_STATES, num_docs)
  tokens[:, 0] = FIRST_STATE + state
  for b in range(BLOCKS):
    at = 1 + b * BLOCK
    ops = rng.choice(NUM_OPS, (num_docs, SLOTS), p=OP_CHANCES)
    states[:, b, 0] = state
    for i in range(SLOTS):
      runs = i < steps[:, b]
      tokens[:, at + 1 + i] = np.where(runs, FIRST_OP + ops[:, i], DOT)
      state = np.where(runs, TABLES[ops[:, i], state], state)
      states[:, b, i + 1] = state
    tokens[:, at] = THEN
    tokens[:, at + 1 + SLOTS] = GIVES
    tokens[:, at + 2 + SLOTS] = FIRST_STATE + state
  return Documents(tokens, steps, states)


def scratchpad(docs: Documents, row: int, block: int, noise: float, cut: float,
               rng: np.random.Generator) -> list[int]:
  """A noisy thought about a result, and the answer that follows from it.

  Args:
    noise: chance that a step goes to a random state instead.
    cut: chance that the thought stops early, after any number of steps.
  """
  steps = docs.steps[row, block]
  state = docs.states[row, block, 0]
  thought = [FIRST_STATE + state]
  for i in range(rng.integers(0, steps + 1) if rng.random() < cut else steps):
    op = docs.tokens[row, 2 + block * BLOCK + i] - FIRST_OP
    state = rng.integers(NUM_STATES) if rng.random() < noise else TABLES[op, state]
    thought.append(FIRST_STATE + state)
  return [*thought, ANSWER, FIRST_STATE + state, END]


def demonstrations(docs: Documents, num_rows: int, noise: float, cut: float,
                   rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Contexts, each with a thought and a prediction at one of its positions.

  Three in five are at a result, the others at any other position, with an empty thought.

  Returns:
    tokens i32[B, LENGTH + 1 + RESPONSE], right-padded, and which of their successors are
    learned: f32[B, LENGTH + RESPONSE], all but the think marker.
  """
  tokens = np.zeros((num_rows, LENGTH + 1 + RESPONSE), np.int32)
  weights = np.zeros((num_rows, LENGTH + RESPONSE), np.float32)
  others = np.setdiff1d(np.arange(1, LENGTH), RESULTS)
  for n, row in enumerate(rng.integers(0, len(docs.tokens), num_rows)):
    block = rng.integers(BLOCKS)
    if rng.random() < 0.6:
      at, response = RESULTS[block], scratchpad(docs, row, block, noise, cut, rng)
    else:
      at = rng.choice(others)
      response = [ANSWER, docs.tokens[row, at], END]
    sequence = [*docs.tokens[row, :at], THINK, *response]
    tokens[n, :len(sequence)] = sequence
    weights[n, :at - 1] = 1
    weights[n, at:len(sequence) - 1] = 1
  return tokens, weights
