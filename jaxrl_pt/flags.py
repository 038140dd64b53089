"""The flags of every command. This module imports little, so that `--help` answers at once."""

import argparse
from collections.abc import Callable

from jaxrl_pt.flag_types import (
  SEED,
  Parser,
  add_checkpoint,
  add_files,
  add_gin,
  add_json,
  add_switches,
  add_workdir,
  at_least,
  glob,
  path,
  text,
)
from jaxrl_pt.game_flags import add_page, add_trajectories
from jaxrl_pt.spatial_flags import add_spatial

DESCRIPTION = 'Pretrain ternary transformers and reinforce them, on a laptop or a TPU pod.'
_RUN = 'gin/run/pretrain_tiny.gin'


def make_parser() -> argparse.ArgumentParser:
  """The parser of all commands; a wrong flag raises UserError."""
  debug = Parser(add_help=False)
  debug.add_argument('--debug', action='store_true',
                     help='show the full traceback of a mistake')
  parser = Parser(prog='jaxrl-pt', description=DESCRIPTION, allow_abbrev=False)
  commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

  def add(name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=summary, description=summary, epilog=f'example:\n  {example}',
        parents=[debug], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)

  quickstart = add('quickstart', 'The main job on real text, offline, in a few minutes.',
                   "jaxrl-pt quickstart --data 'books/*.txt'")
  add_workdir(quickstart, 'runs/quickstart')
  quickstart.add_argument('--data', type=glob, metavar='GLOB',
                          help='UTF-8 text files to learn; without it '
                          "the standard library's own text")

  train = add('train', 'Train what a gin file describes; run again to resume.',
              f'jaxrl-pt train --gin_file {_RUN} --workdir runs/pretrain_tiny \\\n'
              '    --gin_bindings "cfg.Train.num_steps = 100"')
  train.description = (
      f'{train.description} SIGTERM, SIGHUP (a dropped connection) and Ctrl-C let the step in hand '
      'finish, save and exit with code 75: not finished, run it again. Code 0 is a finished run, '
      '2 a mistake, said in one sentence. One host\'s signal stops all.')
  add_gin(train)
  add_workdir(train)
  train.add_argument('--start_from', type=path, metavar='DIR', help='the work directory of the '
                     "policy to start from, whose model's shape and tokenizer the run takes")
  train.add_argument('--multihost', action='store_true', help='join the other hosts of a TPU '
                     'slice before training (run the same command on each)')
  train.add_argument('--allow_changes', nargs='*', metavar='FIELD', help='settings that may differ '
                     'from those of the checkpoint resumed from although they change its numbers, '
                     'e.g. Cosine.peak_rate; without a name whichever do')

  _add_frontends(add)
  _add_evaluation(add)
  score = add('score', 'The reward that a reward model gives each text, as JSON lines.',
              "jaxrl-pt score --workdir runs/reward_model_tiny 'answers.jsonl'")
  score.description = (f'{score.description} A row has a prompt and a completion, as in '
                       'fine-tuning.')
  add_checkpoint(score)
  score.add_argument('rows', type=glob, metavar='GLOB', help='JSON-lines files')

  _add_judge(add)
  _add_answers(add)
  _add_rl_commands(add)
  add_trajectories(add)
  add_spatial(add)
  _add_tpu_commands(add)
  _add_exchange(add)
  doctor = add('doctor', 'What this machine offers, and a self-check of ten seconds.',
               'jaxrl-pt doctor --json')
  add_workdir(doctor, '.')
  add_json(doctor)
  return parser


