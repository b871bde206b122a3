"""What every launch of a fused kernel needs to know: the path, the precision, the size of its blocks."""

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

FUSED_CAPABILITIES = (9, 10)  # Hopper and Blackwell in data centres; the kernels were run on an H100
SHARED_BYTES = 232_448  # that a program may have there; elsewhere at most 166,912
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_BRANCHES = 16
MAX_GATE = 256
MAX_LOGITS = 256  # of all branches and the bag, in a training step
MAX_BAGS = 32  # that a launch takes side by side, of several models or of one
MAX_TOP_K = 256  # tiles that masking draws from; in a training step fewer
BRANCH_BLOCK = 16  # branches are padded to the least size of a tensor-core operand


def runs_fused_kernels(device: torch.device) -> bool:
    """Whether a device is one that the kernels' blocks fit into, and Triton is there."""
    return device.type == "cuda" and _is_fit(device.index)


@torch.compiler.assume_constant_result  # a compiler asks it, and does not look into it
def _is_fit(index: int | None) -> bool:
    return _look_at(index)


@lru_cache
def _look_at(index: int | None) -> bool:
    has_triton = importlib.util.find_spec("triton") is not None
    return has_triton and torch.cuda.get_device_capability(index)[0] in FUSED_CAPABILITIES


def takes_fused_path(tensor: Tensor, *, multiples_of_16: tuple[int, ...] = (), n_branches: int = 1) -> bool:
    """Say whether a call runs the fused kernels: a question of device, dtype and sizes alone, never of what failed."""
    return (
        runs_fused_kernels(tensor.device)
        and tensor.dtype in FUSED_DTYPES
        and all(size % 16 == 0 for size in multiples_of_16)
        and n_branches <= MAX_BRANCHES
    )


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of a float32 product, by torch's own switch; half types have but one."""
    if dtype != torch.float32:
        return "tf32"  # ignored for half operands
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def power_of_2_at_least(size: int, *, least: int = 16) -> int:
    """Round a size up to a block size.

    Examples:
        >>> power_of_2_at_least(1), power_of_2_at_least(16), power_of_2_at_least(129)
        (16, 16, 256)
    """
    return max(least, 1 << (size - 1).bit_length())


def search_steps(n_bags: int) -> int:
    """How often a range of bags must be halved to find one of them.

    Examples:
        >>> [search_steps(n) for n in (1, 2, 3, 8, 9)]
        [0, 1, 2, 3, 4]
    """
    return (n_bags - 1).bit_length()


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


@lru_cache
def n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few in the interpreter, so that loops over several programs are run."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def chained(device: torch.device) -> dict[str, object]:
    """Options of every launch: from Hopper on its programs are put in place while the launch before it still runs.

    They wait for its end before they read what it wrote (`products.wait_for_previous`).
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"CHAINED": True, "launch_pdl": True}
    return {"CHAINED": False}


def may_approximate(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tanh and sigmoid may be the GPU's approximations, 11 bits: for half types, outside the interpreter."""
    return device.type == "cuda" and dtype != torch.float32


def check_operands(features: Tensor, **others: Tensor) -> None:
    """Refuse operands of a fused operator whose dtype or device differs from the features'."""
    for name, tensor in others.items():
        if tensor.dtype != features.dtype or tensor.device != features.device:
            raise ValueError(
                f"{name} must be {features.dtype} on {features.device} like the features, got {tensor.dtype} on "
                f"{tensor.device}. Bring both to one dtype and device first."
            )
