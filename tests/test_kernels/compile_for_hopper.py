"""Compiles every launch for an H100, without one: run by `test_compilation.py` in a process of its own.

The interpreter forgives what the compiler refuses: a variable that changes its shape in a loop, shared memory that a
GPU does not have. Prints a line of JSON a kernel.
"""

import json
import re
import sys

import torch


class NoGPU:
    """What Triton asks of a driver before it launches anything."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


def compile_only(compiled):
    """Have launches compile their kernel, which is noted, and do nothing else."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    plain = JITFunction.run

    def run(function, *args, grid, warmup, **options):
        kernel = plain(function, *args, grid=grid, warmup=True, **options)
        row = {"kernel": function.__name__, "shared_bytes": kernel.metadata.shared}
        compiled.setdefault(kernel.hash, row | {"before_wait": misplaced(kernel.asm["ptx"])})
        return kernel

    JITFunction.run = run
    driver.set_active(NoGPU())


def misplaced(ptx):
    """What a kernel does before it waits for the launch before it, beside reading past the L1; on any of its paths."""
    lines = [line.strip() for line in ptx[ptx.index(".entry") :].splitlines()]
    labels = {match[1]: place for place, line in enumerate(lines) if (match := re.match(r"(\$L__\w+):", line))}
    found, seen, to_do = set(), set(), [0]
    while to_do:
        place = to_do.pop()
        while place not in seen and place < len(lines):
            seen.add(place)
            line = lines[place]
            if line.startswith("griddepcontrol.wait"):
                break
            is_read = re.search(r"\bld\.(volatile\.)?global(?!\.cg)", line)
            if is_read or re.search(r"\bst\.global|\batom\.|\bred\.|\bcp\.|\bret;|launch_dependents", line):
                found.add(line)
            if jump := re.search(r"\bbra(\.uni)?\s+(\$L__\w+);", line):
                to_do.append(labels[jump.group(2)])
                if not line.startswith("@"):
                    break
            place += 1
    return sorted(found)


def pretend(name, value):
    """Replace a function wherever it was imported to."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith("acmil.kernels") and hasattr(module, name):
            setattr(module, name, value)


def compile_step(n_rows, sizes, dtype, n_models=1, batch_size=1):
    from acmil.kernels.training_step import GatedParameters
    from acmil.kernels.training_step.fused import TrainingStep
    from acmil.kernels.training_step.validation import ValidationPass

    parameters = GatedParameters(*(torch.zeros(shape) for shape in sizes.shapes()))
    step = TrainingStep(
        n_models * [parameters], features=torch.zeros((n_rows, sizes.features), dtype=dtype), longest=n_rows,
        positions=1, top_k=10, ratio=0.6, weight_decay=0.0, seeds=n_models * [0], batch_size=batch_size,
    )  # fmt: skip
    step.launch()
    ValidationPass(step, longest=n_rows, n_bags=2, n_top=10).launch()


def compile_operators(n, dtype):
    from acmil.kernels.branch_pool.fused import masked_attention_pool
    from acmil.kernels.gated_scores.fused import gated_attention_scores
    from acmil.kernels.top_k_masking.fused import stochastic_top_k_mask

    d, l, a, k = 384, 128 if n < 10_000 else 512, 128, 5  # noqa: E741
    shapes = [(n, d), (l, d), (a, l), (a,), (a, l), (a,), (k, a), (k,)]
    x, *weights = (torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    offsets = torch.tensor([0, n - 500, n])
    hidden, scores = gated_attention_scores(x, *weights)
    keep = stochastic_top_k_mask(scores, top_k=10, ratio=0.6, generator=None, offsets=offsets)
    pooled, attention, gram = masked_attention_pool(hidden, scores, offsets, keep)
    (pooled.sum() + attention.sum() + gram.sum()).backward()


def main():
    compiled = {}
    compile_only(compiled)
    import acmil.kernels.branch_pool.fused
    import acmil.kernels.gated_scores.fused
    import acmil.kernels.top_k_masking.fused
    import acmil.kernels.training_step.validation  # noqa: F401
    from acmil.kernels.training_step.parameters import Sizes

    pretend("n_processors", lambda device: 132)
    pretend("chained", lambda device: {"CHAINED": True, "launch_pdl": True})
    pretend("may_approximate", lambda dtype, device: dtype != torch.float32)
    for n_rows in (1_000, 10_000, 17_000):
        compile_step(n_rows, Sizes(1024, 512, 128, 5, 2), torch.bfloat16)
    compile_step(10_000, Sizes(1024, 512, 128, 5, 2), torch.bfloat16, 25)
    compile_step(10_000, Sizes(1024, 512, 128, 5, 2), torch.bfloat16, 8, 4)
    compile_step(1_000, Sizes(1024, 512, 128, 5, 2), torch.bfloat16, batch_size=32)  # one share of the rows each
    compile_step(1_000, Sizes(384, 128, 128, 5, 2), torch.float32)
    compile_step(1_000, Sizes(48, 80, 48, 1, 3), torch.float16)
    for n_rows in (1_000, 17_000):
        compile_step(n_rows, Sizes(512, 256, 256, 16, 4), torch.bfloat16)
    compile_step(1_000, Sizes(64, 64, 256, 7, 32), torch.bfloat16)  # as many logits as are taken
    compile_step(10_000, Sizes(64, 256, 128, 7, 32), torch.bfloat16, 2)
    for n_rows, dtype in ((2_000, torch.bfloat16), (17_000, torch.bfloat16), (2_000, torch.float32)):
        compile_operators(n_rows, dtype)
    for row in compiled.values():
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
