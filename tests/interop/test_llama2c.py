"""Real trained weights through the one forward: known text, known likelihood, cache ≡ full."""

from pathlib import Path
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_pt.errors import UserError
from jaxrl_pt.interop import llama2c
from jaxrl_pt.models import logprobs, transformer
from jaxrl_pt.params import is_spec

DATA = Path(__file__).parents[3] / 'shared' / 'data'
WEIGHTS = DATA / 'weights-stories260k'
CONTEXT = 512


def shared(path: Path) -> Path:
  if not path.exists():
    pytest.skip(f'{path.name} is not in ../shared/data: nothing to compare with')
  return path


@pytest.fixture(scope='module')
def stories():
  config, params = llama2c.load_model(shared(WEIGHTS / 'stories260K.bin'))
  tokenizer = llama2c.load_tokenizer(shared(WEIGHTS / 'tok512.bin'))
  return transformer.build(config), params, tokenizer


def greedy(model, params, num_tokens):
  def step(carry, position):
    token, cache = carry
    hidden, cache = model.extend(params, token, jnp.full((1, 1), position), cache)
    token = (hidden @ model.head(params)).argmax(-1)
    return (token, cache), token[0, 0]

  @jax.jit
  def run():
    start = jnp.full((1, 1), llama2c.BOS), model.init_cache(1, num_tokens)
    return jax.lax.scan(step, start, jnp.arange(num_tokens))[1]

  return run().tolist()


def mean_nll(model, params, documents):
  """Nats per predicted token; a document longer than the context is cut there."""
  @jax.jit
  def nll(tokens, targets, weights):
    positions = jnp.broadcast_to(jnp.arange(CONTEXT), tokens.shape)
    hidden = model.apply(params, tokens, positions, jnp.ones_like(tokens))
    scores = logprobs.token_logprobs(hidden, model.head(params), targets)
    return -(scores.logp * weights).sum()

  total, count = 0.0, 0
  for document in documents:
    document = document[:CONTEXT]
    tokens, targets, weights = np.zeros((3, 1, CONTEXT), np.int32)
    tokens[0, :len(document) - 1] = document[:-1]
    targets[0, :len(document) - 1] = document[1:]
    weights[0, :len(document) - 1] = 1
    total += float(nll(tokens, targets, weights))
    count += len(document) - 1
  return total / count, count


def test_parameter_count_and_dtype(stories):
  model, params, _ = stories
  assert sum(x.size for x in jax.tree.leaves(params)) == 260_032
  described = jax.tree.map(lambda s: (s.shape, s.dtype), model.specs,
                           is_leaf=is_spec)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == described


def test_greedy_from_bos_is_the_documented_text(stories):
  model, params, tokenizer = stories
  page = shared(WEIGHTS / 'stories260K.md').read_text(encoding='utf-8')
  documented = re.search(r'-t 0\.0\n(.*?)\n```', page, re.DOTALL)[1]
  tokens = greedy(model, params, 257)
  assert tokenizer.decode(tokens).startswith(documented)
  # The 257 tokens of the page count BOS, so that 256 are drawn; the page leaves out no token.
  assert tokenizer.decode(tokens[:256]) == documented


def test_nll_of_sixty_stories(stories):
  model, params, tokenizer = stories
  text = shared(DATA / 'text-tinystories-sample' / 'tiny_stories.txt').read_text(encoding='utf-8')
  documents = [d.replace('\n\n', '\n') for d in re.split(r'(?<!\n)\n(?!\n)', text)][:60]
  nll, count = mean_nll(model, params, [tokenizer.encode(d) for d in documents])
  assert count == 20_424
  assert nll == pytest.approx(1.296, abs=0.001)


def test_nll_of_the_fixture_stories(stories):
  model, params, tokenizer = stories
  path = DATA / 'text-bpe-fixtures' / 'tinystories_sample.txt'
  documents = shared(path).read_text(encoding='utf-8').split('<|endoftext|>')
  documents = [d.strip() for d in documents if d.strip()]
  nll, _ = mean_nll(model, params, [tokenizer.encode(d) for d in documents])
  assert nll == pytest.approx(1.266, abs=0.001)


