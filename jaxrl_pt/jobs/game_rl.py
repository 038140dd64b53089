"""Reinforcement learning of a policy of a game, in the true game or inside a model of it.

A step is one program: games from their worlds' keys, the policy's actions and the environment's
frames as a scan, what the reader finds in them as rewards, and the update. Actions and noise have
keys of (seed, step, row, frame), and the order of the worlds is a function of the step, so that a
run that was killed goes on bit for bit. The loop, optimizer, checkpoints and metrics are those of
every run.
"""

from collections.abc import Iterator
import contextlib
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from jaxrl_pt import config as cfg
from jaxrl_pt import metrics
from jaxrl_pt import params as P
from jaxrl_pt.errors import UserError
from jaxrl_pt.game import acting, trajectories, worlds
from jaxrl_pt.jobs import diffusion, episodes, game_places
from jaxrl_pt.jobs.kind import Kind, Program, abstract
from jaxrl_pt.models import game_policy
from jaxrl_pt.parallel import hosts, memory, rules
from jaxrl_pt.run import policy
from jaxrl_pt.run import session as sessions
from jaxrl_pt.run.job import Dispatched
from jaxrl_pt.run.workdir import claimed
from jaxrl_pt.train import game_policy as learning
from jaxrl_pt.train import optim
from jaxrl_pt.train import state as states
from jaxrl_pt.types import Array, GameRollouts, Params, TrainState, Weighted

_RESAMPLES = 2000  # of the games, for the intervals of an evaluation


def _method(run: cfg.Run) -> cfg.GameRL:
  assert isinstance(run.objective, cfg.GameRL)
  return run.objective


def policy_of(run: cfg.Run) -> game_policy.Policy:
  """The policy of a run, whole on every device."""
  model: Any = run.model
  return game_policy.build(model, worlds.shape_of(episodes.game_of(run)))


def _new_method(run: cfg.Run, mesh: Mesh, params: Params) -> states.MethodState:
  """`TrainState.method` before the first step: a value head where the advantage has one."""
  del mesh, params
  value = states.new_value(_method(run).algorithm.advantage, policy_of(run).config.hidden)
  return states.MethodState({}, value, {}, {})


# --- The job ----------------------------------------------------------------------


@contextlib.contextmanager
def _open(run: cfg.Run, workdir: Path, resolved_text: str, allow: frozenset[str]
          ) -> Iterator['PolicyTraining']:
  check_fits(run)
  optim.check_schedule(run.optimizer.schedule, cfg.num_updates(run))
  place = game_places.opened(run, _method(run).place, workdir)
  with claimed(workdir):
    session = sessions.open_session(run, workdir, resolved_text, allow=allow)
    with contextlib.closing(PolicyTraining(session, place)) as job:
      yield job