def _add_judge(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
  judge = add('judge', 'Which of two responses is better, or which of many, by a model as judge.',
              'jaxrl-pt judge --workdir runs/rrm_tiny pairs.jsonl --votes 5 --swap')
  judge.description = (
      f'{judge.description} Rows with prompt, chosen, rejected and perhaps subset give the '
      'accuracy of each subset; rows with prompt and candidates get the best of them.')
  add_checkpoint(judge)
  judge.add_argument('rows', type=glob, metavar='GLOB', help='JSON-lines files')
  judge.add_argument('--votes', type=at_least(1), metavar='K', help='verdicts of a comparison '
                     '(default 1, or what --budget pays for)')
  add_switches(judge, ('swap', 'ask in both orders, and say how often they agree'),
                ('direct', 'begin responses with the verdict, without reasoning'),
                ('soft', 'count shares of votes in a round robin, not majorities'))
  judge.add_argument('--unparsed', choices=('wrong', 'half'), default='wrong', help='what a pair '
                     'without a verdict scores (default %(default)s)')
  judge.add_argument('--tournament', choices=('knockout', 'round_robin'), default='knockout',
                     help='of candidates (default %(default)s)')
  judge.add_argument('--ties', choices=('coin', 'first', 'half'), help='whose a comparison without '
                     'a majority is (default coin, in a round robin half)')
  add_files(judge, ('output', 'the rows go, with verdicts'),
             ('pairs', 'the best of each row of candidates goes, preferred to the worst'))
  _add_counts(judge, ('budget', 0, 0, 'the most verdicts of a row of candidates; 0 for no bound'),
              ('prompt_len', 1, 8192, 'most tokens of a prompt; a longer one gets no verdict'),
              ('slots', 1, 64, 'responses decoded at once'))
  _add_sampling(judge, num_tokens=2048)
  _add_storage(judge)
  add_gin(judge, "how a comparison is shown, cfg.JudgePrompt (default the model's own)")
  add_json(judge)


def _add_answers(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
  answers = add('answers', "Preference pairs of sampled, verified answers to a run's problems.",
                'jaxrl-pt answers --workdir runs/opo_tiny --pairs pairs.jsonl')
  add_checkpoint(answers)
  add_gin(answers, 'the run whose problems and verifier are meant (default that of --workdir)')
  add_files(answers, ('pairs', 'pairs of a right and a wrong answer go'),
             ('candidates', 'all answers go, as `judge` reads them'))
  add_switches(answers, ('held_out', 'ask what the run holds out, not what it trains on'))
  _add_counts(answers, ('num_samples', 1, 8, 'answers to each problem'),
              ('most_pairs', 1, 1, 'the most pairs of a problem'),
              ('limit', 0, 0, 'only the first problems; 0 for all'),
              ('slots', 1, 64, 'answers decoded at once'))
  _add_drawing(answers)


def _add_rl_commands(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
  add('methods', 'The methods of reinforcement learning: equation, paper, gin file, experiment.',
      'jaxrl-pt methods')
  play = add('play', 'Play an environment at the terminal, as a policy would, or a game inside its '
             'model in a browser.',
             'jaxrl-pt play --environment guess_number --prompt "game 7"\n'
             '  jaxrl-pt play --workdir runs/maag_tiny --port 8000')
  play.description = (
      f'{play.description} A line is a text; one that ends with \\ goes on in the next. Ends with '
      '1 if the episode was not played to its end, or the environment failed.')
  play.add_argument('--environment', type=text, metavar='NAME', help='a shipped one, '
                    'gin/environment/NAME.gin: calculator, guess_number, python or text_arena')
  add_gin(play, 'the settings of cfg.Interactive, or of cfg.MaaG')
  play.add_argument('--prompt', type=text, default='', help='the problem, e.g. a question')
  play.add_argument('--reference', type=text, default='', help='the reference answer')
  add_json(play)
  add_page(play)
  replay = add('replay', 'One half of an RL step alone: learn from kept rollouts, or only draw.',
               'jaxrl-pt replay --workdir runs/opo_tiny --only learner --step 10')
  add_checkpoint(replay)
  replay.add_argument('--only', choices=('learner', 'sampler'), required=True,
                      help='learner: from the rollouts that Rollouts.dump_every = 1 has kept; '
                      'sampler: the batch after the checkpoint')
  add_json(replay)


def _add_evaluation(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
  evaluate = add('eval', "A trained model's loss, bits per byte and accuracy on held-out text, or "
                 "lm-eval's tasks, the Hybrid Accuracy of a policy with modes, or whether a model "
                 'of a game stays true.',
                 'jaxrl-pt eval --workdir runs/qwen --include_path my_tasks --tasks sums \\\n'
                 '    --num_fewshot 5 --limit 200 --output results.json\n'
                 '  jaxrl-pt eval --workdir runs/hgpo_tiny --gin_file gin/eval/hybrid.gin\n'
                 '  jaxrl-pt eval --workdir runs/maag_tiny --gin_file gin/eval/maag.gin')
  evaluate.description = (
      f'{evaluate.description} Tasks read files of this machine and fetch nothing; of the Python '
      "functions that a task names only lm-eval's own are run.")
  add_checkpoint(evaluate)
  add_gin(evaluate, "other data than the run's own, or what else is measured")
  add_json(evaluate)
  tasks = evaluate.add_argument_group('tasks of lm-eval')
  tasks.add_argument('--tasks', type=text, metavar='A,B', help='tasks, groups or tags of lm-eval '
                     'or of --include_path')
  tasks.add_argument('--include_path', type=path, metavar='DIR',
                     help='a folder with YAML files of tasks')
  tasks.add_argument('--limit', type=at_least(1), metavar='N',
                     help='only the first N documents of each task')
  tasks.add_argument('--num_fewshot', type=at_least(0), metavar='K',
                     help="solved examples in each prompt (default the task's own)")
  tasks.add_argument('--output', type=path, metavar='FILE', help='where the results go as JSON, '
                     'with this command and the versions of the libraries')
  tasks.add_argument('--max_length', type=at_least(2), metavar='TOKENS', help='most tokens that '
                     'the model reads at once (default what it was made for)')
  tasks.add_argument('--batch_size', type=at_least(1), default=16, metavar='B', help='texts that '
                     'go through the model at once (default %(default)s)')
  tasks.add_argument('--add_bos_token', choices=('true', 'false'), help='whether texts begin with '
                     'the token that begins a document (default as it was trained)')
  tasks.add_argument('--apply_chat_template', action='store_true',
                     help="put prompts into the model's chat template")
  tasks.add_argument('--template', type=path, metavar='FILE', help='another chat template, in '
                     'Jinja2')
  tasks.add_argument('--seed', type=SEED, default=0,
                     help='of the noise where a task samples (default %(default)s)')


def _add_tpu_commands(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
  preflight = add('preflight', 'Compile a run for a TPU slice, without one: does it fit, what '
                  'bounds it?',
                  'jaxrl-pt preflight --gin_file gin/run/pretrain_2b4t.gin \\\n'
                  '    --gin_file gin/cluster/v5e_256.gin --topology v5e:16x16')
  add_gin(preflight)
  preflight.add_argument('--topology', required=True, metavar='NAME',
                         help='e.g. v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:16x16 or tpu7x:4x4x4')
  preflight.add_argument('--slices', type=at_least(1), default=1, metavar='N',
                         help='how many such slices, joined by the network of the data centre '
                         '(default %(default)s)')
  preflight.add_argument('--no_search', action='store_true',
                         help='do not look for settings that fit when the run does not')
  preflight.add_argument('--find_slots', action='store_true',
                         help='look for the largest number of slots of the sampler '
                         '(Rollouts.slots) that fits')
  add_json(preflight)

  kernels = add('kernels', 'What the TPU compiler makes of each Pallas kernel: a static report.',
                'jaxrl-pt kernels --topology v5e:2x2 --kernel ternary_matmul')
  kernels.add_argument('--topology', required=True, metavar='NAME',
                       help='e.g. v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2 or tpu7x:2x2x1')
  kernels.add_argument('--kernel', action='append', default=[], metavar='NAME',
                       help='one kernel instead of all; may be repeated')
  kernels.add_argument('--only', default='', metavar='REGEX',
                       help='only the cases whose name matches, e.g. "int4 2048x"')
  kernels.add_argument('--keep', type=path, metavar='DIR',
                       help="keep the compiler's raw schedules here")
  add_json(kernels)


def _add_exchange(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
  taken = add('import', 'Make a work directory of a Hugging Face folder.',
              'jaxrl-pt import models/Qwen2.5-0.5B --workdir runs/qwen')
  taken.description = (
      f'{taken.description} Llama, Mistral, Qwen2, Qwen3 and BitNet models in safetensors; what '
      'would be computed wrongly is refused by name. The work directory is then whole, and '
      'absent if the import fails.')
  taken.add_argument('source', type=path, metavar='SRC',
                     help='a folder with config.json, safetensors and the tokenizer')
  taken.add_argument('--adapter', type=path, metavar='DIR', help='a folder of PEFT with low-rank '
                     'adapters of the model, which the work directory then has beside it')
  add_workdir(taken)
  given = add('export', "Write a work directory's model for Hugging Face or llama.cpp.",
              'jaxrl-pt export --workdir runs/qwen exported/qwen --verify')
  add_checkpoint(given)
  given.add_argument('destination', type=path, metavar='DST',
                     help='the folder or the file, which must not exist yet')
  given.add_argument('--format', choices=('hf', 'hf-packed', 'gguf', 'gguf-tq1', 'peft'),
                     default='hf', help='hf-packed: ternary weights in 2 bits; gguf: a file '
                     'for llama.cpp, with ternary weights as TQ2_0, or as TQ1_0 if gguf-tq1; peft: '
                     'low-rank adapters alone, which the others merge (default %(default)s)')
  given.add_argument('--verify', action='store_true', help='load what was written with the library '
                     'transformers or gguf, and compare logits, before it gets its name')


def _add_counts(parser: argparse.ArgumentParser, *counts: tuple[str, int, int, str]) -> None:
  for name, low, default, about in counts:
    parser.add_argument(f'--{name}', type=at_least(low), default=default,
                        help=f'{about} (default %(default)s)')


def _add_frontends(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
  sample = add('sample', 'Continue prompts with a trained model.',
               'jaxrl-pt sample --workdir runs/pretrain_tiny --prompt "def main(" --num_samples 2\n'
               '  jaxrl-pt sample --workdir runs/hgpo_tiny --prompt 7402: --thinking on \\\n'
               '    --thinking_budget 12')
  add_checkpoint(sample)
  sample.add_argument('--prompt', action='append', type=text,
                      help='text to continue; may be repeated; without it standard input is '
                      'the prompt, or each line typed at a terminal')
  sample.add_argument('--prompt_file', type=path, metavar='FILE', help='one prompt a line; of a '
                      '.jsonl file, each line\'s "prompt"')
  _add_sampling(sample, num_tokens=64)
  sample.add_argument('--num_samples', type=at_least(1), default=1,
                      help='samples of each prompt (default %(default)s)')
  sample.add_argument('--stop', action='append', default=[], type=text, metavar='TEXT',
                      help='ends a sample and is left out of it; may be repeated')
  _add_thinking(sample)
  _add_markers(sample)
  _add_storage(sample)
  _add_resa(sample)
  add_json(sample)

  chat = add('chat', 'Talk with a trained model at the terminal.',
             'jaxrl-pt chat --workdir runs/qwen --thinking on --thinking_budget 200\n'
             '  jaxrl-pt chat --workdir runs/pretrain_tiny --temperature 0.7 --max_thought 200')
  add_checkpoint(chat)
  _add_sampling(chat, num_tokens=512)
  chat.add_argument('--system', default='', type=text, metavar='TEXT',
                    help='what stands before all turns')
  _add_thinking(chat)
  chat.add_argument('--max_thought', type=at_least(0), help='make any model think first, whether '
                    'it has learned that or not, for at most that many tokens')
  chat.add_argument('--max_answer', type=at_least(1), help='most tokens after a thought')
  _add_storage(chat)
  _add_chat_format(chat)

  serve = add('serve', "A small HTTP server with OpenAI's completions and chat completions.",
              'jaxrl-pt serve --workdir runs/pretrain_tiny --port 8000')
  add_checkpoint(serve)
  serve.add_argument('--host', default='127.0.0.1', help='where to listen (default %(default)s); '
                     'any but a loopback address needs a token')
  serve.add_argument('--port', type=at_least(0), default=8000,
                     help='0 takes a free one (default %(default)s)')
  serve.add_argument('--token_file', type=path, metavar='FILE', help='holds the token that '
                     'clients send as API key; or set JAXRL_PT_TOKEN')
  _add_counts(serve, ('slots', 1, 32, 'responses decoded at once'),
              ('queue', 1, 256, 'responses waiting or under way at most; more get 429'),
              ('response_len', 1, 1024, 'most tokens of a response'),
              ('max_samples', 1, 16, 'most responses to one prompt'))
  _add_storage(serve)
  serve.add_argument('--seed', type=SEED, default=0, help='seed of the noise, together '
                     "with a request's own seed (default %(default)s)")
  serve.add_argument('--access_log', action='store_true',
                     help='write one line a request to standard error')
  _add_chat_format(serve)


def _add_storage(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--kv', choices=('model', 'int8', 'int4', 'int3'), default='model',
                      help="how keys and values are kept: in the model's type, or in 8, 4 or 3 "
                      'bits (default %(default)s)')
  parser.add_argument('--head', choices=('model', 'int8', 'int4'), default='model',
                      help="how embedding and head are held: in the model's type, or in 8 or 4 "
                      'bits (default %(default)s)')
  parser.add_argument('--packed', action='store_true',
                      help='hold ternary weights packed, in two bits each, on one device')


def _add_resa(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--resa', action='store_true', help='rectified sparse decoding, e.g. --resa '
                      '--resa_share 0.1 --resa_every 32: a step reads a part of the cache')
  # These flags have no defaults, so that one sees which of them were given.
  parser.add_argument('--resa_block', type=at_least(1), metavar='TOKENS',
                      help='tokens of a block (default 16)')
  parser.add_argument('--resa_share', type=float, metavar='SHARE', help='share of the blocks that '
                      'a step reads; 1 is dense (default 0.1)')
  parser.add_argument('--resa_every', type=at_least(1), metavar='TOKENS', help='tokens between '
                      'two rectifications (default 32)')
  parser.add_argument('--resa_drafts', type=at_least(1), metavar='TOKENS',
                      help='tokens that sparse attention drafts before a dense pass checks them: '
                      'the texts of dense decoding, in fewer dense steps')
  parser.add_argument('--lookup_drafts', type=at_least(1), metavar='TOKENS',
                      help='tokens that are looked up in the text so far before a dense pass '
                      'checks them: the texts of dense decoding, in fewer steps where texts repeat')


def _add_chat_format(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--prompt_len', type=at_least(1), default=1024,
                      help='most tokens of a prompt (default %(default)s)')
  parser.add_argument('--template', type=path, metavar='FILE', help='how turns become text: a '
                      'chat template in Jinja2 (default the model\'s own, or plain text)')
  _add_markers(parser)


def _add_thinking(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--thinking', choices=('auto', 'on', 'off'), default='auto',
                      help='whether to think first: as the model likes, always or never '
                      '(default %(default)s)')
  parser.add_argument('--thinking_budget', type=at_least(0), metavar='TOKENS',
                      help='most tokens of a thought, after which its end is forced')


def _add_markers(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--markers', nargs=2, type=text, metavar=('START', 'END'),
                      help="what encloses thinking (default that of the run's modes, or <think> "
                      '</think>)')
  parser.add_argument('--no_think', type=text, metavar='TEXT',
                      help='what begins an answer without thinking, in one token, where the policy '
                      "has modes (default the run's own)")


def _add_sampling(parser: argparse.ArgumentParser, num_tokens: int) -> None:
  parser.add_argument('--num_tokens', type=at_least(1), default=num_tokens,
                      help='most tokens of a response (default %(default)s)')
  _add_drawing(parser)


def _add_drawing(parser: argparse.ArgumentParser) -> None:
  # An imported model's generation_config.json may have defaults of its own.
  parser.add_argument('--temperature', type=float,
                      help="0 is greedy (default the model's own, or 1)")
  parser.add_argument('--top_k', type=at_least(0),
                      help="0 keeps all (default the model's own, or 0)")
  parser.add_argument('--top_p', type=float, help="1 keeps all (default the model's own, or 1)")
  parser.add_argument('--min_p', type=float, help='drops tokens less likely than this times the '
                      "likeliest (default the model's own, or 0)")
  parser.add_argument('--seed', type=SEED, default=0,
                      help='equal seeds draw equal responses (default %(default)s)')
