"""Every dataclass refuses what it cannot mean, in one sentence that names the field."""

import dataclasses
import re
from typing import Any, get_args

import pytest

from jaxrl_pt import config as cfg
from jaxrl_pt.errors import UserError

MODEL = {'num_layers': 2, 'd_model': 32, 'd_ff': 64, 'num_heads': 4, 'num_kv_heads': 2,
         'head_dim': 8, 'vocab_size': 300}
DATA = {'source': cfg.PythonStdlib(), 'tokenizer': cfg.Bytes(), 'seq_len': 16}
HYBRID = cfg.HybridModes()
RUN = {'seed': 0, 'model': cfg.Model(**MODEL), 'data': cfg.Data(**DATA),
       'objective': cfg.NextToken(), 'optimizer': cfg.AdamW(cfg.ConstantRate(1e-3)),
       'train': cfg.Train(num_steps=4, batch_size=2)}


DIT = {'num_layers': 2, 'd_model': 32, 'd_ff': 64, 'num_heads': 4, 'patch': 4}
TOWER = {**DIT, 'd_out': 32}
WORLD_RUN = {**RUN, 'model': cfg.DiT(**DIT), 'data': cfg.Trajectories(cfg.Traveler()),
             'objective': cfg.Diffusion()}
GAME_RUN = {**WORLD_RUN, 'model': cfg.GamePolicy(), 'objective': cfg.GameRL()}


def mixed(*sources: Any, weights: tuple[float, ...] = ()) -> cfg.Mixture:
  return cfg.Mixture(tuple(map(str, range(len(sources)))), sources,
                     weights or (1.0,) * len(sources))


RL = cfg.RL('a', cfg.Problems(cfg.Arithmetic(9)), cfg.AnswerMatch())


def _evaluation(**fields: Any) -> cfg.GameEvaluation:
  """An evaluation of 49 frames after the first one, of at most 1000 episodes."""
  return cfg.GameEvaluation(cfg.Trajectories(cfg.Traveler(), num_frames=50, size=1000), **fields)


def judged(settings: dict[str, Any], **method: Any) -> cfg.RL:
  return dataclasses.replace(RL, **method, verifier=cfg.JudgeReward(
      'a', cfg.Model(**MODEL), cfg.AnswerMatch(), **settings))


HYBRID_RUN = cfg.Run(**{**RUN, 'train': cfg.Train(4), 'objective': dataclasses.replace(
    RL, rollouts=cfg.Rollouts(response_tokens=8, modes=HYBRID))})

# A valid value of every dataclass, as keyword arguments.
VALID: dict[type, dict[str, Any]] = {
    cfg.Quant: {},
    cfg.PlainRope: {},
    cfg.Llama3Rope: {},
    cfg.NoAdapter: {},
    cfg.LoRA: {},
    cfg.Model: MODEL,
    cfg.Compute: {},
    cfg.Mesh: {},
    cfg.PythonStdlib: {},
    cfg.TextFiles: {'glob': 'a'},
    cfg.Jsonl: {'glob': 'a'},
    cfg.Parquet: {'glob': 'a'},
    cfg.ArrayRecord: {'glob': 'a'},
    cfg.HuggingFaceDataset: {'path': 'a'},
    cfg.Seqio: {'name': 'task', 'module': 'm'},
    cfg.JsonlProblems: {'glob': 'a'},
    cfg.KnightsAndKnaves: {'size': 4},
    cfg.ReasoningGym: {'task': 'chain_sum', 'size': 4},
    cfg.Arithmetic: {'size': 4},
    cfg.RedundantChecks: {'size': 4},
    cfg.HybridSums: {'size': 4},
    cfg.HybridAccuracy: {'run': HYBRID_RUN},
    cfg.HybridConversations: {'glob': 'a'},
    cfg.CodeProblems: {'glob': 'a'},
    cfg.NumberedGames: {'size': 4},
    cfg.Problems: {'source': cfg.Arithmetic(4)},
    cfg.Demonstrations: {'source': cfg.Arithmetic(4)},
    cfg.Conversations: {'glob': 'a'},
    cfg.WeightedConversations: {'sources': (cfg.Conversations('a'),), 'weights': (1.0,)},
    cfg.Preferences: {'glob': 'a'},
    cfg.SlipPreferences: {'source': cfg.Arithmetic(4)},
    cfg.ResultPreferences: {'source': cfg.Arithmetic(4)},
    **{kind: {} for kind in (cfg.BoxedVerdict, cfg.MarkedVerdict, cfg.JudgePrompt,
                             cfg.JudgeVerifier)},
    cfg.JudgePairs: {'source': cfg.ResultPreferences(cfg.Arithmetic(4))},
    cfg.JudgeGuard: {},
    cfg.Tournament: {},
    cfg.JudgeReward: {'judge_from': 'a', 'model': cfg.Model(**MODEL), 'truth': cfg.AnswerMatch()},
    cfg.Mixture: {'names': ('a',), 'sources': (cfg.PythonStdlib(),), 'weights': (1.0,)},
    cfg.Bytes: {},
    cfg.PolicyTokenizer: {},
    cfg.TrainedBPE: {'vocab_size': 300},
    cfg.HuggingFaceTokenizer: {'path': 'a', 'end_of_text': '</s>', 'begin_of_text': ''},
    cfg.SentencePiece: {'path': 'a'},
    cfg.Data: DATA,
    cfg.ConstantRate: {'learning_rate': 1e-3},
    cfg.Cosine: {'peak_rate': 1e-3},
    cfg.WSD: {'peak_rate': 1e-3},
    cfg.TwoStage: {'peak_rate': 1e-3, 'second_peak_rate': 5e-4},
    cfg.AdamW: {'schedule': cfg.ConstantRate(1e-3)},
    cfg.NextToken: {},
    cfg.SFT: {'start_from': 'a'},
    cfg.DPO: {'start_from': 'a'},
    cfg.RewardModel: {'start_from': 'a'},
    **{kind: {} for kind in (
        *get_args(cfg.Advantage), cfg.PolicyGradient, cfg.PPOClip, cfg.DualClip, cfg.GSPO,
        cfg.CISPO, cfg.TokenMean,
        cfg.SequenceMeanTokenSum, cfg.SequenceMeanTokenMean, cfg.NoCorrection, cfg.TokenTIS,
        cfg.SequenceTIS, cfg.Rejection, cfg.NoKL, cfg.NoShaping, cfg.ShortRL, cfg.Kimi,
        cfg.Algorithm, cfg.Dense, cfg.OnPolicy, cfg.OneStepOff, cfg.InFlight, cfg.AllGroups,
        cfg.DynamicSampling, cfg.Rollouts, cfg.DecoupledModes, cfg.SingleMode, cfg.HybridModes)},
    cfg.ConstantDivisor: {'num_tokens': 8},
    cfg.KLInLoss: {'coef': 0.1},
    cfg.KLInReward: {'coef': 0.1},
    cfg.Overlong: {'max_tokens': 8, 'buffer_tokens': 4},
    cfg.Sampler: {},
    **{kind: {} for kind in (cfg.RefreshEvery, cfg.RefreshNever, cfg.ReSA, cfg.Slots, cfg.Engine,
                             cfg.NoDrafts, cfg.PromptLookup, cfg.SparseDrafts)},
    **{kind: {} for kind in (cfg.AnswerMatch, cfg.MathVerifier, cfg.LogicVerifier,
                             cfg.GymVerifier, cfg.FormatVerifier, cfg.VerifierPool,
                             cfg.Interpreter, cfg.CodeVerifier, cfg.Calculator, cfg.PythonTool,
                             cfg.GuessNumber)},
    cfg.ToolUse: {'tools': (cfg.Calculator(),), 'verifier': cfg.MathVerifier()},
    cfg.TextArena: {'game': 'a'},
    cfg.PythonEnvironment: {'target': 'module:Class'},
    cfg.ChatTemplate: {},
    cfg.Interactive: {'environment': cfg.PythonEnvironment('module:Class')},
    cfg.WordVerifier: {'min_words': 2, 'max_words': 5},
    cfg.LengthVerifier: {'min_chars': 2, 'max_chars': 5},
    cfg.PythonVerifier: {'target': 'module:function'},
    cfg.Composite: {'verifiers': (cfg.MathVerifier(),), 'weights': (1.0,)},
    **{kind: {} for kind in (cfg.PrefixMatch, cfg.FirstTokenMatch, cfg.DenseMatch,
                             cfg.GatedDenseMatch, cfg.InformationGain, cfg.Direct, cfg.Reason)},
    cfg.RPT: {'start_from': 'a'},
    cfg.RL: {'start_from': 'a', 'problems': cfg.Problems(cfg.Arithmetic(9)),
             'verifier': cfg.AnswerMatch()},
    **{kind: {} for kind in get_args(cfg.Game)},
    cfg.Trajectories: {'game': cfg.Traveler()},
    cfg.DiT: DIT,
    **{kind: {} for kind in (cfg.MaaG, cfg.MapMemory, cfg.NoMap, cfg.SlidingWindow,
                             cfg.DeadReckoning, cfg.Drawing, cfg.NoEdit, cfg.AddToLedger,
                             cfg.PaintCells)},
    cfg.GameEvaluation: {'trajectories': cfg.Trajectories(cfg.Traveler(), num_frames=50)},
    **{kind: {} for kind in (cfg.FrameHistory, cfg.Recurrent, cfg.Pixels, cfg.VAE, cfg.Conditions,
                             cfg.LogicNet, cfg.Flow, cfg.Shortcut, cfg.VDiffusion, cfg.Diffusion,
                             cfg.Autoencoding, cfg.GamePolicy, cfg.TrueGame, cfg.GameRL)},
    cfg.InsideModel: {'model_from': 'a'},
    cfg.VisionTower: TOWER,
    **{kind: {} for kind in (*get_args(cfg.PatchPositions), *get_args(cfg.Pooling))},
    cfg.Train: {'num_steps': 4, 'batch_size': 2},
    cfg.Checkpoint: {},
    cfg.Run: RUN,
}
ALL = [value for value in vars(cfg).values()
       if isinstance(value, type) and dataclasses.is_dataclass(value)]

