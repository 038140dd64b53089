"""Valid settings drawn at random: any type of `config`, whatever it holds, and runs round them."""

import dataclasses
import types
from typing import Any, Literal, TypeVar, get_args, get_origin

from hypothesis import strategies as st

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError
from tests.test_config import DIT, GAME_RUN, VALID, WORLD_RUN

TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(['{prompt}', "it's", 'a "b" \\ %c @d ü\n\t', '猫 {prompt} \u2028', 'a:b',
                     '#', '<think>', 'runs/x']))
INTEGERS = st.one_of(st.integers(-2, 40), st.sampled_from([2**15, 2**20, 2**31 - 1, 2**63, 10**30]))
FLOATS = st.one_of(st.floats(0, 2), st.floats(), st.sampled_from([1e-30, 1e16, 1e30, -0.5, 3]))


_WITHOUT_ROWS = cfg.Train(4)  # RL reads no batch size

# --- Values ---------------------------------------------------------------------


def values(kind: Any) -> st.SearchStrategy[Any]:
  """Values of a field's type, not all of them in the range that the field asks for."""
  scalars: dict[Any, st.SearchStrategy[Any]] = {
      bool: st.booleans(), int: INTEGERS, float: FLOATS, str: TEXTS}
  if kind in scalars:
    return scalars[kind]
  if dataclasses.is_dataclass(kind):
    return instances(kind)
  if isinstance(kind, TypeVar):
    kind = kind.__bound__
  parts = get_args(kind)
  if get_origin(kind) is Literal:
    return st.sampled_from(parts)
  if get_origin(kind) is tuple:
    if parts[-1] is ...:
      return st.lists(values(parts[0]), max_size=3).map(tuple)
    return st.tuples(*map(values, parts))
  assert isinstance(kind, types.UnionType), kind
  return st.one_of(*map(values, parts))


@st.composite
def instances(draw: st.DrawFn, kind: type) -> Any:
  """A valid value: every drawn field that the type takes, and its own default for the others."""
  given = dict(VALID[kind])
  for field in dataclasses.fields(kind):
    drawn = {field.name: draw(values(field.type))}
    if (kind, field.name) in ((cfg.Composite, 'verifiers'), (cfg.WeightedConversations, 'sources'),
                              (cfg.Mixture, 'sources')):
      drawn['weights'] = (0.5,) * len(drawn[field.name])
    if (kind, field.name) == (cfg.Mixture, 'sources'):
      drawn['names'] = tuple(f'source {i}' for i in range(len(drawn['sources'])))
    if isinstance(drawn[field.name], cfg.RL):
      drawn['train'] = _WITHOUT_ROWS
    try:
      kind(**{**given, **drawn})
    except UserError:
      continue
    given.update(drawn)
  return kind(**given)


# --- Runs -----------------------------------------------------------------------


def _kinds(kind: Any) -> list[type]:
  """The settings types in a field's type."""
  if dataclasses.is_dataclass(kind):
    return [kind]
  kind = kind.__bound__ if isinstance(kind, TypeVar) else kind
  return [inner for part in get_args(kind) for inner in _kinds(part)]


def _owners() -> dict[type, tuple[type, dataclasses.Field]]:
  """Each type below `Run` with one field that may hold it, as near to the top as there is one."""
  owners: dict[type, tuple[type, dataclasses.Field]] = {}
  todo: list[type] = [cfg.Run]
  while todo:
    owner = todo.pop(0)
    for field in dataclasses.fields(owner):
      for kind in _kinds(field.type):
        if kind not in owners:
          owners[kind] = owner, field
          todo.append(kind)
  return owners