class PolicyTraining:
  """A run of a policy of a game that has been opened. Final."""

  agrees_at_once = False
  stop_reason = ''
  measured_first = True

  def __init__(self, session: sessions.Session, place: game_places.Place) -> None:
    """Compiles nothing yet."""
    run = session.run
    self.session, self._place = session, place
    self.flops_per_token = model_flops(run) / num_tokens(run)
    self._policy = policy_of(run)
    self._optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), self._policy.specs)
    self._new_method = functools.partial(_new_method, run, session.mesh)
    self.abstract = states.abstract_state(self._policy, self._optimizer, session.mesh,
                                          self._new_method)
    self._rows = rules.row_sharding(session.mesh)
    self._worlds = trajectories.world_iterator(
        episodes.source_of(run), seed=run.seed, batch_size=run.train.batch_size)
    self._step = train_step(run, place.environment, self._optimizer)
    self._measure = _measuring(run, acting.true_game(episodes.game_of(run)))

  def close(self) -> None:
    """Ends the loader's threads."""
    self._worlds.close()

  def start(self) -> TrainState:
    """A state at step 0, whose policy draws every action with the same probability."""
    return states.init_state(self._policy, self._optimizer, self.session.mesh,
                             self.session.run.seed, self._new_method)

  def check(self, position: dict[str, Any]) -> None:
    """Refuses a checkpoint of a policy that has played in another model."""
    if position['model'] != self._place.digest:
      raise UserError('The model in InsideModel.model_from is not the one that this run has played '
                      'in: put it back, or use a new --workdir.')

  def resume(self, state: TrainState, position: dict[str, Any]) -> None:
    """Sets the loader to the checkpoint's position."""
    del state
    self._worlds.set_state(position['worlds'])

  def step(self, state: TrainState, step: int) -> Dispatched:
    """Dispatches a step in the loader's next worlds."""
    del step
    ids = hosts.from_whole(next(self._worlds).astype(np.uint32), self._rows)
    state, values = self._step(state, self._place.params, ids)
    return Dispatched(state, values, ids, num_tokens(self.session.run))

  def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    """The mean return in the true game in held-out worlds: of the likeliest actions, and sampled.
    """
    del step
    found = {}
    for name, greedy in (('return', True), ('sampled_return', False)):
      played = self._measure(state.params, {}, held_out(self.session), greedy)
      found[f'validation/{name}'] = float(np.mean(hosts.on_host(played['true_return'])))
    return found

  def saved(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """The state as it is, the loader's position, and which model the policy plays in."""
    del step
    return state, {'worlds': self._worlds.get_state(), 'model': self._place.digest}


# --- Its programs -----------------------------------------------------------------


def _setting(run: cfg.Run, environment: acting.Environment) -> acting.Setting:
  return acting.Setting(episodes.game_of(run), environment, _method(run).pays,
                        policy_of(run).config.num_frames)


def _act(player: game_policy.Policy, params: Params, is_greedy: Array | bool = False) -> acting.Act:
  """The policy as games ask it: the likeliest action, or one drawn from it."""
  def act(seen: Array, keys_B: Array) -> tuple[Array, Array]:
    logits = player.hidden(params, seen) @ player.head(params)
    drawn = jnp.where(is_greedy, logits.argmax(-1),
                      jax.vmap(jax.random.categorical)(keys_B, logits))
    logp = jax.nn.log_softmax(logits)
    return drawn.astype(jnp.int32), jnp.take_along_axis(logp, drawn[:, None], 1)[:, 0]

  return act


def rollouts(run: cfg.Run, environment: acting.Environment, params: Params, model_params: Params,
             ids_N: Array, step: Array) -> GameRollouts:
  """The games of a step: `GameRL.group_size` in each of the worlds u32[N] `ids_N`.

  Args:
    run: the run.
    environment, model_params: where they are played.
    params: the policy's parameters.
    ids_N: ids of episodes, whose worlds they are.
    step: i32[] the step's number.
  """
  group_size, num_worlds = _method(run).group_size, ids_N.shape[0]
  source = episodes.source_of(run)
  ids_B = jnp.repeat(ids_N, group_size)
  worlds_B = jax.vmap(functools.partial(trajectories.world_of, source))(ids_B)
  keys_B = episodes.keys(run, episodes.TRAIN, step, jnp.arange(len(ids_B)))
  played = acting.play(_setting(run, environment), model_params, _act(policy_of(run), params),
                       worlds_B, keys_B, _num_actions(run))
  grouped: GameRollouts = jax.tree.map(
      lambda x: x.reshape(num_worlds, group_size, *x.shape[1:]), played)
  return grouped


def train_step(run: cfg.Run, environment: acting.Environment,
               optimizer: optax.GradientTransformation) -> Any:
  """The jitted step(state, model's parameters, ids u32[N]) → (state, metrics).

  The state is donated.
  """
  learn = learning.make_learner(policy_of(run), optimizer, run, _method(run).algorithm)

  def step(state: TrainState, model_params: Params, ids_N: Array
           ) -> tuple[TrainState, dict[str, Weighted]]:
    played = rollouts(run, environment, state.params, model_params, ids_N, state.step)
    return learn(state, played)

  return jax.jit(step, donate_argnums=0)


def _programs(run: cfg.Run, mesh: Mesh) -> list[Program]:
  player = policy_of(run)
  optimizer = optim.make_optimizer(run.optimizer, cfg.num_updates(run), player.specs)
  state = states.abstract_state(player, optimizer, mesh, functools.partial(_new_method, run, mesh))
  environment, model_params = acting.true_game(episodes.game_of(run)), {}
  inside = _method(run).place
  if isinstance(inside, cfg.InsideModel):
    # Only the settings of the model are read, so that it need not fit here.
    there = Path(inside.model_from)
    model_run = diffusion.open_trained(there, None, cfg.Mesh()).run
    environment = game_places.inside_model(episodes.game_of(run), model_run, inside, there, mesh)
    specs = diffusion.world_of(model_run, mesh).specs
    model_params = jax.tree.map(
        lambda x, sharding: abstract(x.shape, x.dtype, sharding), P.abstract(specs),
        rules.param_shardings(specs, mesh))
  ids = abstract((run.train.batch_size,), jnp.uint32, rules.row_sharding(mesh))
  return [Program('game step', train_step(run, environment, optimizer),
                  (state, model_params, ids))]


# --- Evaluation -------------------------------------------------------------------


def held_out(session: sessions.Session) -> np.ndarray:
  """u32[E]: ids of the held-out episodes in whose worlds a policy is evaluated."""
  return np.arange(_method(session.run).eval_games, dtype=np.uint32)


def _measuring(run: cfg.Run, environment: acting.Environment) -> Any:
  """The jitted measure(params, model's parameters, ids u32[E], is_greedy) → f32[E] arrays.

  It plays one game in each held-out world; what chance decides in it is the same every time.
  'return' is what the reader found, 'true_return' what the true game would have paid.
  """
  source = episodes.source_of(run, is_validation=True)

  def measure(params: Params, model_params: Params, ids_E: Array, is_greedy: Array
              ) -> dict[str, Array]:
    keys_E = episodes.keys(run, episodes.VALIDATION, 0, ids_E)
    played = acting.play(
        _setting(run, environment), model_params, _act(policy_of(run), params, is_greedy),
        jax.vmap(functools.partial(trajectories.world_of, source))(ids_E), keys_E,
        _num_actions(run))
    counts = played.counts
    return {'return': (played.rewards * counts).sum(-1),
            'true_return': played.true_rewards.sum(-1),
            'unreadable': ((1 - played.readable) * counts).sum(-1) / counts.sum(-1),
            'false_events': played.false.sum(-1), 'changes': played.changed.sum(-1)}

  return jax.jit(measure)


def scripted_returns(run: cfg.Run, ids_E: np.ndarray) -> dict[str, Array]:
  """f32[E] by name: what the game's scripted policies earn in held-out worlds, truly."""
  game, pays = episodes.game_of(run), _method(run).pays
  source = episodes.source_of(run, is_validation=True)

  def one(name: str, index: Array) -> Array:
    truth = trajectories.episode(game, [name], source.config.num_frames,
                                 trajectories.key_of(source, index)).truth
    changed = acting.change(game, truth.counters[:-1], truth.counters[1:])
    return acting.pay(game, changed, 1, pays).sum()

  found: dict[str, Array] = jax.jit(lambda ids_E: {
      name: jax.vmap(functools.partial(one, name))(ids_E) for name in game.policies})(ids_E)
  return found


def _evaluate(session: sessions.Session, step: int) -> dict[str, float]:
  """Mean returns in held-out worlds with their 95 % intervals of the bootstrap over worlds.

  Returns:
    'return', of the likeliest actions in the true game; 'sampled_return', of actions as in
    training; 'NAME_return' of each scripted policy of the game; and where the policy has learned
    inside a model, of sampled actions there, 'model_return', 'model_true_return' of the same
    actions in the true game, their difference 'model_gap', and the shares 'model_unreadable' and
    'model_false_events'. Each return and the gap also as NAME_low and NAME_high.
  """
  run, ids = session.run, held_out(session)
  params = policy.restore(session, step, 'params', model=policy_of(run)).state
  measure = _measuring(run, acting.true_game(episodes.game_of(run)))
  each = {'return': measure(params, {}, ids, True)['true_return'],
          'sampled_return': measure(params, {}, ids, False)['true_return'],
          **{f'{name}_return': values for name, values in scripted_returns(run, ids).items()}}
  shares = {}
  if cfg.place_of(run.objective):
    place = game_places.opened(run, _method(run).place, session.workdir)
    inside = _measuring(run, place.environment)(params, place.params, ids, False)
    inside = {name: np.asarray(x) for name, x in inside.items()}
    each |= {'model_return': inside['return'], 'model_true_return': inside['true_return'],
             'model_gap': inside['return'] - inside['true_return']}
    shares = {'model_unreadable': float(inside['unreadable'].mean()),
              'model_false_events': float(inside['false_events'].sum()
                                          / max(inside['changes'].sum(), 1))}
  return {**_with_intervals(each, run.seed), **shares}


def _with_intervals(each: dict[str, Any], seed: int) -> dict[str, float]:
  found: dict[str, float] = {}
  for name, values in each.items():
    array = np.asarray(values, np.float64)
    low, high = metrics.interval(lambda x: x.mean(-1), (array,), _RESAMPLES, seed)
    found |= {name: float(array.mean()), f'{name}_low': low, f'{name}_high': high}
  return found


# --- Without opening a run --------------------------------------------------------


def _num_actions(run: cfg.Run) -> int:
  data: Any = run.data
  return int(data.num_frames) - 1


def num_tokens(run: cfg.Run) -> int:
  """Actions of a step, which stand for tokens here."""
  return run.train.batch_size * _method(run).group_size * _num_actions(run)


def model_flops(run: cfg.Run) -> float:
  """Model FLOPs of a step: a forward pass of the policy for each action, and those of the updates.

  What the model in which it plays computes is left out.
  """
  passes = 1 + 3 * _method(run).algorithm.epochs
  return 2.0 * passes * num_tokens(run) * policy_of(run).multiply_adds


def check_fits(run: cfg.Run) -> None:
  """Refuses a run whose step cannot fit the devices here, as `memory.check_fits` does."""
  player = policy_of(run)
  height, width = worlds.shape_of(episodes.game_of(run)).frame
  frames = run.train.batch_size * _method(run).group_size * (_num_actions(run) + 1)
  memory.check_needed({'GamePolicy': 3 * P.num_bytes(player.specs),
                       'GameRL': 4 * 3 * height * width * frames})


KIND = Kind(_open, _programs, num_tokens, model_flops, _new_method, evaluate=_evaluate,
            build=lambda run, mesh: policy_of(run))
