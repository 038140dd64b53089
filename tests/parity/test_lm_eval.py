"""lm-eval's results through our adapter against those through its own one for transformers."""

import json

import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytest.importorskip('lm_eval', reason='needs lm-eval (the eval extra)')

from lm_eval import evaluator, utils  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from jaxrl_pt import exchange  # noqa: E402
from jaxrl_pt.evaluation import benchmark  # noqa: E402
from tests.evaluation.local_tasks import tokenizer_of  # noqa: E402

pytestmark = pytest.mark.parity

TEXT = ('A pale horse stood by the river and watched the boats go down to the sea. ',
        'Nobody asked the miller why the wheel had stopped, since everybody knew. ',
        'In winter the road over the pass is closed, and letters wait for spring. ')
TASKS = {
    'choices': '''
output_type: multiple_choice
fewshot_split: test
num_fewshot: 2
doc_to_text: "{{question}}  "
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
''',
    'rolling': '''
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
''',
    'texts': '''
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: first
generation_kwargs: {until: ["e", "th", "a stop text that is longer than the engine takes"],
                    max_gen_toks: 12}
metric_list: [{metric: exact_match}, {metric: chrf}]
'''}


# One writes the token that begins a text and strips what is said; the other does neither, but opens
# a turn with a thought.
TEMPLATES = {
    'begins': '{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}'
              '{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}',
    'without': '{% for m in messages %}{{ m.role + "\n" + m.content + "</s>\n" }}{% endfor %}'
               '{% if add_generation_prompt %}{{ "assistant\n<think>\n" }}{% endif %}'}
# What a conversation changes: a description is the system's, examples are turns, and an answer may
# be begun for the assistant.
CHATS = {
    'choices': TASKS['choices'] + 'description: "Choose well. "\n',
    'texts': TASKS['texts'],
    'begun': TASKS['texts'] + 'fewshot_split: test\nnum_fewshot: 1\ngen_prefix: "It is "\n'}


def save_tokenizer(folder, *, begins, template=None):
  backend = tokenizer_of(TEXT, begins=begins)
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, bos_token='<s>', eos_token='</s>', pad_token='</s>')
  tokenizer.chat_template = template
  tokenizer.save_pretrained(folder)
  return backend.get_vocab_size()


def save_model(folder, vocab_size, longest=48):
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
      vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
      num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
      max_position_embeddings=longest, bos_token_id=0, eos_token_id=1, pad_token_id=1)
  transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def write_tasks(folder, tasks):
  """Tasks over one file: questions with choices, longer texts, and what is to be written."""
  folder.mkdir()
  rows = []
  for i in range(8):
    words = (TEXT[i % 3] + TEXT[(i + 1) % 3]).split()
    rows.append({'question': ' '.join(words[i:i + 6]), 'choices': [words[i + 6], words[0],
                                                                   f'{words[1]} {words[i]}'],
                 'answer': i % 3, 'text': ' '.join(TEXT[:1 + i % 3] * (1 + i // 2)),
                 'first': ' '.join(words[i + 6:i + 8])})
  (folder / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  for name, text in tasks.items():
    (folder / f'{name}.yaml').write_text(
        f'task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '
        f'{folder}/rows.jsonl}}}}\ntest_split: test\n{text}')


def both(tmp_path, tasks, *, is_chat):
  """The results through lm-eval's own adapter and through ours, of the model in tmp_path/hf."""
  source, workdir = tmp_path / 'hf', tmp_path / 'work'
  write_tasks(tmp_path / 'tasks', tasks)
  exchange.import_model(source, workdir)
  theirs = evaluator.simple_evaluate(
      HFLM(pretrained=str(source), device='cpu', dtype='float32', batch_size=4),
      tasks=list(tasks), apply_chat_template=is_chat, log_samples=False, bootstrap_iters=1000,
      task_manager=TaskManager(include_path=tmp_path / 'tasks', include_defaults=False))
  ours = benchmark.evaluate_tasks(
      workdir, list(tasks), step=None, include_path=tmp_path / 'tasks', limit=None,
      num_fewshot=None, max_length=None, add_bos=None, batch_size=3, seed=0, is_chat=is_chat)
  return theirs, ours


def assert_equal_results(theirs, ours):
  # A random model's word perplexity is above 10⁹, more digits than float32 has.
  lines = lambda table: [line for line in table.splitlines() if 'word_perplexity' not in line]
  assert lines(benchmark.table(ours)) == lines(utils.make_table(theirs))
  for task, found in theirs['results'].items():
    for name, value in found.items():
      if isinstance(value, float):
        assert ours['results'][task][name] == pytest.approx(value, rel=1e-5), (task, name)


@pytest.mark.parametrize('begins', [
    pytest.param(True, id='begins_with_bos'),
    pytest.param(False, id='without', marks=pytest.mark.slow)])
def test_results_are_those_of_its_own_adapter(tmp_path, begins):
  save_model(tmp_path / 'hf', save_tokenizer(tmp_path / 'hf', begins=begins))
  theirs, ours = both(tmp_path, TASKS, is_chat=False)
  assert_equal_results(theirs, ours)
  # The three tasks are not trivial: some answers are right, and texts differ in length.
  assert 0 < theirs['results']['choices']['acc,none'] < 1
  assert theirs['results']['texts']['chrf,none'] > 0


@pytest.mark.slow
@pytest.mark.parametrize('name', ['begins', 'without'])
def test_results_in_a_chat_template_are_those_of_its_own_adapter(tmp_path, name):
  vocab_size = save_tokenizer(tmp_path / 'hf', begins=True, template=TEMPLATES[name])
  save_model(tmp_path / 'hf', vocab_size, longest=512)
  theirs, ours = both(tmp_path, CHATS, is_chat=True)
  assert_equal_results(theirs, ours)
