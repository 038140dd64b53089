"""Fine-tuning, DPO, IPO and reward models against TRL's own losses: values and gradients.

A tiny random Llama is written in Hugging Face's format. TRL's `compute_loss` gets a batch as its
own collators make it, one conversation a row; ours gets the same conversations packed. Our
gradients are written in the same format, so that each of TRL's tensors meets the one of its name.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytest.importorskip('trl', reason='trl is not installed: `make parity`')
utils = pytest.importorskip('trl.trainer.utils')
sft = pytest.importorskip('trl.trainer.sft_trainer')
dpo = pytest.importorskip('trl.trainer.dpo_trainer')
reward = pytest.importorskip('trl.trainer.reward_trainer')
safetensors = pytest.importorskip('safetensors.numpy')

from jaxrl_pt import config as cfg  # noqa: E402
from jaxrl_pt import params as P  # noqa: E402
from jaxrl_pt.data import conversations, pack  # noqa: E402
from jaxrl_pt.interop import huggingface as hf  # noqa: E402
from jaxrl_pt.models import transformer  # noqa: E402
from jaxrl_pt.train import losses, preferences  # noqa: E402

pytestmark = pytest.mark.parity

MODEL = cfg.Model(num_layers=2, d_model=32, d_ff=56, num_heads=4, num_kv_heads=2, head_dim=8,
                  vocab_size=60, tied_head=False, norm_epsilon=1e-6)
EOS = 59
OUTPUTS = 'log_probs', 'entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1'


@pytest.fixture(scope='module')
def params():
  drawn = P.init(transformer.build(MODEL).specs, jax.random.key(0))
  return {**drawn, 'embed': drawn['embed'] * 20}


@pytest.fixture(scope='module')
def reference_params():
  drawn = P.init(transformer.build(MODEL).specs, jax.random.key(1))
  return {**drawn, 'embed': drawn['embed'] * 20}


def drawn_pairs():
  """(prompt, chosen, rejected) ids with their ends, of uneven lengths; 0 is TRL's padding."""
  random = np.random.default_rng(0)
  ids = lambda low, high: random.integers(1, EOS, random.integers(low, high)).tolist()
  return [(ids(2, 6), [*ids(1, 9), EOS], [*ids(1, 9), EOS]) for _ in range(5)]


def rows_of(prompt_and_completions, seq_len=40):
  """A packed batch; each entry is the segments that share a row."""
  packer = pack.Packer(seq_len)
  rows = []
  for segments in prompt_and_completions:
    parts = []
    for prompt, completion in segments:
      ids = np.asarray([*prompt, *completion, 0], np.int32)
      learned = np.arange(len(ids)) >= len(prompt)
      learned[-1] = False  # The pair whose input is the end.
      parts.append(conversations.pairs(ids, learned))
    rows += packer.add(*parts)
  rows = np.stack([*rows, *packer.flush()])
  assert rows[:, 2].max() > len(prompt_and_completions[0])  # Some share a row.
  return jax.tree.map(jnp.asarray, pack.to_batch(rows, np.arange(len(rows))))


def their_model(folder, params, kind=transformers.AutoModelForCausalLM, **settings):
  hf.save_model(folder, MODEL, params)
  model = kind.from_pretrained(folder, dtype=torch.float32, **settings)
  if kind is transformers.AutoModelForCausalLM:
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
  return model.train()


def stub(**fields):
  accelerator = types.SimpleNamespace(
      num_processes=1, device='cpu', gather=lambda x: x, gather_for_metrics=lambda x: x)
  metrics = {mode: collections.defaultdict(list) for mode in ('train', 'eval')}
  return types.SimpleNamespace(accelerator=accelerator, _metrics=metrics, _total_train_tokens=0,
                               _tp_size=1, aux_loss_enabled=False, get_tp_size=lambda: 1, **fields)


def same_gradients(folder, gradients, model):
  hf.save_model(folder, MODEL, gradients)
  [path] = folder.glob('*.safetensors')
  ours = safetensors.load_file(path)
  theirs = {name: p.grad.numpy() for name, p in model.named_parameters()
            if not name.startswith('score')}
  assert ours.keys() >= theirs.keys() and len(theirs) > 15
  for name, gradient in theirs.items():
    scale = np.abs(gradient).max()
    assert scale > 0, name
    np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=2e-5 * scale + 1e-7,
                               err_msg=name)


def test_fine_tuning(tmp_path, params):
  asked = [(prompt, completion) for prompt, completion, _ in drawn_pairs()]
  batch = rows_of([[pair] for pair in asked])

  def mean(params):
    total = losses.next_token(transformer.build(MODEL), 0)(params, batch)
    return total / (batch.weights > 0).sum()

  ours, gradients = jax.value_and_grad(mean)(params)
  model = their_model(tmp_path / 'model', params)
  collate = sft.DataCollatorForLanguageModeling(pad_token_id=0)
  inputs = collate([{'input_ids': prompt + completion,
                     'labels': [-100] * len(prompt) + completion} for prompt, completion in asked])
  trainer = stub(model=model, compute_loss_func=None, label_smoother=None,
                 args=types.SimpleNamespace(loss_type='nll', average_tokens_across_devices=False,
                                            max_length=None))
  trainer.accelerator.parallelism_config = None
  loss = sft.SFTTrainer.compute_loss(trainer, model, inputs)
  loss.backward()
  assert float(ours) == pytest.approx(loss.item(), abs=1e-5)
  same_gradients(tmp_path / 'gradients', gradients, model)


