"""What every shipped run file resolves to, kept as differences from one base: `make golden`.

`base.gin` holds each setting that has a value without a run's own doing: what `gin/base.gin`
binds, and the defaults of the config types. `gin/<run>.gin` holds the settings of a run that have
another value, or that the base leaves open. So a new setting with a default changes `base.gin`
alone, and a value that changes in a run changes that run's file. `whole` puts both together again.
"""

import dataclasses
from pathlib import Path
import re
from typing import Any

from jaxrl_pt import config as cfg
from jaxrl_pt import gin_bindings

ROOT = Path(__file__).resolve().parents[2]
BASE = Path(__file__).parent / 'base.gin'
GOLDEN = Path(__file__).parent / 'gin'
_POD = ("cfg.ArrayRecord.glob = 'corpus/*.array_record'",
        "cfg.HuggingFaceTokenizer.path = 'tokenizer.json'",
        "cfg.HuggingFaceTokenizer.end_of_text = '<|endoftext|>'",
        "cfg.HuggingFaceTokenizer.begin_of_text = ''")
# What a user must add to a run file that leaves values open.
REQUIRED = {
    'dapo_32b': (*_POD, "cfg.RL.start_from = 'runs/policy'",
                 "cfg.JsonlProblems.glob = 'problems.jsonl'"),
    'grpo_7b': (*_POD, "cfg.RL.start_from = 'runs/policy'",
                "cfg.JsonlProblems.glob = 'problems.jsonl'"),
    'hft_7b': ("cfg.SFT.start_from = 'runs/policy'",
               "cfg.HybridConversations.glob = 'hybrid.jsonl'",
               "cfg.HybridConversations.think = '<think>'",
               "cfg.HybridConversations.no_think = '<no_think>'",
               "cfg.HybridConversations.evaluation_glob = 'math500.jsonl'"),
    'hgpo_7b': (*_POD, "cfg.RL.start_from = 'runs/policy'",
                "cfg.JsonlProblems.glob = 'problems.jsonl'",
                "cfg.HybridModes.think = '<think>'", "cfg.HybridModes.no_think = '<no_think>'"),
    **{f'judge_reward_{size}': (*_POD, "cfg.RL.start_from = 'runs/policy'",
                                "cfg.JudgeReward.judge_from = 'runs/judge'",
                                "cfg.JsonlProblems.glob = 'problems.jsonl'")
       for size in ('7b', '32b')},
    'maag_pgg': ("cfg.Diffusion.vae_from = 'runs/vae_pgg'",),
    'opo_7b': (*_POD, "cfg.RL.start_from = 'runs/policy'",
               "cfg.JsonlProblems.glob = 'problems.jsonl'"),
    'opo_lora_7b': (*_POD, "cfg.RL.start_from = 'runs/policy'",
                    "cfg.JsonlProblems.glob = 'problems.jsonl'"),
    'opo_mbpp_7b': (*_POD, "cfg.RL.start_from = 'runs/policy'",
                    "cfg.CodeProblems.glob = 'mbpp.jsonl'"),
    **{f'rrm_{size}': (*_POD, "cfg.RL.start_from = 'runs/policy'",
                       "cfg.Preferences.glob = 'pairs.jsonl'") for size in ('7b', '32b')},
    'rpt_14b': (*_POD, "cfg.RPT.start_from = 'runs/policy'"),
    'dpo_2b4t': ("cfg.DPO.start_from = 'runs/policy'", "cfg.Preferences.glob = 'pairs.jsonl'"),
    'dpo_7b': ("cfg.DPO.start_from = 'runs/policy'", "cfg.Preferences.glob = 'pairs.jsonl'"),
    'reward_model_7b': ("cfg.RewardModel.start_from = 'runs/policy'",
                        "cfg.Preferences.glob = 'pairs.jsonl'"),
    'sft_2b4t': ("cfg.SFT.start_from = 'runs/policy'", "cfg.Conversations.glob = 'chats.jsonl'"),
    'sft_7b': ("cfg.SFT.start_from = 'runs/policy'", "cfg.Conversations.glob = 'chats.jsonl'"),
    'short_rl_7b': (*_POD, "cfg.RL.start_from = 'runs/policy'"),
    **{f'pretrain_{model}': ("cfg.ArrayRecord.glob = 'corpus/*.array_record'",
                             "cfg.HuggingFaceTokenizer.path = 'tokenizer.json'")
       for model in ('2b4t', 'bitnet_v2_400m', 'bitnet_v2_1_3b', 'bitnet_v2_3b',
                     'bitnet_v2_7b')},
    'pretrain_small': ("cfg.TextFiles.glob = 'wikitext2/train.txt.gz'",
                       "cfg.Data.validation_glob = 'wikitext2/valid.txt'"),
}