NAN, INF = float('nan'), float('inf')
# Type, field, values refused, and a piece of what is expected instead.
REFUSED: list[tuple[type, str, list[Any], str]] = [
    *((kind, 'frame', ['32x32', None, (24, 32)], "one of '24x32', '64x64', '128x128'")
      for kind in get_args(cfg.Game)),
    *((kind, name, [-1, 1000, 1.5, None], 'to 999') for kind in (cfg.Traveler, cfg.PacMan)
      for name in ('start_low', 'start_high')),
    (cfg.Traveler, 'num_colours', [0, 7, 2.0], 'from 1 to 6'),
    (cfg.Traveler, 'period', [-1, 1025, None], 'from 0 to 1024'),
    (cfg.Traveler, 'num_cells', [7, 1.5, None], 'at least 8'),
    *((cfg.Pong, name, [0, 5, None], 'from 1 to 4') for name in ('paddle_speed', 'ball_speed')),
    (cfg.Pong, 'opponent_skill', [-0.1, 1.1, None], 'from 0 to 1'),
    (cfg.Pong, 'winning_score', [0, 100, None], 'from 1 to 99'),
    (cfg.Pong, 'start_high', [-1, 21, None], 'from 0 to 20'),
    *((cfg.PacMan, name, [-0.1, 1.1, None], 'from 0 to 1')
      for name in ('wall_share', 'ghost_rate')),
    (cfg.PacMan, 'pellet_share', [0.0, 1.1, None], 'from 0.1 to 1'),
    (cfg.PacMan, 'lives', [0, 10, None], 'from 1 to 9'),
    (cfg.Trajectories, 'game', ['Pong', None], 'one of @cfg.Traveler(), @cfg.Pong()'),
    (cfg.Trajectories, 'policy', ['best', None], "one of 'mixed', 'random'"),
    (cfg.Trajectories, 'num_frames', [1, 2.5, None], 'at least 2'),
    (cfg.Trajectories, 'size', [0, None], 'at least 1'),
    (cfg.Trajectories, 'seed', [-1, 2**32, None], 'from 0 to 4294967295'),
    (cfg.SlidingWindow, 'reach', [0, 9, None], 'from 1 to 8'),
    (cfg.SlidingWindow, 'margin', [-0.1, 1.1, NAN], 'from 0 to 1'),
    (cfg.SlidingWindow, 'min_known', [0, 65], 'from 1 to 64'),
    (cfg.MapMemory, 'entries', ['pixels', None], "one of 'contents', 'colours'"),
    (cfg.MapMemory, 'writes', ['never', None], "one of 'first', 'last'"),
    (cfg.MapMemory, 'localisation', [None, cfg.NoMap()], 'one of @cfg.DeadReckoning()'),
    (cfg.MaaG, 'events', ['logic', None], "one of 'predicted', 'none'"),
    (cfg.MaaG, 'shows_counters', [1, None], 'True or False'),
    (cfg.MaaG, 'map', [None, cfg.DeadReckoning()], 'one of @cfg.MapMemory(), @cfg.NoMap()'),
    *((kind, 'frame', [0, 1.5, None], 'at least 1') for kind in (cfg.AddToLedger, cfg.PaintCells)),
    (cfg.AddToLedger, 'amount', [0, 1000], 'from 1 to 999'),
    (cfg.GameEvaluation, 'trajectories', [None, cfg.Traveler()], 'one of @cfg.Trajectories()'),
    (cfg.GameEvaluation, 'modules', [None], 'one of @cfg.MaaG()'),
    (cfg.GameEvaluation, 'model', ['best', None], "one of 'trained', 'true'"),
    *((cfg.GameEvaluation, name, [0, 1.5, None], 'at least 1')
      for name in ('episodes', 'batch_size', 'at_frame')),
    (cfg.GameEvaluation, 'shuffled_map', [1, None], 'True or False'),
    *((cfg.GameEvaluation, name, [-0.1, 1.1], 'from 0 to 1')
      for name in ('nudge_rate', 'pixel_noise')),
    (cfg.GameEvaluation, 'edit', [None], 'one of @cfg.NoEdit()'),
    (cfg.GameEvaluation, 'checkpoint_every', [-1, 0.5], 'at least 0'),
    *((cfg.VisionTower, name, [0, -1, 2.0, '2', True, None], 'a whole number') for name in TOWER),
    (cfg.VisionTower, 'positions', ['rope', None, cfg.PlainRope()],
     'one of @cfg.NoPositions(), @cfg.LearnedPositions(), @cfg.SinCosPositions(), @cfg.Rope2D()'),
    (cfg.VisionTower, 'pooling', ['mean', None],
     'one of @cfg.AllPatches(), @cfg.MergePatches(), @cfg.Resampler(), @cfg.MeanPatches()'),
    (cfg.VisionTower, 'quant', ['ternary', None], 'one of @cfg.Quant()'),
    (cfg.VisionTower, 'sub_norm', [1, None], 'True or False'),
    (cfg.LearnedPositions, 'max_patches', [0, 2**16 + 1, 1.5, None], 'from 1 to 65536'),
    (cfg.Resampler, 'num_tokens', [0, 2**16 + 1, 1.5, None], 'from 1 to 65536'),
    (cfg.Quant, 'weights', ['int4', None, True], "one of 'none', 'ternary'"),
    (cfg.Quant, 'activations', ['int3', 8], "'int4_absmax'"),
    (cfg.Quant, 'hadamard', [1, 'yes'], 'True or False'),
    *((cfg.Model, name, [0, -1, 2.0, '2', True, None], 'a whole number of at least 1')
      for name in MODEL),
    (cfg.Model, 'rope_theta', [0.5, NAN, 'x', True], 'a number of at least 1'),
    (cfg.Model, 'norm_epsilon', [-1e-5, 1.5, None], 'a number from 0 to 1'),
    (cfg.Model, 'activation', ['relu', None], "one of 'swiglu', 'relu2'"),
    (cfg.Model, 'sub_norm', [1, None], 'True or False'),
    (cfg.Model, 'tied_head', [0, 'no'], 'True or False'),
    (cfg.Model, 'quant', ['ternary', None], 'one of @cfg.Quant()'),
    (cfg.Model, 'rope', ['llama3', None], 'one of @cfg.PlainRope(), @cfg.Llama3Rope()'),
    (cfg.Model, 'qkv_bias', [1, None], 'True or False'),
    (cfg.Model, 'qk_norm', [0, 'no'], 'True or False'),
    (cfg.Model, 'param_dtype', ['float16', None], "one of 'float32', 'bfloat16'"),
    (cfg.Model, 'adapter', ['lora', None], 'one of @cfg.NoAdapter(), @cfg.LoRA()'),
    (cfg.LoRA, 'rank', [0, 4097, 1.5, None], 'a whole number from 1 to 4096'),
    (cfg.LoRA, 'alpha', [0, -1.0, NAN, None], 'a number above 0'),
    (cfg.LoRA, 'projections', [(), 'q_proj', ('wq',), ('q_proj', 'q_proj'), None], "'down_proj'"),
    (cfg.LoRA, 'rank_stabilized', [1, None], 'True or False'),
    (cfg.Llama3Rope, 'factor', [0.5, NAN, None], 'a number of at least 1'),
    *((cfg.Llama3Rope, name, [0, NAN, None], 'a number above 0')
      for name in ('low_freq_factor', 'high_freq_factor')),
    (cfg.Llama3Rope, 'original_length', [0, 1.5, None], 'a whole number of at least 1'),
    (cfg.Compute, 'dtype', ['float16', None], "one of 'float32', 'bfloat16'"),
    (cfg.Compute, 'remat', ['full', True], "one of 'none', 'block'"),
    (cfg.Compute, 'unroll', [-1, 1.5], 'a whole number of at least 0'),
    (cfg.Compute, 'loss_chunk', [-1, '9'], 'a whole number of at least 0'),
    *((cfg.Mesh, name, [0, -1, 1.5], 'at least 1') for name in ('data', 'tensor', 'context')),
    (cfg.Mesh, 'fsdp', [-1, None], 'at least 0'),
    (cfg.PythonStdlib, 'max_bytes', [0, 9_999, 1e6], 'at least 10000'),
    *((t, 'glob', ['', None, 3], 'a non-empty string')
      for t in (cfg.TextFiles, cfg.Jsonl, cfg.Parquet, cfg.ArrayRecord, cfg.Conversations,
                cfg.Preferences)),
    *((t, 'source', [None, cfg.ReasoningGym('chain_sum', 4)], '@cfg.Arithmetic()')
      for t in (cfg.SlipPreferences, cfg.ResultPreferences)),
    (cfg.ResultPreferences, 'both_wrong', [-0.1, 1.1, NAN, None], 'a number from 0 to 1'),
    *((t, 'labels', [None, ('a',), ('a', 'a'), ('a', 'b', 'c'), ('a', 'b}'), ('a', ' b'), 'ab'],
       'two names') for t in (cfg.BoxedVerdict, cfg.MarkedVerdict)),
    (cfg.MarkedVerdict, 'marker', ['', None], 'a non-empty string'),
    (cfg.MarkedVerdict, 'marker', ['A'], 'a text that no label holds'),
    (cfg.JudgePrompt, 'system', [None, 3], 'a string'),
    (cfg.JudgePrompt, 'template', ['', None], 'a non-empty string'),
    (cfg.JudgePrompt, 'template', [
        '{query}', '{first}\n1 {query}\n2 {second}\n3', '{query} {first}\n2 {second}\n3',
        '{query}\n1 {first}\n2 {second}', '{query}\n1 {first}\n2 {second}\n{second}\n'],
     'in this order'),
    (cfg.JudgePrompt, 'verdict', [None, 'boxed'], 'one of @cfg.BoxedVerdict()'),
    (cfg.JudgePairs, 'source', [None, cfg.Arithmetic(4)], '@cfg.Preferences()'),
    (cfg.JudgePairs, 'prompt', [None, 'a'], 'one of @cfg.JudgePrompt()'),
    (cfg.JudgePairs, 'order', ['first', None], "one of 'both', 'hashed', 'better_first'"),
    (cfg.JudgePairs, 'is_worked', [1, None], 'True or False'),
    (cfg.JudgePairs, 'seed', [-1, None], 'at least 0'),
    (cfg.JudgeGuard, 'window', [1, None], 'from 2'),
    (cfg.JudgeGuard, 'threshold', [0.0, NAN, None], 'above 0'),
    (cfg.JudgeGuard, 'stop', [1, None], 'True or False'),
    (cfg.JudgeReward, 'judge_from', ['', None], 'a non-empty string'),
    (cfg.JudgeReward, 'model', [None, 'a'], 'one of @cfg.Model()'),
    (cfg.JudgeReward, 'truth', [None, cfg.Interactive], 'one of @cfg.AnswerMatch()'),
    (cfg.Tournament, 'form', ['elo', None], "one of 'round_robin', 'knockout'"),
    (cfg.Tournament, 'votes', [0, None], 'from 1 to 1024'),
    (cfg.Tournament, 'budget', [-1, None], 'at least 0'),
    (cfg.JudgeReward, 'tournament', ['knockout', None], 'one of @cfg.Tournament()'),
    (cfg.JudgeReward, 'after', [None, 3], 'a string'),
    (cfg.JudgeReward, 'scale', ['elo', None], "one of 'win_rate', 'rating'"),
    (cfg.JudgeReward, 'prompt_len', [0, None, 2**40], 'a whole number of at'),
    (cfg.JudgeReward, 'response_tokens', [0, None, 2**40], 'a whole number of at'),
    (cfg.JudgeReward, 'sampler', [None], 'one of @cfg.Sampler()'),
    (cfg.JudgeReward, 'slots', [0, None], 'from 1 to 65536'),
    (cfg.JudgeReward, 'guard', [None], 'one of @cfg.JudgeGuard()'),
    (cfg.JudgeVerifier, 'verdict', [None, 'boxed'], 'one of @cfg.BoxedVerdict()'),
    (cfg.JudgeVerifier, 'unparsed', [-1.5, 0.5, NAN, None], 'a number from -1 to 0'),
    (cfg.AnswerMatch, 'wrong', [-1.5, 0.5, NAN, None], 'a number from -1 to 0'),
    (cfg.WeightedConversations, 'sources', [(), None, (cfg.PythonStdlib(),)], 'a list of'),
    (cfg.WeightedConversations, 'weights', [(), None, (0.0,), (-1.0,), (1.0, 2.0), ('x',)],
     '1 numbers above 0'),
    (cfg.Mixture, 'names', [(), None, ('',)], 'a list of names'),
    (cfg.Mixture, 'names', [('a', 'a')], 'names that differ'),
    (cfg.Mixture, 'sources', [(), (cfg.Seqio('a', 'b'),), (cfg.PythonStdlib(),) * 2],
     '1 sources, one for each name'),
    (cfg.Mixture, 'weights', [(), (0.0,), (-1.0,), (1.0, 2.0), ('x',), (float('nan'),)],
     '1 numbers above 0'),
    (cfg.TextFiles, 'document_start', [None, 3], 'a string'),
    (cfg.Jsonl, 'text_field', ['', None], 'a non-empty string'),
    (cfg.Parquet, 'column', ['', None], 'a non-empty string'),
    (cfg.ArrayRecord, 'feature', [None], 'a string'),
    *((cfg.HuggingFaceDataset, name, ['', None], 'a non-empty string')
      for name in ('path', 'split', 'column')),
    *((cfg.Seqio, name, ['', None], 'a non-empty string')
      for name in ('name', 'module', 'feature')),
    *((cfg.JsonlProblems, name, ['', None], 'a non-empty string')
      for name in ('glob', 'prompt_field', 'answer_field')),
    *((t, 'size', [0, 1.5, None], 'a whole number of at least 1') for t in (
        cfg.KnightsAndKnaves, cfg.ReasoningGym, cfg.Arithmetic, cfg.RedundantChecks,
        cfg.NumberedGames)),
    *((t, 'seed', [-1, None], 'a whole number of at least 0') for t in (
        cfg.KnightsAndKnaves, cfg.ReasoningGym, cfg.Arithmetic, cfg.RedundantChecks,
        cfg.NumberedGames)),
    (cfg.CodeProblems, 'glob', ['', None], 'a non-empty string'),
    (cfg.CodeProblems, 'shown_tests', [-1, 1.5], 'at least 0'),
    (cfg.KnightsAndKnaves, 'min_people', [1, 9], 'from 2 to 8'),
    (cfg.KnightsAndKnaves, 'max_people', [2, 9], 'from 3 to 8'),
    (cfg.ReasoningGym, 'task', ['', None], 'a non-empty string'),
    (cfg.ReasoningGym, 'settings', [('max_terms', 3), (('max_terms',),), ((3, 3),), {'a': 1}],
     "as (('max_terms', 3),)"),
    (cfg.Arithmetic, 'num_terms', [1, 17], 'from 2 to 16'),
    (cfg.Arithmetic, 'num_digits', [0, 10], 'from 1 to 9'),
    *((t, 'noise', [-0.1, 1.1, NAN], 'a number from 0 to 1')
      for t in (cfg.Arithmetic, cfg.RedundantChecks)),
    (cfg.RedundantChecks, 'min_steps', [0, 65], 'from 1 to 64'),
    (cfg.RedundantChecks, 'max_steps', [0, 65], 'from 1 to 64'),
    (cfg.RedundantChecks, 'max_checks', [-1, None], 'at least 0'),
    (cfg.Problems, 'source', [None, cfg.PythonStdlib()], '@cfg.JsonlProblems()'),
    (cfg.Problems, 'template', ['', None, 'no place', '{prompt}{prompt}'], 'expected'),
    (cfg.Problems, 'held_out', [-0.1, 1.1, NAN], 'a number from 0 to 1'),
    (cfg.Problems, 'is_chat', [None, 1], 'True or False'),
    (cfg.Demonstrations, 'source', [None, cfg.KnightsAndKnaves(4)], '@cfg.Arithmetic()'),
    (cfg.AnswerMatch, 'marker', ['', None], 'a non-empty string'),
    (cfg.MathVerifier, 'answer', ['tags', None], "'last_number'"),
    (cfg.MathVerifier, 'symbolic', [1, None], 'True or False'),
    (cfg.GymVerifier, 'answer', ['boxed', None], "one of 'tags', 'text'"),
    (cfg.GymVerifier, 'partial_credit', [1, None], 'True or False'),
    (cfg.WordVerifier, 'min_words', [-1, None], 'at least 0'),
    (cfg.WordVerifier, 'max_words', [1, None], 'at least 2'),
    (cfg.WordVerifier, 'ngram', [0, 1.5], 'at least 1'),
    (cfg.FormatVerifier, 'tags', ['think', [], [''], [3]], 'a list of names'),
    (cfg.LengthVerifier, 'min_chars', [-1, None], 'at least 0'),
    (cfg.LengthVerifier, 'max_chars', [2, None], 'at least 3'),
    (cfg.PythonVerifier, 'target', ['', None, 'module', 'a:b:c'], 'expected'),
    (cfg.PythonVerifier, 'parts', ['answer', [3], None], 'a list of names'),
    (cfg.PythonVerifier, 'min_score', [-1e10, NAN, None], 'a number of at least -1e+09'),
    (cfg.PythonVerifier, 'max_score', [-1e10, NAN, None], 'a number of at least'),
    (cfg.Composite, 'verifiers', [(), None, (cfg.AnswerMatch(),)], 'a list'),
    (cfg.Composite, 'weights', [(), None, (1.0, 2.0), ('x',), (NAN,)], 'expected'),
    (cfg.Interpreter, 'cpu_seconds', [0, 1.5, None], 'a whole number from 1 to 86400'),
    (cfg.Interpreter, 'wall_seconds', [0, NAN, None], 'a number from 0.1 to 86400'),
    (cfg.Interpreter, 'memory_mib', [63, None], 'from 64 to 1048576'),
    (cfg.Interpreter, 'disk_mib', [0, None], 'from 1 to 65536'),
    (cfg.Interpreter, 'threads', [-1, 1025], 'from 0 to 1024'),
    (cfg.Interpreter, 'output_bytes', [0, 2**21], 'from 1 to 1048576'),
    (cfg.CodeVerifier, 'answer', ['tags', None], "one of 'fence', 'text'"),
    *((t, 'interpreter', [None, 3], '@cfg.Interpreter()')
      for t in (cfg.CodeVerifier, cfg.PythonTool)),
    (cfg.ToolUse, 'tools', [(), None, cfg.Calculator(), (cfg.MathVerifier(),),
                            (cfg.Calculator(), cfg.Calculator())], 'a list'),
    (cfg.ToolUse, 'verifier', [None, cfg.AnswerMatch()], '@cfg.MathVerifier()'),
    (cfg.ToolUse, 'max_calls', [0, 65], 'from 1 to 64'),
    (cfg.GuessNumber, 'low', [-1, None], 'at least 0'),
    (cfg.GuessNumber, 'high', [1, None], 'at least 2'),
    (cfg.GuessNumber, 'max_guesses', [0, 1025], 'from 1 to 1024'),
    (cfg.TextArena, 'game', ['', None], 'a non-empty string'),
    (cfg.PythonEnvironment, 'target', ['', None, 'module', 'a:b:c'], 'expected'),
    (cfg.Interactive, 'environment', [None, cfg.MathVerifier()], '@cfg.GuessNumber()'),
    (cfg.Interactive, 'template', [None, '{content}'], '@cfg.ChatTemplate()'),
    *((cfg.ChatTemplate, name, ['', 'a', '{content}{content}', None], 'expected')
      for name in ('system', 'user')),
    *((cfg.ChatTemplate, name, [None, 3, '\0'], 'a string') for name in ('opening', 'ending')),
    (cfg.ChatTemplate, 'stop', [None, 'a', ('',), ('a', 'b', 'c', 'd'), ('x' * 33,), ('\0',)],
     'a list of at most three texts'),
    *((cfg.Interactive, name, [0, None, 2**40], 'a whole number of at')
      for name in ('max_turns', 'turn_tokens', 'observation_tokens', 'max_observation_bytes')),
    (cfg.VerifierPool, 'num_workers', [0, 1.5], 'at least 1'),
    *((cfg.VerifierPool, name, [0, NAN, None, 1e308], 'a number from 0.01 to 86400')
      for name in ('cpu_seconds', 'wall_seconds')),
    (cfg.VerifierPool, 'memory_mib', [63, None], 'at least 64'),
    (cfg.TrainedBPE, 'vocab_size', [256, None, 300.0], 'at least 257'),
    (cfg.HuggingFaceTokenizer, 'path', ['', None], 'a non-empty string'),
    (cfg.HuggingFaceTokenizer, 'end_of_text', ['', None], 'a non-empty string'),
    (cfg.HuggingFaceTokenizer, 'begin_of_text', [None, 3], 'a non-empty string'),
    (cfg.HuggingFaceTokenizer, 'stop_tokens', ['</s>', ('',), (3,), ('a',) * 8],
     'at most 7 tokens'),
    (cfg.SentencePiece, 'stop_tokens', [None, ('',)], 'at most 7 tokens'),
    (cfg.SentencePiece, 'path', ['', None], 'a non-empty string'),
    (cfg.SentencePiece, 'has_begin', [None, 1], 'True or False'),
    (cfg.Data, 'source', ['a.txt', None, cfg.Bytes()], '@cfg.TextFiles()'),
    (cfg.Data, 'tokenizer', ['bpe', cfg.PythonStdlib()], '@cfg.TrainedBPE()'),
    (cfg.Data, 'seq_len', [1, 1.5], 'at least 2'),
    (cfg.Data, 'validation_fraction', [-0.1, 0.6, NAN, 'x'], 'a number from 0 to 0.5'),
    (cfg.Data, 'validation_glob', [None, 3], 'a string'),
    (cfg.Data, 'long_documents', ['drop', None], "one of 'split', 'cut', 'error'"),
    (cfg.Data, 'cache_dir', [None], 'a string'),
    (cfg.Data, 'num_workers', [-1], 'at least 0'),
    *((t, name, [-1e-3, 0, 1e-300, NAN, '1e-3', True], 'a number above 0') for t, name in (
        (cfg.ConstantRate, 'learning_rate'), (cfg.Cosine, 'peak_rate'), (cfg.WSD, 'peak_rate'),
        (cfg.TwoStage, 'peak_rate'))),
    *((t, 'warmup_steps', [-1, 0.5], 'a whole number of at least 0')
      for t in (cfg.ConstantRate, cfg.Cosine, cfg.WSD, cfg.TwoStage)),
    *((t, 'end_rate', [-1, None], 'a number of at least 0')
      for t in (cfg.Cosine, cfg.WSD, cfg.TwoStage)),
    (cfg.WSD, 'decay_fraction', [-0.1, 1.1], 'a number from 0 to 1'),
    (cfg.TwoStage, 'second_peak_rate', [-1, 0, None], 'a number above 0'),
    (cfg.TwoStage, 'switch_fraction', [-0.1, 1.1], 'a number from 0 to 1'),
    (cfg.TwoStage, 'shape', ['wsd'], "one of 'linear', 'cosine'"),
    (cfg.AdamW, 'schedule', [1e-3, None], '@cfg.WSD()'),
    *((cfg.AdamW, name, [-0.1, 1.1, None], 'a number from 0 to 1') for name in ('b1', 'b2')),
    *((t, name, [1, 1.0, 1 - 1e-12], 'never learns') for t, name in (
        (cfg.AdamW, 'b1'), (cfg.AdamW, 'b2'), (cfg.ShortRL, 'ema'),
        (cfg.InformationGain, 'decay'))),
    (cfg.AdamW, 'eps', [-0.1, 0, 1e-300, NAN], 'a number above 0'),
    *((cfg.AdamW, name, [-0.1, NAN], 'a number of at least 0')
      for name in ('weight_decay', 'clip_norm')),
    (cfg.AdamW, 'weight_decay_shape', ['linear'], "one of 'constant', 'cosine'"),
    (cfg.NextToken, 'int4_from', [-0.1, 1.1, None], 'a number from 0 to 1'),
    (cfg.SFT, 'start_from', [None, 3], 'a string'),
    (cfg.SFT, 'loss', ['token', None], "one of 'mean', 'sum'"),
    (cfg.DPO, 'start_from', ['', None], 'a non-empty string'),
    (cfg.DPO, 'loss', ['hinge', None], "one of 'sigmoid', 'robust', 'ipo'"),
    (cfg.DPO, 'beta', [0, -1, NAN, None], 'a number above 0'),
    (cfg.DPO, 'label_smoothing', [-0.1, 0.5, NAN, None], 'a number from 0 to 0.49'),
    (cfg.RewardModel, 'start_from', [None, 3], 'a string'),
    (cfg.RewardModel, 'center', [-0.1, NAN, None], 'a number of at least 0'),
    (cfg.Sampler, 'temperature', [-1, NAN, None], 'a number of at least 0'),
    (cfg.Sampler, 'temperature', [1e-9, 1e9], '0 for the likeliest token, or a number from'),
    (cfg.Sampler, 'top_k', [-1, 0.5], 'a whole number of at least 0'),
    (cfg.Sampler, 'top_p', [-0.1, 0, 1.1], 'a number'),
    (cfg.Sampler, 'min_p', [-0.1, 1.1, NAN], 'a number from 0 to 1'),
    (cfg.Sampler, 'banned', [3, (-1,), (0.5,), (True,)], 'a list of token ids'),
    (cfg.RefreshEvery, 'tokens', [0, 1.5], 'at least 1'),
    *((cfg.ReSA, name, [0, 1.5], 'at least 1') for name in ('block', 'min_blocks')),
    (cfg.ReSA, 'active', [-0.1, 0, 1.1, NAN], '0'),
    (cfg.ReSA, 'local_blocks', [-1, 17], 'from 0 to 16'),
    (cfg.ReSA, 'refresh', [32, None], 'one of @cfg.RefreshEvery(), @cfg.RefreshNever()'),
    (cfg.ReSA, 'replay', [1, None], 'True or False'),
    *((cfg.Engine, name, [0, 1.5], 'at least 1') for name in (
        'slots', 'queue', 'prompt_len', 'response_len', 'page_size', 'prefill_chunk',
        'prefill_rows', 'steps_per_call', 'constrained')),
    *((cfg.Slots, name, [0, 1.5], 'at least 1') for name in (
        'page_size', 'prefill_chunk', 'prefill_tokens')),
    *((cfg.Slots, name, [-1, 0.5], 'at least 0') for name in ('slots', 'num_pages')),
    *((kind, 'tokens', [0, 65, 1.5], 'from 1 to 64') for kind in (
        cfg.PromptLookup, cfg.SparseDrafts)),
    (cfg.PromptLookup, 'ngram', [0, 65, 1.5], 'from 1 to 64'),
    (cfg.SparseDrafts, 'resa', [None, cfg.Dense()], 'one of @cfg.ReSA()'),
    *((kind, 'drafts', [None, 4], 'one of @cfg.NoDrafts()') for kind in (cfg.Slots, cfg.Engine)),
    (cfg.Engine, 'sparse', [None, 4], 'one of @cfg.Dense()'),
    (cfg.InFlight, 'staleness', [0, 65, 1.5], 'from 1 to 64'),
    (cfg.Slots, 'kv', ['int5', 4], "one of 'model', 'int8', 'int4', 'int3'"),
    (cfg.Engine, 'top_logprobs', [-1, 0.5], 'at least 0'),
    (cfg.Engine, 'num_pages', [-1, 0.5], 'at least 0'),
    (cfg.Slots, 'head', ['int3', 8], "one of 'model', 'int8', 'int4'"),
    (cfg.Slots, 'packed', [None, 1], 'True or False'),
    (cfg.Engine, 'kv', ['int5', None], "one of 'model', 'int8', 'int4', 'int3'"),
    *((cfg.DiT, name, [0, 1.5], 'at least 1') for name in ('num_layers', 'd_model', 'd_ff')),
    *((cfg.DiT, name, [0, 1.5], 'a whole number from 1') for name in ('num_heads', 'patch')),
    *((cfg.DiT, name, [None], '@cfg.') for name in ('past', 'space', 'conditions', 'logic',
                                                        'quant')),
    (cfg.DiT, 'step_sizes', [-1, 17], 'a whole number from 0 to 16'),
    (cfg.DiT, 'sub_norm', [1], 'True or False'),
    *((cfg.FrameHistory, name, [0, 1001], 'a whole number from 1')
      for name in ('num_frames', 'noise_buckets')),
    *((cfg.Conditions, name, [1, None], 'True or False') for name in ('action', 'values', 'map')),
    *((cfg.LogicNet, name, [0, 1.5], 'a whole number from 1') for name in ('channels', 'hidden')),
    (cfg.Recurrent, 'channels', [0, 1.5], 'a whole number from 1'),
    *((cfg.VAE, name, [0, 1.5], 'a whole number from 1')
      for name in ('base', 'num_blocks', 'latent_channels')),
    (cfg.VAE, 'multipliers', [(), (1, 0), 4, (1,) * 9], 'a list of 1 to 8 whole numbers'),
    (cfg.VAE, 'offset', [NAN, 'x'], 'a number from -1e+30 to 1e+30'),
    (cfg.VAE, 'scale', [0, NAN], 'a number above 0'),
    (cfg.Autoencoding, 'windows', [0, 1.5], 'a whole number from 1'),
    (cfg.Autoencoding, 'kl_weight', [-0.1, NAN], 'a number of at least 0'),
    (cfg.Autoencoding, 'display_weight', [0, NAN], 'a number above 0'),
    *((cfg.GamePolicy, name, [0, 1.5], 'a whole number from 1')
      for name in ('num_frames', 'hidden')),
    (cfg.GamePolicy, 'channels', [(), (1, 0), 4, (1,) * 6], 'a list of 1 to 5 whole numbers'),
    (cfg.InsideModel, 'model_from', ['', None], 'a non-empty string'),
    (cfg.InsideModel, 'modules', [None, cfg.NoMap()], 'one of @cfg.MaaG()'),
    *((t, 'drawing', [None, cfg.NoMap()], 'one of @cfg.Drawing()')
      for t in (cfg.InsideModel, cfg.GameEvaluation)),
    (cfg.Drawing, 'sampling_steps', [-1, 9, 1.5], 'a whole number from 0 to 8'),
    (cfg.Drawing, 'sampling_shift', [-0.1, 101, NAN], 'a number from 0 to 100'),
    (cfg.GameRL, 'place', [None, 'a'], 'one of @cfg.TrueGame(), @cfg.InsideModel()'),
    *((cfg.GameRL, name, [0, 1.5], 'at least 1') for name in ('group_size', 'eval_games')),
    (cfg.GameRL, 'pays', ['score', None], "one of 'events', 'changes'"),
    (cfg.GameRL, 'algorithm', [None, cfg.OPO()], 'one of @cfg.Algorithm()'),
    (cfg.Diffusion, 'vae_from', [None, 3], 'a string'),
    (cfg.Flow, 'prediction', ['eps', None], "one of 'x0', 'velocity'"),
    *((cfg.Flow, name, [0, 101, NAN], 'a number from 0.01 to 100')
      for name in ('shift', 'sampling_shift')),
    (cfg.VDiffusion, 'num_levels', [7, 10_001], 'a whole number from 8 to 10000'),
    (cfg.VDiffusion, 'snr_clip', [0, NAN], 'a number above 0'),
    (cfg.VDiffusion, 'decay', [-0.1, 1.0, NAN], 'a number from 0'),
    (cfg.Diffusion, 'process', [None, 'x'], 'one of @cfg.Flow()'),
    (cfg.Diffusion, 'windows', [0, 1.5], 'a whole number from 1'),
    *((cfg.Diffusion, name, [-0.1, 1.1, NAN], 'a number from 0 to 1')
      for name in ('context_noise', 'map_dropout', 'pose_jitter', 'paint_rate')),
    (cfg.Diffusion, 'display_weight', [0, NAN], 'a number above 0'),
    (cfg.Diffusion, 'event_weight', [-0.1, NAN], 'a number of at least 0'),
    (cfg.Diffusion, 'sampling_steps', [0, 9], 'a whole number from 1 to 8'),
    (cfg.RPT, 'start_from', ['', None], 'a non-empty string'),
    (cfg.RPT, 'rollouts', [None], 'one of @cfg.Rollouts()'),
    *((cfg.RPT, name, [None, 'x'], '@cfg.') for name in ('reward', 'prediction')),
    (cfg.RPT, 'proxy_from', [None, 3], 'a string'),
    (cfg.GatedDenseMatch, 'penalty', [-0.1, NAN], 'a number of at least 0'),
    (cfg.InformationGain, 'decay', [-0.1, 1.1, NAN], 'a number from 0'),
    *((cfg.Reason, name, ['', None], 'a non-empty string') for name in ('think', 'answer')),
    (cfg.RPT, 'algorithm', [None, cfg.OPO()], 'one of @cfg.Algorithm()'),
    *((cfg.RPT, name, [0, 1.5], 'at least 1') for name in ('eval_positions', 'scored_examples',
                                                            'positions_per_document')),
    *((t, 'gamma', [-0.1, 1.1, None], 'a number from 0 to 1')
      for t in (cfg.ReinforcePlusPlus, cfg.GAE, cfg.HGPO)),
    (cfg.HGPO, 'form', ['ppo', None], "one of 'grpo', 'rloo', 'reinforce_plus_plus'"),
    *((cfg.HGPO, name, [-0.1, NAN], 'a number of at least 0') for name in ('alpha', 'margin')),
    (cfg.HGPO, 'mode_ties', ['both', 0], "one of 'no_think', 'think', 'neither'"),
    (cfg.HGPO, 'best_ties', ['none', 0], "one of 'one', 'all'"),
    (cfg.HGPO, 'best_over', ['batch', 0], "one of 'mode', 'group'"),
    (cfg.Thinkless, 'think_cost', [-0.1, 1.1], 'a number from 0 to 1'),
    (cfg.AdaptThink, 'bonus', [-0.1, NAN], 'a number of at least 0'),
    *((t, 'alpha', [-0.1, NAN], 'a number of at least 0')
      for t in (cfg.ModeEfficiency, cfg.DecoupledModes)),
    *((cfg.HybridModes, name, ['', None], 'a non-empty string')
      for name in ('think', 'no_think', 'think_end')),
    (cfg.HybridModes, 'forced', [1, None], 'True or False'),
    (cfg.HybridAccuracy, 'run', [None, 'runs/x'], 'one of @cfg.Run()'),
    (cfg.HybridAccuracy, 'problems', ['some', None], "one of 'held_out', 'all'"),
    *((cfg.HybridAccuracy, name, [0, 1.5], 'at least 1')
      for name in ('num_problems', 'samples', 'free_samples')),
    (cfg.HybridAccuracy, 'margin', [-0.1, NAN], 'a number of at least 0'),
    (cfg.HybridAccuracy, 'sampler', [None, 0.6], 'one of @cfg.Sampler()'),
    (cfg.HybridAccuracy, 'budgets', [(), 0.5, (0.5, 1.0), (-0.1,), ('a',)], 'below 1'),
    (cfg.HybridAccuracy, 'resamples', [99, 1.5], 'from 100 to'),
    (cfg.HybridAccuracy, 'slots', [0, None], 'from 1 to'),
    (cfg.HybridAccuracy, 'seed', [-1, 0.5], 'from 0 to'),
    (cfg.Rollouts, 'modes', [None, 'think'], 'one of @cfg.SingleMode()'),
    *((cfg.HybridSums, name, [-0.1, 1.1], 'a number from 0 to 1')
      for name in ('easy_share', 'think_share')),
    (cfg.HybridSums, 'size', [0, 1.5], 'at least 1'),
    (cfg.HybridSums, 'min_steps', [0, 65], 'from 1 to 64'),
    (cfg.HybridSums, 'max_steps', [2, 65], 'from 3 to 64'),
    (cfg.HybridSums, 'slips', [(), (0.1, 0.2, 0.3, 1.1), 0.1], 'four numbers from 0 to 1'),
    *((cfg.HybridSums, name, ['#', 'ab', 'é', '7'], 'one byte that neither')
      for name in ('think', 'think_end', 'no_think')),
    (cfg.HybridSums, 'seed', [-1, 0.5], 'at least 0'),
    *((cfg.HybridConversations, name, ['', None], 'a non-empty string')
      for name in ('glob', 'think', 'think_end', 'no_think', 'evaluation_field')),
    *((cfg.HybridConversations, name, [None, 3], 'a string')
      for name in ('no_think_end', 'evaluation_glob')),
    (cfg.HybridConversations, 'ngram', [0, 101, 1.5], 'from 1 to 100'),
    (cfg.GAE, 'lam', [-0.1, 1.1], 'a number from 0 to 1'),
    (cfg.GAE, 'value_lr', [-0.1, 0, NAN], 'a number above 0'),
    *((t, 'low', [-0.1, 1.1, None], 'a number from 0 to 1')
      for t in (cfg.PPOClip, cfg.DualClip, cfg.GSPO, cfg.CISPO, cfg.Rejection)),
    *((t, 'high', [-0.1, NAN], 'a number of at least 0')
      for t in (cfg.PPOClip, cfg.DualClip, cfg.GSPO, cfg.CISPO)),
    (cfg.DualClip, 'bound', [0.5, None], 'a number of at least 1'),
    (cfg.ConstantDivisor, 'num_tokens', [0, 1.5], 'at least 1'),
    *((t, 'cap', [0.5, NAN], 'a number of at least 1') for t in (cfg.TokenTIS, cfg.SequenceTIS)),
    (cfg.Rejection, 'high', [0.5, NAN], 'a number of at least 1'),
    *((t, 'coef', [-0.1, None], 'a number of at least 0') for t in (cfg.KLInLoss, cfg.KLInReward)),
    *((t, 'estimator', ['k4', None], "one of 'k1', 'k2', 'k3'")
      for t in (cfg.KLInLoss, cfg.KLInReward)),
    (cfg.Overlong, 'max_tokens', [0, 1.5], 'at least 1'),
    (cfg.Overlong, 'buffer_tokens', [0, 9], 'a whole number from 1 to 8'),
    (cfg.ShortRL, 'slack_tokens', [-1, 0.5], 'at least 0'),
    *((cfg.ShortRL, name, [-0.1, 1.1], 'a number from 0 to 1')
      for name in ('slack_accuracy', 'ema')),
    *((t, 'weight', [-0.1, NAN], 'a number of at least 0') for t in (cfg.ShortRL, cfg.Kimi)),
    *((cfg.Algorithm, name, [None, 'x'], '@cfg.') for name in (
        'advantage', 'surrogate', 'aggregation', 'correction', 'kl', 'shaping')),
    (cfg.Algorithm, 'entropy_coef', [-0.1, NAN], 'a number of at least 0'),
    *((cfg.Algorithm, name, [0, 1.5], 'at least 1') for name in ('minibatches', 'epochs')),
    (cfg.DynamicSampling, 'from_step', [-1, 0.5], 'at least 0'),
    (cfg.DynamicSampling, 'max_rounds', [0, 0.5], 'at least 1'),
    *((cfg.Rollouts, name, [0, 1.5], 'at least 1')
      for name in ('num_prompts', 'group_size', 'prompt_len', 'response_tokens')),
    *((cfg.Rollouts, name, [None, 'x'], '@cfg.')
      for name in ('sampler', 'mode', 'selection', 'sparse')),
    (cfg.Rollouts, 'dump_every', [-1, 0.5], 'at least 0'),
    (cfg.Rollouts, 'slots', [None, 3], 'one of @cfg.Slots()'),
    (cfg.Rollouts, 'mismatch_gate', [-1, 0.5, NAN, None], 'at least '),
    (cfg.RPT, 'min_entropy', [-1, NAN], 'a number of at least 0'),
    (cfg.RPT, 'difficulty', [3, (1, 2), (2, 1, 3), (0.1, '1', 2), (NAN, 1, 2), (0, 1, INF),
                              None], '3 numbers that rise'),
    (cfg.RL, 'start_from', ['', None], 'a non-empty string'),
    *((cfg.RL, name, [None, 'x'], '@cfg.')
      for name in ('problems', 'verifier', 'pool', 'rollouts', 'algorithm')),
    (cfg.RL, 'eval_problems', [0, 1.5], 'at least 1'),
    *((cfg.Train, name, [0, -1, 1.5, None], 'at least 1')
      for name in ('num_steps', 'accumulation', 'group_parts', 'log_every', 'eval_every')),
    (cfg.Train, 'batch_size', [-1, 1.5, None], 'at least 0'),
    (cfg.Train, 'eval_batches', [-1], 'at least 0'),
    (cfg.Train, 'tensorboard', [1], 'True or False'),
    *((cfg.Checkpoint, name, [0, 1.5], 'at least 1') for name in ('every', 'keep')),
    (cfg.Checkpoint, 'keep_every', [-1], 'at least 0'),
    (cfg.Run, 'seed', [-1, 2**31, 0.5], 'a whole number from 0 to 2147483647'),
    *((cfg.Run, name, [None, 'x'], '@cfg.') for name in (
        'model', 'data', 'objective', 'optimizer', 'train', 'checkpoint', 'mesh', 'compute')),
]


