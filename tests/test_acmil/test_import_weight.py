"""A machine with torch, numpy, h5py and safetensors alone can import the models and train."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from importlib.abc import MetaPathFinder

BLOCKED = {
    "PIL", "cv2", "cyclopts", "matplotlib", "openslide", "pandas", "pydantic", "rich", "scipy", "sklearn", "tensorboard",
    "tifffile", "timm", "torchvision", "umap", "yaml",
}

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())

import numpy as np
import torch

import acmil.bags
import acmil.checkpoint
import acmil.kernels
import acmil.models
import acmil.training

assert not BLOCKED & {name.split(".")[0] for name in sys.modules}, BLOCKED & set(sys.modules)

rng = np.random.default_rng(0)
bags = [
    acmil.bags.Bag(f"slide_{i}", rng.standard_normal((12, 9), np.float32), np.zeros((12, 2), np.int64), i % 2, f"case_{i}")
    for i in range(4)
]
for name in acmil.models.list_models():
    model = acmil.models.create_model(name, in_features=9, n_classes=2)
    result = acmil.training.fit(
        model, bags, bags, epochs=2, learning_rate=1e-3, min_learning_rate=0.0, warmup_epochs=0, weight_decay=1e-5, seed=0,
        device="cpu", score=lambda labels, probabilities: {"f1_macro": 0.5, "auroc": 0.5},
    )
    assert len(result.history) == 2 and np.isfinite(result.history[1].train_loss)
packed = acmil.bags.pack(bags, device="cpu")
assert model(packed.features, packed.offsets).logits.shape == (4, 2)
"""


def test_training_needs_only_torch_numpy_h5py_and_safetensors():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["acmil", "acmil.models", "acmil.models.defaults"])
def test_these_load_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
