"""Who can reach an address."""

import ipaddress


def is_loopback(host: str) -> bool:
  """Whether only this machine can reach the address `host`."""
  try:
    return ipaddress.ip_address(host.strip('[]')).is_loopback
  except ValueError:
    return host.lower() == 'localhost'
