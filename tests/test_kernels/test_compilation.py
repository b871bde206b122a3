"""Every kernel compiles for an H100, fits into it, and waits for the launch before it before it does anything."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = 232_448  # that one program may have on an H100
KERNELS = {
    "reduce_kernel", "gate_kernel", "gate_backward_kernel", "reduction_backward_kernel", "weight_gradient_kernel",
    "sum_partials_kernel", "mask_kernel", "pool_kernel", "combine_kernel", "attention_kernel", "dots_kernel",
    "pool_backward_kernel", "losses_kernel", "update_kernel", "bag_logits_kernel", "spread_kernel",
}  # fmt: skip


def test_every_kernel_compiles_for_an_h100():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which is made for Linux only")
    script = Path(__file__).parent / "compile_for_hopper.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in compiled} == KERNELS
    assert [row for row in compiled if row["shared_bytes"] > SHARED_BYTES] == []
    assert [row for row in compiled if row["before_wait"]] == []
