"""Times whole fused training steps with the block sizes of one launch replaced by others.

    python benchmarks/tune_tiles.py --result results/tiles.json
    python benchmarks/tune_tiles.py --device cpu --sizes 100:32:32 --launches gate    # a smoke run in the interpreter

The step with the tiles in use comes first and last: what differs less than these two is noise. The gradients with each
tile are held against the first's, by norm. Into how many shares the rows are cut for the gradients of the weights
follows from the bag alone, whatever the tile.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

# The folder of a script is on the path: shapes, bags and timing are those of the benchmark of a step.
from training_step import CACHE_BYTES, SHAPES, Shape, make_bags, make_step, timed

# Rows, columns, depth, warps, stages, programs a multiprocessor.
CANDIDATES = {
    "reduce": [
        (128, 256, 64, 8, 4, 1), (128, 256, 64, 8, 3, 1), (128, 128, 64, 4, 4, 1), (128, 128, 64, 8, 4, 1),
        (64, 256, 64, 4, 4, 1), (64, 128, 64, 4, 4, 2), (64, 64, 64, 4, 4, 2), (64, 64, 128, 4, 4, 1),
    ],
    "gate": [
        (128, 128, 64, 8, 4, 1), (128, 128, 64, 8, 3, 1), (64, 128, 64, 4, 3, 1), (64, 128, 64, 4, 2, 2),
        (64, 128, 64, 8, 3, 1), (64, 128, 128, 4, 2, 1),
    ],
    "gate_backward": [
        (32, 128, 64, 4, 3, 2), (32, 128, 64, 4, 2, 2), (16, 128, 64, 4, 3, 2), (32, 128, 64, 8, 3, 2),
        (64, 128, 64, 8, 3, 1),
    ],
    "reduction_backward": [
        (128, 256, 64, 8, 4, 1), (128, 128, 64, 8, 4, 1), (128, 128, 64, 4, 3, 1), (64, 128, 64, 4, 3, 2),
        (64, 128, 64, 4, 4, 2), (64, 256, 64, 4, 2, 2), (64, 64, 64, 4, 4, 2),
    ],
    "weight_gradient": [
        (128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 4, 1), (128, 128, 64, 4, 4, 1), (128, 128, 64, 8, 4, 1),
        (64, 128, 64, 4, 4, 2), (64, 64, 64, 4, 4, 2),
    ],
}  # fmt: skip
SAMPLES, STEPS = 12, 20


def tune(shape: Shape, launches: list[str], device: torch.device, until: float) -> list[dict[str, Any]]:
    """Time all candidates at one size."""
    from acmil.kernels.gated_scores.launches import Tile, choose_tiles

    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    samples, steps = (SAMPLES, STEPS) if on_gpu else (1, 1)
    n_bags = min(64, max(4, int(CACHE_BYTES / (shape.n * shape.d * dtype.itemsize)))) if on_gpu else 2
    bags = make_bags(shape, dtype, device, n_bags)
    used = choose_tiles(shape.n, shape.l, shape.a, dtype, device)
    changes = [{}, *({name: Tile(*tile)} for name in launches for tile in CANDIDATES[name]), {}]
    rows: list[dict[str, Any]] = []
    expected: torch.Tensor | None = None
    for change in changes:
        if time.monotonic() > until:
            break
        row: dict[str, Any] = {"size": str(shape), "change": {name: list(tile) for name, tile in change.items()}}
        tiles = used._replace(**change)
        try:
            step = make_step(shape, bags, device, (samples + 2) * steps + 2)
            step.launch(shape.n, tiles)
            moments = step.moments[0].clone()
            expected = moments if expected is None else expected
            row["error"] = ((moments - expected).norm() / expected.norm()).item()
            if on_gpu:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step.launch(shape.n, tiles)
                timing = timed(lambda _, graph=graph: graph.replay(), device, samples=samples, steps=steps)
            else:
                timing = timed(
                    lambda _, step=step, tiles=tiles: step.launch(shape.n, tiles), device, samples=samples, steps=steps
                )
            row |= {"ms": timing.median, "p10_ms": timing.low, "p90_ms": timing.high}
        except Exception as error:  # noqa: BLE001  a tile too large for this GPU, say
            row["failed"] = f"{type(error).__name__}: {str(error)[:80]}"
        rows.append(row)
        print(*row.values(), flush=True)
    return rows


def main() -> None:
    """Read the command line, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--sizes", default="", help="N:D:L,… in place of the standard sizes")
    parser.add_argument("--launches", default=",".join(CANDIDATES))
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after")
    parser.add_argument("--result", type=Path)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, which happens on first use
    shapes = [Shape(*map(int, size.split(":"))) for size in options.sizes.split(",") if size] or SHAPES
    until, rows = time.monotonic() + options.seconds, []
    for shape in shapes:
        rows += tune(shape, options.launches.split(","), torch.device(options.device), until)
    if options.result:
        options.result.parent.mkdir(parents=True, exist_ok=True)
        options.result.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
