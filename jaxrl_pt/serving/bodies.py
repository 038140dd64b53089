"""Reads the body of a request within bounds of size and time."""

import asyncio

from starlette.requests import Request

from jaxrl_pt.serving.fields import ApiError

_BODY_SECONDS = 30.0  # A body must have arrived in this time.
# A body that is too large is read up to this size and dropped, so that its sender sees the error.
_MOST_DRAINED = 32_000_000


async def read_body(request: Request, most: int) -> bytes:
  """The request's body of at most `most` bytes, whose type must be JSON.

  Raises:
    ApiError: 413 for a body that is too large, 408 for one that is too slow, 415 for another type.
  """
  too_large = ApiError(413, f'The body is larger than {most} bytes.')
  length = request.headers.get('content-length', '0')
  if length.isdecimal() and int(length) > _MOST_DRAINED:
    raise too_large
  body, num_bytes = bytearray(), 0
  try:
    async with asyncio.timeout(_BODY_SECONDS):
      async for piece in request.stream():
        num_bytes += len(piece)
        if num_bytes > _MOST_DRAINED:
          raise too_large
        if num_bytes <= most:
          body += piece
  except TimeoutError as e:
    raise ApiError(408, f'The body did not arrive within {_BODY_SECONDS:.0f} s.') from e
  if num_bytes > most:
    raise too_large
  if request.headers.get('content-type', '').partition(';')[0].strip() != 'application/json':
    # A browser asks this server first before it sends this type for a page of another host.
    raise ApiError(415, 'Send the body as Content-Type: application/json.')
  return bytes(body)
