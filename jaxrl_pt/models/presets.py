"""Model shapes with names. Vocabulary sizes follow the tokenizer unless a paper fixes one."""

from jaxrl_pt.config import Model, Quant

W1A8 = Quant('ternary', 'int8')


def tiny(vocab_size: int = 1024, quant: Quant = Quant()) -> Model:
  """About 0.9M parameters: trains in a minute on two CPU cores."""
  return Model(num_layers=4, d_model=128, d_ff=384, num_heads=4, num_kv_heads=2, head_dim=32,
               vocab_size=vocab_size, activation='relu2', sub_norm=True, quant=quant)


def small(vocab_size: int = 1024, quant: Quant = Quant()) -> Model:
  """About 2.8M parameters: the CPU-scale experiments."""
  return Model(num_layers=6, d_model=192, d_ff=512, num_heads=6, num_kv_heads=2, head_dim=32,
               vocab_size=vocab_size, activation='relu2', sub_norm=True, quant=quant)


def medium(vocab_size: int = 4096, quant: Quant = Quant()) -> Model:
  """About 15M parameters."""
  return Model(num_layers=8, d_model=384, d_ff=1024, num_heads=6, num_kv_heads=2, head_dim=64,
               vocab_size=vocab_size, activation='relu2', sub_norm=True, quant=quant)


def stories260k() -> Model:
  """The trained Llama-shaped model of llama2.c: 260,032 float32 parameters."""
  return Model(num_layers=5, d_model=64, d_ff=172, num_heads=8, num_kv_heads=4, head_dim=8,
               vocab_size=512)


def deepseek_7b() -> Model:
  """The shape of DeepSeekMath-7B: what GRPO starts from."""
  return Model(num_layers=30, d_model=4096, d_ff=11_008, num_heads=32, num_kv_heads=32,
               head_dim=128, vocab_size=102_400, tied_head=False, norm_epsilon=1e-6)


def qwen2_5_7b() -> Model:
  """The shape of Qwen2.5-Math-7B, without its biases: what OPO and Short-RL start from."""
  return Model(num_layers=28, d_model=3584, d_ff=18_944, num_heads=28, num_kv_heads=4,
               head_dim=128, vocab_size=152_064, tied_head=False, norm_epsilon=1e-6)


def qwen2_5_14b() -> Model:
  """The shape of Qwen2.5-14B, without its biases: what RPT starts from."""
  return Model(num_layers=48, d_model=5120, d_ff=13_824, num_heads=40, num_kv_heads=8,
               head_dim=128, vocab_size=152_064, rope_theta=1_000_000.0, tied_head=False)


def _bitnet_v2(d_model: int, d_ff: int, num_heads: int, num_layers: int) -> Model:
  return Model(num_layers=num_layers, d_model=d_model, d_ff=d_ff, num_heads=num_heads,
               num_kv_heads=num_heads, head_dim=d_model // num_heads, vocab_size=32_000,
               sub_norm=True, tied_head=False, quant=Quant('ternary', 'int8', hadamard=True))


def bitnet_v2_400m() -> Model:
  """BitNet v2 400M (2504.18415, appendix)."""
  return _bitnet_v2(1024, 4096, 16, 24)


def bitnet_v2_1_3b() -> Model:
  """BitNet v2 1.3B."""
  return _bitnet_v2(2048, 8192, 32, 18)


def bitnet_v2_3b() -> Model:
  """BitNet v2 3B."""
  return _bitnet_v2(4096, 8192, 32, 20)


def bitnet_v2_7b() -> Model:
  """BitNet v2 7B."""
  return _bitnet_v2(4096, 16384, 32, 24)


def bitnet_2b4t() -> Model:
  """BitNet b1.58 2B4T (2504.12285): 2,412,820,480 parameters."""
  return Model(num_layers=30, d_model=2560, d_ff=6912, num_heads=20, num_kv_heads=5,
               head_dim=128, vocab_size=128_256, rope_theta=500_000.0, activation='relu2',
               sub_norm=True, quant=W1A8)