OWNERS = _owners()
# What else an owner must then hold: type → {owner: its fields}.
_BESIDE: dict[type, dict[type, dict[str, Any]]] = {
    cfg.LoRA: {cfg.Model: {'d_model': 2**13, 'd_ff': 2**13, 'head_dim': 2**12}},
    cfg.InformationGain: {cfg.RPT: {'prediction': cfg.Reason()}},
    cfg.RL: {cfg.Run: {'train': _WITHOUT_ROWS}},
    cfg.ReSA: {cfg.RPT: {'algorithm': cfg.Algorithm(correction=cfg.TokenTIS())}},
    cfg.Rollouts: {cfg.RPT: {'algorithm': cfg.Algorithm(correction=cfg.TokenTIS())}},
    cfg.OneStepOff: {cfg.RPT: {'algorithm': cfg.Algorithm(correction=cfg.TokenTIS())}},
    cfg.InFlight: {cfg.RPT: {'algorithm': cfg.Algorithm(correction=cfg.TokenTIS())}},
    **{kind: {cfg.Data: {'long_documents': 'cut'}, cfg.Run: {'objective': cfg.SFT('')}}
       for kind in (cfg.Conversations, cfg.HybridConversations, cfg.WeightedConversations)},
    **{kind: {cfg.Data: {'long_documents': 'cut'}, cfg.Run: {'objective': cfg.RewardModel('')}}
       for kind in (cfg.Preferences, cfg.SlipPreferences, cfg.ResultPreferences)},
    **{kind: {cfg.Run: {name: WORLD_RUN[name] for name in ('model', 'data', 'objective')}}
       for kind in (cfg.DiT, cfg.Trajectories, cfg.Diffusion)},
    cfg.VAE: {cfg.Run: {'data': WORLD_RUN['data'], 'objective': cfg.Autoencoding()}},
    cfg.Autoencoding: {cfg.Run: {'data': WORLD_RUN['data'], 'model': cfg.VAE()}},
    **{kind: {cfg.Run: {name: GAME_RUN[name] for name in ('model', 'data', 'objective')}}
       for kind in (cfg.GamePolicy, cfg.GameRL)},
    cfg.Shortcut: {cfg.Run: {**WORLD_RUN, 'model': cfg.DiT(**DIT, step_sizes=3)}},
    cfg.HybridModes: {cfg.Rollouts: {'response_tokens': 2}},
    cfg.AdaptThink: {cfg.Algorithm: {'surrogate': cfg.PPOClip()}},
    cfg.PolicyTokenizer: {cfg.Data: {'source': cfg.Conversations('a'), 'long_documents': 'cut'},
                          cfg.Run: {'objective': cfg.SFT('a')}},
}


def _examples_for(objective: cfg.Supervised) -> cfg.Data:
  tokenizer = cfg.PolicyTokenizer() if objective.start_from else cfg.Bytes()
  source = (cfg.Conversations if isinstance(objective, cfg.SFT) else cfg.Preferences)('a')
  return cfg.Data(source, tokenizer, 16, long_documents='cut')


def _has_modes(value: Any) -> bool:
  return (isinstance(value, cfg.Rollouts) and value.modes != cfg.SingleMode()
          or isinstance(value, cfg.Algorithm) and (
              isinstance(value.advantage, cfg.ModeAdvantage)
              or isinstance(value.aggregation, cfg.DecoupledModes)))


def _rollouts_for(value: cfg.Rollouts | cfg.Algorithm) -> cfg.Rollouts:
  """Rollouts whose modes the advantage of an algorithm can learn from."""
  if isinstance(value, cfg.Rollouts):
    return value
  forced = not isinstance(value.advantage, cfg.Thinkless)
  return cfg.Rollouts(response_tokens=2, modes=cfg.HybridModes(forced=forced))


def holding(value: Any) -> cfg.Run:
  """A run that holds this value somewhere, and elsewhere as little as possible."""
  beside: dict[type, dict[str, Any]] = {}
  while not isinstance(value, cfg.Run):
    beside = {**_BESIDE.get(type(value), {}), **beside}  # What a value needs, its owner accepts.
    if isinstance(value, cfg.Supervised):
      beside[cfg.Run] = {'data': _examples_for(value)}
    owner, field = OWNERS[type(value)]
    if _has_modes(value):  # No run of RPT has modes.
      owner, field = next((cfg.RL, f) for f in dataclasses.fields(cfg.RL) if f.name == field.name)
      beside[cfg.RL] = {'rollouts': _rollouts_for(value)}
    held = (value,) if get_origin(field.type) is tuple else value
    value = owner(**{**VALID[owner], **beside.get(owner, {}), field.name: held})
  return value