@pytest.mark.parametrize('kind', ALL, ids=lambda t: t.__name__)
def test_valid_values_are_frozen_hashable_and_equal(kind):
  value = kind(**VALID[kind])
  assert value == kind(**VALID[kind]) and hash(value) == hash(kind(**VALID[kind]))
  for field in dataclasses.fields(kind):
    with pytest.raises(dataclasses.FrozenInstanceError):
      setattr(value, field.name, None)


@pytest.mark.parametrize(
    'kind, name, value, expected',
    [(kind, name, value, expected) for kind, name, values, expected in REFUSED
     for value in values], ids=lambda x: x.__name__ if isinstance(x, type) else repr(x)[:24])
def test_refused(kind, name, value, expected):
  with pytest.raises(UserError) as caught:
    kind(**{**VALID[kind], name: value})
  message = str(caught.value)
  assert message.startswith(f'{kind.__name__}.{name} = {value!r}: expected '), message
  assert expected in message and '\n' not in message and message.endswith('.')


def test_every_number_is_finite_and_bounded_and_every_text_can_be_written():
  beyond = {int: [2**63, 10**30, 10**5000], float: [INF, -INF, NAN, 1e308, 10**400],
            str: ['a\0b', '\ud800']}
  fields = [(kind, field.name, value) for kind in ALL for field in dataclasses.fields(kind)
            for value in beyond.get(field.type, ())]
  assert len(fields) > 300
  for kind, name, value in fields:
    with pytest.raises(UserError, match=rf'{kind.__name__}\.{name} = .*: expected .*\.$'):
      kind(**{**VALID[kind], name: value})


