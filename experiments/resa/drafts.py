"""Drafts on real text: how many are right, how many dense steps they save, and equal tokens.

    JAX_PLATFORMS=cpu python experiments/resa/drafts.py --data ../shared/data

The model of 260K parameters that writes stories (weights-stories260k) continues the beginnings of
stories (text-tinystories-sample) in the engine, without drafts and with each kind of them. Every
arm must draw the tokens that are drawn without drafts. Results go to results/drafts.json.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

from jaxrl_pt import config as cfg
from jaxrl_pt.interop import llama2c
from jaxrl_pt.models import transformer
from jaxrl_pt.sampling.engine import Engine, Request

RESULTS = Path(__file__).parent / 'results'
STORIES, PROMPT, RESPONSE, BLOCK = 16, 64, 192, 8
SPARSE = cfg.ReSA(BLOCK, 0.25, min_blocks=4)
ARMS = {'no drafts': cfg.NoDrafts(),
        **{f'look-up of {n}, {tokens} drafts': cfg.PromptLookup(tokens, n)
           for n, tokens in ((2, 4), (3, 4))},
        **{f'sparse, {tokens} drafts': cfg.SparseDrafts(tokens, SPARSE) for tokens in (2, 4)}}


def prompts(data: Path, tokenizer) -> list[tuple[int, ...]]:
  """The first tokens of the first stories that are long enough."""
  text = (data / 'text-tinystories-sample' / 'tiny_stories.txt').read_text(encoding='utf-8')
  # A single newline ends a story, and a blank line separates its paragraphs.
  stories = text.replace('\n\n', '\0').split('\n')
  encoded = ((llama2c.BOS, *tokenizer.encode(story.replace('\0', '\n'))) for story in stories)
  whole = (tokens[:PROMPT] for tokens in encoded if len(tokens) >= PROMPT)
  return list(itertools.islice(whole, STORIES))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', type=Path, default=Path('../shared/data'))
  args = parser.parse_args()
  weights = args.data / 'weights-stories260k'
  config, params = llama2c.load_model(weights / 'stories260K.bin')
  tokenizer = llama2c.load_tokenizer(weights / 'tok512.bin')
  model, asked = transformer.build(config), prompts(args.data, tokenizer)
  pieces = [tokenizer.decode([llama2c.BOS, i]).encode() for i in range(config.vocab_size)]
  rows, expected = [], {}
  for name, drafts in ARMS.items():
    engine = Engine(model, params, cfg.Engine(
        slots=8, queue=STORIES, prompt_len=PROMPT, response_len=RESPONSE, page_size=BLOCK,
        drafts=drafts), seed=0, token_bytes=pieces)
    for temperature in (0.0, 0.8):
      before = engine.counters()
      drawn = engine.run([Request(prompt, i, RESPONSE, 1, cfg.Sampler(temperature))
                          for i, prompt in enumerate(asked)])
      tokens = [response.tokens for (response,) in drawn]
      found = {key: engine.counters()[key] - before[key] for key in ('drafted', 'agreed')}
      expected.setdefault(temperature, tokens)
      is_equal = all(np.array_equal(*pair)
                     for pair in zip(tokens, expected[temperature], strict=True))
      rows.append({'drafts': name, 'temperature': temperature, **found, 'equal': is_equal,
                   'acceptance': found['agreed'] / max(1, found['drafted']),
                   # Of one response: a draft that is right saves a dense step of its slot.
                   'fewer steps': 1 / (1 - found['agreed'] / sum(map(len, tokens)))})
      print(rows[-1], flush=True)
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / 'drafts.json').write_text(json.dumps(
      {'stories': len(asked), 'prompt tokens': PROMPT, 'response tokens': RESPONSE, 'rows': rows},
      indent=1) + '\n')


if __name__ == '__main__':
  main()
