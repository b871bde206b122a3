"""Defaults of the models and their data, written once: signatures and the training configuration both read them here.

Imports nothing, so that the command line can show them without loading torch.
"""

MODEL = "acmil_ga"
N_BRANCHES = 5
MASK_TOP_K = 10
MASK_RATIO = 0.6
ATTENTION_FEATURES = 128
N_HEADS = 8
DROPOUT = 0.1
MPP_TOLERANCE = 0.01  # tiles whose resolutions differ by less than this share count as of one resolution

# Inner size by feature size, as the reference implementation sets it for its backbones.
HIDDEN_FEATURES = {384: 128, 512: 256, 768: 384, 1024: 512, 1536: 768}


def default_hidden_features(in_features: int, *, multiple_of: int = 1) -> int:
    """Inner size L for a feature size D: the reference's where it names one, else half of D.

    Args:
        in_features: D.
        multiple_of: L is rounded down to a multiple of this (heads), and is at least this.

    Returns:
        L.
    """
    hidden = HIDDEN_FEATURES.get(in_features, in_features // 2)
    return max(hidden - hidden % multiple_of, multiple_of)