def test_cache_equals_full_at_every_position(stories):
  model, params, tokenizer = stories
  tokens = jnp.asarray([tokenizer.encode('Once upon a time, there was a dog. ' * 12)[:96]])
  positions = jnp.arange(96)[None]
  full = model.apply(params, tokens, positions, jnp.ones_like(tokens))
  hidden, cache = model.extend(params, tokens[:, :32], positions[:, :32],
                               model.init_cache(1, 96))
  parts = [hidden]
  extend = jax.jit(model.extend)
  for i in range(32, 96):
    hidden, cache = extend(params, tokens[:, i:i + 1], positions[:, i:i + 1], cache)
    parts.append(hidden)
  # Hidden values are of order 1–10; float32 sums of 64–172 terms in another order.
  np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=2e-4)


def slow_merge(tokenizer, tokens):
  """The definition: look at all pairs, join the leftmost of the best, start again."""
  while True:
    best = None
    for i in range(len(tokens) - 1):
      merged = tokenizer.ids.get(tokenizer.pieces[tokens[i]] + tokenizer.pieces[tokens[i + 1]])
      if merged is not None and (best is None or tokenizer.scores[merged] > best[0]):
        best = tokenizer.scores[merged], i, merged
    if best is None:
      return tokens
    _, i, merged = best
    tokens = [*tokens[:i], merged, *tokens[i + 2:]]


@pytest.mark.parametrize('text', [
    '', 'a', 'aaaaaaaa', 'Once upon a time', 'and and andand  and', 'Zoë 你好 🙂', 'the\nthere\n'])
def test_encoding_equals_its_definition_and_decodes_back(stories, text):
  tokenizer = stories[2]
  tokens = tokenizer.encode(text)
  pieces = tokenizer._characters(' ' + text) if text else []
  assert tokens == [llama2c.BOS, *slow_merge(tokenizer, pieces)]
  assert tokenizer.decode(tokens) == text


def test_byte_fallback_ids(stories):
  assert stories[2].encode('你', bos=False)[-3:] == [b + 3 for b in '你'.encode()]


def test_untied_head_and_rope_order(tmp_path):
  width, ff, layers, heads, vocab, length = 4, 6, 1, 1, 3, 2
  sizes = dict(embed=12, attn_norm=4, wq=16, wk=16, wv=16, wo=16, ffn_norm=4, w_gate=24,
               w_down=24, w_up=24, final_norm=4, rope=8, head=12)
  values = np.arange(sum(sizes.values()), dtype='<f4')
  path = tmp_path / 'model.bin'
  path.write_bytes(struct.pack('<7i', width, ff, layers, heads, heads, -vocab, length)
                   + values.tobytes())
  config, params = llama2c.load_model(path)
  assert not config.tied_head
  np.testing.assert_array_equal(params['head'], values[-12:].reshape(3, 4).T)
  # Output rows 0 1 2 3 of wq (pairs 01 and 23) become 0 2 1 3 (pairs 02 and 13 of ours).
  wq = values[16:32].reshape(4, 4)
  np.testing.assert_array_equal(params['layers']['wq'][0], wq[[0, 2, 1, 3]].T)
  np.testing.assert_array_equal(params['layers']['wv'][0], values[48:64].reshape(4, 4).T)


@pytest.mark.parametrize('content, words', [
    (b'abc', 'too short'),
    (struct.pack('<7i', 64, 172, 5, 8, 4, 512, 512), 'truncated'),
    (struct.pack('<7i', 64, 172, 5, 7, 4, 512, 512), 'does not begin with the header'),
    (struct.pack('<7i', -1, 172, 5, 8, 4, 512, 512), 'does not begin with the header'),
    (struct.pack('<7i', *[2**31 - 2] * 3, 1, 1, 2**31 - 2, 1), 'truncated'),
])
def test_bad_checkpoints(tmp_path, content, words):
  path = tmp_path / 'model.bin'
  path.write_bytes(content)
  with pytest.raises(UserError, match=words):
    llama2c.load_model(path)


def test_bad_tokenizers(tmp_path):
  path = tmp_path / 'tok.bin'
  with pytest.raises(UserError, match='cannot be read'):
    llama2c.load_tokenizer(path)
  path.write_bytes(struct.pack('<ifi', 7, 0.0, 5) + b'abc')
  with pytest.raises(UserError, match='ends inside piece 0'):
    llama2c.load_tokenizer(path)
  path.write_bytes(struct.pack('<ifi', 7, 0.0, 3) + b'abc')
  with pytest.raises(UserError, match='holds 1 pieces'):
    llama2c.load_tokenizer(path)
