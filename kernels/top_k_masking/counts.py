"""How many instances are masked."""

import math


def n_masked(n_instances: int, top_k: int, ratio: float) -> int:
    """How many instances of a bag are masked: `floor(min(top_k, N) · ratio)`, never all of them.

    Examples:
        >>> n_masked(500, 10, 0.6), n_masked(4, 10, 0.6), n_masked(1, 10, 1.0), n_masked(500, 100, 0.29)
        (6, 2, 0, 29)
    """
    return min(share_of_pool(min(top_k, n_instances), ratio), n_instances - 1)


def share_of_pool(pool: int, ratio: float) -> int:
    """`floor(pool · ratio)`, where what is a whole number on paper loses none to rounding."""
    return math.floor(pool * ratio + 1e-9)  # 100 · 0.29 is 28.999999999999996 in floating point