@pytest.mark.parametrize('kind, name, value, expected', [
    (cfg.Rollouts, 'group_size', 2**31, 'the responses of a batch would take at least 256 GiB'),
    (cfg.Rollouts, 'prompt_len', 2**31, 'the prompts of a batch would take at least 256 GiB'),
    (cfg.Rollouts, 'response_tokens', 2**31, 'would take at least 2 TiB'),
    (cfg.Arithmetic, 'size', 2**63, 'the problems would take at least 2.1e+06 PiB'),
    (cfg.VerifierPool, 'num_workers', 2**63, 'so many processes would take at least'),
    (cfg.Model, 'd_ff', 2**31, 'its layers would take at least 512 GiB'),
    (cfg.Data, 'seq_len', 2**31, 'the tokens of one example would take at least 8 GiB'),
    (cfg.Engine, 'slots', 2**40, 'the tokens of the slots would take at least 4 PiB'),
])
def test_a_size_that_no_machine_holds_says_what_it_would_take(kind, name, value, expected):
  with pytest.raises(UserError) as caught:
    kind(**{**VALID[kind], name: value})
  assert 'a whole number of at most' in str(caught.value) and expected in str(caught.value)


def test_every_field_has_a_row():
  rows = {f'{kind.__name__}.{name}' for kind, name, _, _ in REFUSED}
  fields = {f'{kind.__name__}.{field.name}' for kind in ALL for field in dataclasses.fields(kind)}
  assert fields - rows == set()