def runs() -> list[str]:
  """Names of the shipped run files."""
  return sorted(path.stem for path in (ROOT / 'gin' / 'run').glob('*.gin'))


def resolved(name: str, *bindings: str) -> str:
  """The resolved text of a shipped run file, and of bindings that come after it."""
  path = ROOT / 'gin' / 'run' / f'{name}.gin'
  return gin_bindings.load([str(path)], (*REQUIRED.get(name, ()), *bindings))[1]


# --- Texts ----------------------------------------------------------------------


def settings(text: str) -> dict[str, str]:
  """{'cfg.Run.seed': '0', …} of a text that has one setting a line."""
  lines = (line.partition(' = ') for line in text.splitlines() if not line.startswith('#'))
  return {name: value for name, equals, value in lines if equals}


def _written(named: dict[str, str]) -> str:
  """A setting a line, with an empty line between values."""
  blocks: dict[str, list[str]] = {}
  for name, value in named.items():
    blocks.setdefault(name.rpartition('.')[0], []).append(f'{name} = {value}\n')
  return '\n'.join(''.join(block) for block in blocks.values())


def _default(field: dataclasses.Field) -> str | None:
  """The default of a field as gin text, None where it has none."""
  value: Any = field.default
  if field.default_factory is not dataclasses.MISSING:
    value = field.default_factory()
  if dataclasses.is_dataclass(value):
    assert value == type(value)(), f'{field.name}: a default with settings of its own'
    return f'@cfg.{type(value).__name__}()'
  return None if value is dataclasses.MISSING else repr(value)


def base() -> str:
  """What settings are where a run says nothing: the defaults, and above them gin/base.gin."""
  kinds = {kind.__name__: kind for kind in vars(cfg).values()
           if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
  shared = settings((ROOT / 'gin' / 'base.gin').read_text(encoding='utf-8'))
  named = {}
  for owner in sorted(kinds):
    for field in dataclasses.fields(kinds[owner]):
      name = f'cfg.{owner}.{field.name}'
      value = shared.get(name, _default(field))
      if value is not None:
        named[name] = value
  assert shared.keys() <= named.keys()
  return _written(named)


def _unscoped(name: str) -> str:
  return name.rpartition('/')[2]


def difference(text: str, shared: str) -> str:
  """The settings of a resolved text that the base does not have, or not so."""
  given = settings(shared)
  return _written({name: value for name, value in settings(text).items()
                   if given.get(_unscoped(name)) != value})


def whole(own: str, shared: str) -> dict[str, str]:
  """All settings of a run from its difference and the base: those of `Run` and of whatever value
  they and theirs refer to."""
  written, given = settings(own), settings(shared)
  found: dict[str, str] = {}
  todo, seen = ['cfg.Run'], {'cfg.Run'}
  while todo:
    owner = todo.pop()
    prefix = owner.removesuffix(_unscoped(owner))
    values = {f'{prefix}{name}': value for name, value in given.items()} | written
    for name, value in values.items():
      if name.rpartition('.')[0] == owner:
        found[name] = value
        is_text = value.startswith(("'", '"'))
        held = [] if is_text else re.findall(r'@([\w/.]+)\(\)', value)
        todo += [x for x in dict.fromkeys(held) if x not in seen]
        seen.update(held)
  return found


if __name__ == '__main__':
  for stale in GOLDEN.glob('*.gin'):
    stale.unlink()
  GOLDEN.mkdir(exist_ok=True)
  BASE.write_text(base(), encoding='utf-8')
  for run in runs():
    (GOLDEN / f'{run}.gin').write_text(difference(resolved(run), base()), encoding='utf-8')
  print(f'{BASE.relative_to(ROOT)} and {len(runs())} differences from it in '
        f'{GOLDEN.relative_to(ROOT)}')
