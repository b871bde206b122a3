"""A machine with torch, numpy, h5py and safetensors alone can import the models and train."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys

BLOCKED = {
    "PIL", "cv2", "cyclopts", "matplotlib", "openslide", "pandas", "pydantic", "rich", "scipy", "sklearn",
    "tensorboard", "tifffile", "timm", "torchvision", "umap", "yaml",
}
# An import of a name that stands for None fails as that of a package which is not installed, and looking for one finds
# nothing: torch looks for some of these without needing them.
sys.modules |= dict.fromkeys(BLOCKED)

import numpy as np
import torch

import acmil.bags
import acmil.checkpoint
import acmil.kernels
import acmil.models
import acmil.training

rng = np.random.default_rng(0)
coords = np.zeros((12, 2), np.int64)
bags = [
    acmil.bags.Bag(f"slide_{i}", rng.standard_normal((12, 9), np.float32), coords, i % 2, f"case_{i}")
    for i in range(4)
]
for name in acmil.models.list_models():
    model = acmil.models.create_model(name, in_features=9, n_classes=2)
    result = acmil.training.fit(
        model, bags, bags, epochs=2, learning_rate=1e-3, min_learning_rate=0.0, warmup_epochs=0, weight_decay=1e-5,
        seed=0, device="cpu", score=lambda labels, probabilities: {"f1_macro": 0.5, "auroc": 0.5},
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