@pytest.mark.parametrize('make, expected', [
    (lambda: cfg.Quant('none', 'int8'), "set Quant.weights = 'ternary'"),
    (lambda: cfg.Quant(hadamard=True), "set Quant.weights = 'ternary'"),
    (lambda: cfg.Quant('ternary_128', hadamard=True), 'leave it at False'),
    (lambda: cfg.Model(**MODEL | {'d_ff': 96}, quant=cfg.Quant('ternary_128')), 'multiple of 128'),
    (lambda: cfg.Model(**{**MODEL, 'num_kv_heads': 3}), 'Model.num_heads = 4 is not a multiple'),
    (lambda: cfg.Model(**{**MODEL, 'head_dim': 7}), 'Model.head_dim = 7 is odd'),
    (lambda: cfg.Model(**MODEL, adapter=cfg.LoRA(16, projections=('q_proj', 'v_proj'))),
     'LoRA.rank = 16 is not below 16, the smaller width of v_proj (32 × 16)'),
    (lambda: cfg.VisionTower(**TOWER | {'num_heads': 5}),
     'VisionTower.d_model = 32 is no multiple of VisionTower.num_heads = 5'),
    (lambda: cfg.VisionTower(**TOWER | {'num_heads': 16}),
     'VisionTower.d_model / num_heads = 2 is no multiple of 4'),
    (lambda: cfg.VisionTower(**TOWER | {'d_model': 30, 'num_heads': 5},
                             positions=cfg.SinCosPositions()), 'choose @cfg.LearnedPositions()'),
    (lambda: cfg.VisionTower(**TOWER, quant=cfg.Quant('ternary_128')), "'ternary' for a Vision"),
    (lambda: cfg.Llama3Rope(low_freq_factor=4), 'Llama3Rope.high_freq_factor = 4.0 is not above'),
    (lambda: cfg.RL('a', cfg.Problems(cfg.CodeProblems('a')),
                    cfg.Composite((cfg.CodeVerifier(),), (1.0,)), cfg.VerifierPool(wall_seconds=5)),
     'Interpreter.wall_seconds = 5 leaves a program as long as'),
    (lambda: cfg.RL('a', cfg.Problems(cfg.Arithmetic(9), is_chat=True),
                    cfg.Interactive(cfg.GuessNumber())), 'leave Problems.is_chat at False'),
    (lambda: cfg.Interactive(cfg.GuessNumber(max_guesses=9), 8),
     'GuessNumber.max_guesses = 9 needs as many turns'),
    (lambda: cfg.Data(**DATA, validation_glob='a'), 'goes with a source of files'),
    (lambda: cfg.Demonstrations(cfg.JudgePairs(cfg.Preferences('a'))), 'have no such work in them'),
    (lambda: cfg.Problems(cfg.JudgePairs(cfg.ResultPreferences(cfg.Arithmetic(4), 0.1))),
     'both_wrong = 0.1 has pairs without a right result, which Problems.source cannot'),
    (lambda: cfg.Data(**DATA | {'source': cfg.ResultPreferences(cfg.Arithmetic(4), 0.1)}),
     'which Data.source cannot learn from'),
    *((lambda verifier=verifier: cfg.RL('a', cfg.Problems(cfg.JudgePairs(cfg.Preferences('a'))),
                                        verifier), 'does not read the verdicts')
      for verifier in (cfg.AnswerMatch(), cfg.JudgeVerifier(cfg.MarkedVerdict()))),
    (lambda: judged({'tournament': cfg.Tournament(budget=6)}), 'only from 7 on'),
    (lambda: judged({'tournament': cfg.Tournament(votes=3, budget=20)}),
     'with 3 votes a comparison'),
    (lambda: judged({}, algorithm=cfg.Algorithm(shaping=cfg.Kimi())), 'shaping = @cfg.Kimi() asks'),
    (lambda: judged({}, rollouts=cfg.Rollouts(selection=cfg.DynamicSampling())),
     'Rollouts.selection = @cfg.DynamicSampling() asks'),
    (lambda: mixed(cfg.PythonStdlib(), cfg.Jsonl('a'), weights=(0.333333, 0.666666001)),
     'a sum of at most 100000'),
    (lambda: cfg.Train(4, batch_size=6, accumulation=4), 'Train.batch_size = 6 is not a multiple'),
    (lambda: cfg.Run(**{**RUN, 'objective': cfg.NextToken(0.5)}), "Quant.weights = 'ternary'"),
    *((lambda loss=loss, smoothing=smoothing: cfg.DPO('a', loss, 0.1, smoothing),
       "'robust' needs one above 0") for loss, smoothing in (('robust', 0.0), ('ipo', 0.1))),
    *((lambda objective=objective, data=data: cfg.Run(**{
        **RUN, 'objective': objective, 'data': cfg.Data(**{**DATA, **data})}), expected)
      for objective, data, expected in (
          (cfg.NextToken(), {'source': cfg.Conversations('a')}, 'learns from documents: choose'),
          (cfg.SFT(''), {'long_documents': 'cut'}, 'learns from conversations: choose'),
          (cfg.DPO('a'), {'source': cfg.Conversations('a')}, 'learns from preferences: choose'),
          (cfg.NextToken(), {'source': mixed(cfg.PythonStdlib(), cfg.Conversations('a'))},
           'learns from documents: choose'),
          (cfg.RPT('a', cfg.Rollouts(4)), {'source': mixed(cfg.PythonStdlib())},
           'draws positions of documents'),
          (cfg.SFT(''), {'source': cfg.Conversations('a')}, 'would part an answer from its prompt'),
          (cfg.SFT('a'), {'source': cfg.Conversations('a')}, 'set it to @cfg.PolicyTokenizer()'),
          (cfg.SFT(''), {'source': cfg.Conversations('a'), 'tokenizer': cfg.PolicyTokenizer()},
           'SFT starts from no policy that would have one'))),
    (lambda: cfg.Algorithm(epochs=2), 'choose a surrogate with a ratio'),
    (lambda: cfg.HybridModes('a', 'a'), 'another text than HybridModes.think'),
    (lambda: cfg.HybridAccuracy(cfg.Run(**RUN)), 'give the file of a run of @cfg.RL() too'),
    (lambda: cfg.HybridAccuracy(cfg.Run(**{**RUN, 'objective': RL, 'train': cfg.Train(4)})),
     'compares modes of responses: choose @cfg.HybridModes'),
    (lambda: cfg.HybridConversations('a', 'b', no_think='b'), 'another text than Hybrid'),
    (lambda: cfg.HybridModes('a', 'b', think_end='b'), "another text than those of the modes'"),
    (lambda: cfg.Rollouts(group_size=3, response_tokens=2, modes=HYBRID), 'choose an even'),
    (lambda: cfg.Rollouts(modes=cfg.HybridModes()), 'room for the token of a mode alone'),
    *((lambda sampler=sampler: cfg.Rollouts(response_tokens=2, modes=HYBRID, sampler=sampler),
       'may leave a mode no probability')
      for sampler in (cfg.Sampler(top_k=4), cfg.Sampler(top_p=0.9), cfg.Sampler(min_p=0.1))),
    (lambda: cfg.RPT('a', cfg.Rollouts(response_tokens=2, modes=HYBRID)), 'is no prediction'),
    *((lambda modes=modes, settings=settings: cfg.RL(
        'a', cfg.Problems(cfg.Arithmetic(9)), cfg.AnswerMatch(),
        rollouts=cfg.Rollouts(response_tokens=2, modes=modes),
        algorithm=cfg.Algorithm(**settings)), expected) for modes, settings, expected in (
            (cfg.SingleMode(), {'aggregation': cfg.DecoupledModes()}, 'weighs the token of a mode'),
            (cfg.SingleMode(), {'advantage': cfg.HGPO()}, 'choose Rollouts.modes = @cfg.Hybrid'),
            (cfg.HybridModes(forced=False), {'advantage': cfg.HGPO()}, 'forced = True'),
            (HYBRID, {'advantage': cfg.Thinkless()}, 'set HybridModes.forced = False'),
            (HYBRID, {'advantage': cfg.AdaptThink()}, 'choose a surrogate that has one'))),
    (lambda: cfg.RL('a', cfg.Problems(cfg.Arithmetic(9)), cfg.Interactive(cfg.GuessNumber()),
                    rollouts=cfg.Rollouts(response_tokens=2, modes=HYBRID)),
     'has no modes of responses'),
    *((lambda mode=mode: cfg.Rollouts(mode=mode, selection=cfg.DynamicSampling()),
       f'{type(mode).__name__}() cannot foresee: choose @cfg.OnPolicy()')
      for mode in (cfg.OneStepOff(), cfg.InFlight())),
    (lambda: cfg.Rollouts(mode=cfg.InFlight(), sparse=cfg.ReSA()), 'draws by dense attention'),
    (lambda: cfg.RPT('a', cfg.Rollouts(num_prompts=8, mode=cfg.InFlight()),
                     cfg.Algorithm(correction=cfg.TokenTIS()), positions_per_document=4),
     'shares documents within a batch'),
    (lambda: cfg.KLInLoss(0.1, 'k1'), 'expected gradient of zero'),
    (lambda: cfg.Traveler(start_low=5, start_high=4), 'start_high = 4: expected a whole'),
    (lambda: cfg.DiT(**{**DIT, 'num_heads': 3}), 'none of DiT.num_heads = 3'),
    (lambda: cfg.DiT(**DIT, quant=cfg.Quant('ternary_128')), "choose 'ternary' for a DiT"),
    (lambda: cfg.Diffusion(cfg.Shortcut(), windows=1), 'set Diffusion.windows to at least 2'),
    *((lambda fields=fields: cfg.Run(**{**WORLD_RUN, **fields}), expected) for fields, expected in (
        ({'model': RUN['model']}, 'choose Run.model = @cfg.DiT()'),
        ({'data': RUN['data']}, 'choose Run.data = @cfg.Trajectories()'),
        ({'objective': cfg.NextToken()}, 'choose Run.model = @cfg.Model()'),
        ({'objective': cfg.NextToken(), 'model': RUN['model']}, 'choose Run.data = @cfg.Data()'),
        ({'train': cfg.Train(4)}, 'Train.batch_size = 0: expected'),
        ({'train': cfg.Train(4, 2, eval_batches=0)}, 'there is no end of episodes'),
        ({'train': cfg.Train(4, 2, group_parts=2)}, 'Train.group_parts = 2 is not read by'),
        ({'compute': cfg.Compute(loss_chunk=8)}, 'Compute.loss_chunk = 8 is not read by'),
        ({'mesh': cfg.Mesh(context=2)}, 'Mesh.context = 2 is not read by'),
        ({'model': cfg.DiT(**DIT, step_sizes=3)}, 'tells the model of no step size'),
        ({'model': cfg.DiT(**DIT, space=cfg.VAE())}, "but Diffusion.vae_from = ''"),
        ({'objective': cfg.Diffusion(vae_from='a')}, "but Diffusion.vae_from = 'a'"),
        ({'objective': cfg.Autoencoding()}, 'choose Run.model = @cfg.VAE()'),
        ({'model': cfg.DiT(**DIT, past=cfg.Recurrent(), step_sizes=3),
          'objective': cfg.Diffusion(cfg.Shortcut())}, 'needs DiT.past = @cfg.FrameHistory()'),
        *(({'model': cfg.DiT(**DIT, step_sizes=sizes),
            'objective': cfg.Diffusion(cfg.Shortcut(), sampling_steps=steps)},
           f'DiT.step_sizes = {sizes} does not go with Diffusion.sampling_steps = {steps}')
          for sizes, steps in ((1, 1), (3, 3), (3, 8))))),
    (lambda: cfg.InsideModel('a', cfg.MaaG('true')), "MaaG.events = 'true' asks the true game"),
    (lambda: cfg.GameRL(group_size=1), '@cfg.OPO() compares games in the same world'),
    *((lambda part=part: cfg.GameRL(algorithm=cfg.Algorithm(**part)), expected)
      for part, expected in (
          ({'advantage': cfg.HGPO()}, 'actions of a game have none'),
          ({'aggregation': cfg.DecoupledModes()}, 'weighs the token of a mode'),
          ({'correction': cfg.TokenTIS()}, 'leave it at @cfg.NoCorrection()'),
          ({'kl': cfg.KLInLoss(0.1)}, 'there is no reference policy; leave it at @cfg.NoKL()'),
          ({'shaping': cfg.Kimi()}, 'are of one length; leave it at @cfg.NoShaping()'))),
    *((lambda fields=fields: cfg.Run(**{**GAME_RUN, **fields}), expected) for fields, expected in (
        ({'model': RUN['model']}, 'choose Run.model = @cfg.GamePolicy()'),
        ({'model': cfg.DiT(**DIT)}, 'choose Run.model = @cfg.GamePolicy()'),
        ({'data': RUN['data']}, 'choose Run.data = @cfg.Trajectories()'),
        ({'objective': cfg.NextToken()}, 'choose Run.model = @cfg.Model()'),
        ({'train': cfg.Train(4)}, 'Train.batch_size = 0: expected'),
        ({'train': cfg.Train(4, 2, eval_batches=3)}, 'GameRL.eval_games says how many'),
        ({'train': cfg.Train(4, 2, group_parts=2)}, 'Train.group_parts = 2 is not read by GameRL'),
        ({'data': cfg.Trajectories(cfg.Traveler(), 'wander')}, "Trajectories.policy = 'wander'"),
        ({'data': cfg.Trajectories(cfg.Traveler(), size=9)}, 'eval_games = 64 is more than the 9'),
        ({'objective': cfg.GameRL(algorithm=cfg.Algorithm(surrogate=cfg.PPOClip(), minibatches=3))},
         'Train.batch_size = 2 worlds are no multiple of'),
        ({'train': cfg.Train(2**30, 2), 'objective': cfg.GameRL(
            algorithm=cfg.Algorithm(surrogate=cfg.PPOClip(), epochs=2))}, '32 bits count'))),
    (lambda: cfg.Pong(winning_score=5), 'start_high = 20: expected a whole number from 0 to 4'),
    (lambda: _evaluation(at_frame=50), 'comes after the last frame, 49'),
    (lambda: _evaluation(edit=cfg.PaintCells(49)), 'leaves no frame in which the change could'),
    (lambda: _evaluation(episodes=2 * 10**4, batch_size=8), 'more than the 1000'),
    (lambda: _evaluation(shuffled_map=True, episodes=1), 'needs a neighbour'),
    (lambda: _evaluation(pixel_noise=0.1), 'for models that have learned nothing'),
    (lambda: cfg.Trajectories(cfg.PacMan(), 'follow'), "choose 'mixed', 'random', 'forage'"),
    (lambda: cfg.Engine(num_pages=9), 'set it to at least 193'),
    (lambda: cfg.Slots(num_pages=9), 'needs all pages: set Slots.slots too'),
    (lambda: cfg.RPT('a', cfg.Rollouts(num_prompts=8), positions_per_document=3),
     'positions_per_document = 3 does not divide'),
    (lambda: cfg.RPT('a', cfg.Rollouts(num_prompts=8), positions_per_document=4,
                     algorithm=cfg.Algorithm(surrogate=cfg.PPOClip(), minibatches=2)),
     'keeps prompts together'),
    (lambda: cfg.RPT('a', cfg.Rollouts(group_size=1)), 'OPO compares the responses of a group'),
    (lambda: cfg.RPT('a', cfg.Rollouts(), cfg.Algorithm(surrogate=cfg.PPOClip(), minibatches=3)),
     'Algorithm.minibatches = 3 does not divide'),
    (lambda: cfg.Run(**{**RUN, 'objective': cfg.RPT('a', cfg.Rollouts(num_prompts=3)),
                        'train': cfg.Train(4, batch_size=2, accumulation=2)}),
     'Train.accumulation = 2 does not divide the 3 rows'),
    (lambda: cfg.Run(**{**RUN, 'objective': cfg.RPT('a', cfg.Rollouts(group_size=6)),
                        'train': cfg.Train(4, batch_size=2, group_parts=4)}),
     'Train.group_parts = 4 does not divide Rollouts.group_size = 6'),
    (lambda: cfg.Run(**{**RUN, 'train': cfg.Train(4, batch_size=2, group_parts=2)}),
     'Train.group_parts = 2 is not read by NextToken'),
    *((lambda mode=mode: cfg.RPT('a', cfg.Rollouts(mode=mode)), 'choose an Algorithm.correction')
      for mode in (cfg.OneStepOff(), cfg.InFlight())),
    (lambda: cfg.RPT('a', cfg.Rollouts(sparse=cfg.ReSA())), 'or ReSA.replay = True'),
    *((lambda other=other: cfg.RPT('a', cfg.Rollouts(sparse=cfg.ReSA(replay=True), **other),
                                   cfg.Algorithm(correction=cfg.TokenTIS())),
       'needs Rollouts.mode = @cfg.OnPolicy() and Rollouts.dump_every = 0')
      for other in ({'mode': cfg.OneStepOff()}, {'dump_every': 1})),
    *((lambda sampler=sampler: cfg.RPT('a', cfg.Rollouts(sampler=sampler)),
       'leaves the likeliest token alone')
      for sampler in (cfg.Sampler(0), cfg.Sampler(top_k=1), cfg.Sampler(min_p=1.0))),
    (lambda: cfg.Rollouts(2**14, 2**10, response_tokens=2**8), 'would take 16 GiB'),
    (lambda: cfg.Run(**{**RUN, 'train': cfg.Train(4, batch_size=2**24),
                        'data': cfg.Data(**{**DATA, 'seq_len': 2**10})}), 'would take 64 GiB'),
    (lambda: cfg.Run(**{**RUN, 'train': cfg.Train(2**30), 'objective': dataclasses.replace(
        RL, algorithm=cfg.Algorithm(surrogate=cfg.PPOClip(), epochs=2))}), '32 bits count'),
    (lambda: cfg.Run(**{**RUN, 'train': cfg.Train(4)}), 'Train.batch_size = 0: expected'),
    *((lambda fields=fields: cfg.Run(**{**RUN, **fields}), f'{name} is not read by')
      for name, fields in (
          ('Train.batch_size = 2', {'objective': RL}),
          ('Train.eval_batches = 3', {'objective': RL, 'train': cfg.Train(4, eval_batches=3)}),
          ('Train.eval_batches = 3',
           {'objective': cfg.RPT('a'), 'train': cfg.Train(4, 2, eval_batches=3)}),
          ('Data.num_workers = 1', {'objective': RL, 'train': cfg.Train(4),
                                    'data': cfg.Data(**DATA, num_workers=1)}),
          ('RL.pool = VerifierPool(num_workers=7, cpu_seconds=5.0, wall_seconds=30.0, '
           'memory_mib=2048)',
           {'objective': dataclasses.replace(RL, pool=cfg.VerifierPool(7)),
            'train': cfg.Train(4)}))),
])
def test_refused_together(make, expected):
  with pytest.raises(UserError) as caught:
    make()
  assert expected in str(caught.value)


