"""The XLA flags of tests, which compile far more than they compute: see `tests/conftest.py`."""

# Without LLVM's optimisation, fused loops in the form that takes half the time to compile, and each
# program in one piece: cut into pieces for several threads, it takes twice the time of one.
QUICK = ('--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false '
         '--xla_cpu_parallel_codegen_split_count=1')


def with_devices(count: int) -> str:
  """Flags for a process of its own with so many CPU devices."""
  return f'{QUICK} --xla_force_host_platform_device_count={count}'