@pytest.mark.parametrize('method, theirs', [
    (cfg.DPO('a', beta=0.3), {'loss_types': ['sigmoid']}),
    (cfg.DPO('a', 'ipo', beta=0.3), {'loss_types': ['ipo']}),
    (cfg.DPO('a', 'length_normalised', beta=0.3), {'loss_types': ['sigmoid_norm']}),
    (cfg.DPO('a', 'robust', 0.3, 0.1), {'loss_types': ['robust'], 'label_smoothing': 0.1}),
], ids=['dpo', 'ipo', 'length_normalised', 'robust'])
def test_dpo(tmp_path, params, reference_params, method, theirs):
  pairs = drawn_pairs()
  batch = rows_of([[(p, c), (p, r)] for p, c, r in pairs])
  segments = int(batch.segments.max())
  model = transformer.build(MODEL)
  reference, _ = preferences.completions(model, 0, segments)(reference_params, batch)

  def mean(params):
    total, metrics = preferences.dpo(method, model, 0, segments)(
        params, preferences.Pairs(batch, reference))
    return total / len(pairs), metrics

  (ours, metrics), gradients = jax.value_and_grad(mean, has_aux=True)(params)
  policy = their_model(tmp_path / 'model', params)
  frozen = their_model(tmp_path / 'reference', reference_params)
  collate = dpo.DataCollatorForPreference(pad_token_id=0)
  inputs = collate([{'prompt_ids': p, 'chosen_ids': c, 'rejected_ids': r} for p, c, r in pairs])
  trainer = stub(model=policy, ref_model=frozen, ld_alpha=None, precompute_ref_logps=False,
                 f_divergence_type='reverse_kl', beta=method.beta, loss_weights=[1.0],
                 use_weighting=False, args=types.SimpleNamespace(
                     gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
                 **{'label_smoothing': 0.0, **theirs})
  loss = dpo.DPOTrainer._compute_loss(trainer, policy, inputs, return_outputs=False)
  loss.backward()
  assert float(ours) == pytest.approx(loss.item(), abs=1e-5)
  same_gradients(tmp_path / 'gradients', gradients, policy)
  for name, other in (('margin', 'margins'), ('accuracy', 'accuracies'),
                      ('chosen_reward', 'chosen'), ('rejected_reward', 'rejected')):
    assert float(metrics[name].mean()) == pytest.approx(
        trainer._metrics['train'][f'rewards/{other}'][0], abs=1e-5)


@pytest.mark.parametrize('center', [0.0, 0.01])
def test_reward_model(tmp_path, params, center):
  pairs = drawn_pairs()
  batch = rows_of([[(p, c), (p, r)] for p, c, r in pairs])
  segments = int(batch.segments.max())
  head = {'weight': jax.random.normal(jax.random.key(2), (MODEL.d_model,)), 'bias': jnp.zeros(())}
  loss_of = preferences.bradley_terry(cfg.RewardModel('a', center), transformer.build(MODEL),
                                      segments)

  def mean(trained):
    total, metrics = loss_of(trained, preferences.Pairs(batch, jnp.zeros(())))
    return total / len(pairs), metrics

  (ours, metrics), (gradients, head_gradient) = jax.value_and_grad(mean, has_aux=True)(
      (params, head))
  model = their_model(tmp_path / 'model', params,
                      transformers.AutoModelForSequenceClassification, num_labels=1, pad_token_id=0)
  with torch.no_grad():
    model.score.weight.copy_(torch.from_numpy(np.array(head['weight'])[None]))
  collate = reward.DataCollatorForPreference(pad_token_id=0)
  inputs = collate([{'chosen_ids': p + c, 'rejected_ids': p + r} for p, c, r in pairs])
  trainer = stub(model=model, args=types.SimpleNamespace(
      center_rewards_coefficient=center or None))
  loss = reward.RewardTrainer.compute_loss(trainer, model, inputs)
  loss.backward()
  assert float(ours) == pytest.approx(loss.item(), abs=1e-5)
  same_gradients(tmp_path / 'gradients', gradients, model)
  theirs = model.score.weight.grad.numpy()[0]
  np.testing.assert_allclose(head_gradient['weight'], theirs, atol=2e-5 * np.abs(theirs).max())
  for name in ('margin', 'accuracy'):
    assert float(metrics[name].mean()) == pytest.approx(trainer._metrics['train'][name][0],
                                                        abs=1e-5)