def test_lists_become_tuples():
  assert cfg.RPT('a', difficulty=[0.5, 1, 2]).difficulty == (0.5, 1, 2)


def test_model_at_switches_to_int4_at_its_fraction():
  model = cfg.Model(**MODEL, quant=cfg.Quant('ternary', 'int8', hadamard=True))
  run = cfg.Run(**{**RUN, 'model': model, 'objective': cfg.NextToken(0.75)})
  assert [cfg.model_at(run, step).quant.activations for step in range(5)] == [
      'int8', 'int8', 'int8', 'int4', 'int4']
  assert cfg.model_at(run, 4).quant.hadamard
  never = cfg.Run(**{**RUN, 'model': model})
  assert cfg.model_at(never, 4) is model


@pytest.mark.parametrize('fields, named', [
    ({'prediction': cfg.Direct()}, 'RPT.prediction = @cfg.Reason()'),
    ({'rollouts': cfg.Rollouts(mode=cfg.OneStepOff())}, 'Rollouts.mode = @cfg.OnPolicy()'),
    ({'rollouts': cfg.Rollouts(selection=cfg.DynamicSampling())},
     'Rollouts.selection = @cfg.AllGroups()'),
    ({'positions_per_document': 2}, 'RPT.positions_per_document = 1'),
    ({'rollouts': cfg.Rollouts(dump_every=5)}, 'Rollouts.dump_every = 0')])
def test_information_gain_says_what_it_does_not_go_with(fields, named):
  given = {'prediction': cfg.Reason(), 'reward': cfg.InformationGain(), **fields}
  with pytest.raises(UserError, match=re.escape(named)):
    cfg.RPT('runs/x', **given)
