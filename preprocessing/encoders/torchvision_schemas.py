"""`import timm` where torch is built for the CPU and torchvision for CUDA.

timm imports torchvision. The package registry's torchvision wheels are built for CUDA torch: beside a CPU build of
torch their compiled operators cannot be loaded, and the import stops where torchvision describes the shapes of its
operator `nms`, which then does not exist. Once the two operators that are described without a check have a schema,
torchvision imports. Nothing here calls either.
"""

import sys
from types import ModuleType

import torch

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[torch.library.Library] = []  # a schema lives as long as the library that defined it


def import_timm() -> ModuleType:
    """Import timm; if torchvision's operators cannot be loaded, define their schemas and import again."""
    try:
        import timm
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
        _define_schemas()
        _forget("torchvision", "timm")  # what the failed import left behind is incomplete
        import timm
    return timm


def _define_schemas() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(operator + _SCHEMA)
    _libraries.append(library)


def _forget(*packages: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
