"""What the operators refuse: shapes that disagree, and offsets that do not cut the instances into bags."""

from itertools import pairwise

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Refuse a tensor whose shape is not `expected`; None stands for any size."""
    fits = tensor.dim() == len(expected) and all(
        want is None or want == size for want, size in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}.")


def count_bags(offsets: Tensor | None, n_instances: int) -> int:
    """How many bags there are, B; the values of the offsets stay on the device, unread.

    Raises:
        ValueError: If there is no instance, or the offsets are not int64 of shape (B + 1,).
    """
    if n_instances < 1:
        raise ValueError("a batch must hold at least 1 instance, got 0. Drop empty bags from the cohort.")
    if offsets is None:
        return 1
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(
            f"offsets must be int64 of shape (B + 1,), B >= 1, got {offsets.dtype} {tuple(offsets.shape)}."
        )
    return offsets.shape[0] - 1


def bag_lengths(offsets: Tensor | None, n_instances: int) -> list[int]:
    """Read how many instances each bag holds.

    Args:
        offsets: (B+1,) int64, from 0 to `n_instances`, rising. None: one bag.
        n_instances: ΣN.

    Returns:
        B lengths, each at least 1.

    Raises:
        ValueError: If the offsets do not cut `n_instances` rows into bags of at least one.
    """
    count_bags(offsets, n_instances)
    if offsets is None:
        return [n_instances]
    edges = offsets.tolist()
    if edges[0] != 0 or edges[-1] != n_instances:
        raise ValueError(f"offsets must run from 0 to {n_instances} (instances), got {edges[0]} to {edges[-1]}.")
    lengths = [end - start for start, end in pairwise(edges)]
    if min(lengths) < 1:
        bag = next(index for index, length in enumerate(lengths) if length < 1)
        raise ValueError(
            f"offsets must rise, so that every bag holds at least 1 instance, got {edges[bag]} to {edges[bag + 1]} "
            f"for bag {bag}. Drop empty bags from the cohort."
        )
    return lengths
