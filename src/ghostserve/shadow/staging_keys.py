"""Two records per step share one staging ring: what was mirrored, and the random states afterwards."""


def ack_key(step: int) -> int:
    """Ring key of a step's checksums, one crc32 per piece."""
    return 2 * step


def random_key(step: int) -> int:
    """Ring key of the random states after a step; the next step starts from them."""
    return 2 * step + 1
