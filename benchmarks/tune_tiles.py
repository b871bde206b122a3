"""Times the launches of a fused training step with other block sizes than those chosen for it.

    python benchmarks/tune_tiles.py --result results/tiles.json

For each size of bag, each launch on its own, ten in a graph, with each of a list of tiles; the one in use is marked.
What a tile computes is held against the tile in use, by norm, before it is timed.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

# A script's folder is on the path: the shapes, bags and timing are the step benchmark's.
from training_step import SHAPES, Shape, _replayed_ms, make_bags, make_step

from acmil.kernels.gated_scores.launches import Tile, Tiles, choose_tiles

CANDIDATES: dict[str, list[Tile]] = {
    "reduce": [
        Tile(128, 256, 64, 8, 3, 1), Tile(128, 256, 64, 8, 4, 1), Tile(128, 128, 64, 4, 4, 1), Tile(128, 128, 64, 8, 4, 1),
        Tile(64, 128, 64, 4, 4, 2), Tile(64, 64, 64, 4, 4, 2), Tile(64, 64, 128, 4, 3, 2), Tile(64, 256, 64, 4, 4, 1),
    ],
    "gate": [
        Tile(64, 128, 64, 4, 3, 1), Tile(64, 128, 64, 4, 2, 2), Tile(64, 128, 64, 8, 3, 1), Tile(64, 128, 64, 8, 2, 2),
        Tile(64, 128, 128, 8, 2, 1), Tile(64, 128, 128, 4, 2, 1), Tile(128, 128, 64, 8, 3, 1), Tile(128, 128, 64, 8, 4, 1),
        Tile(128, 128, 128, 8, 2, 1),
    ],
    "gate_backward": [
        Tile(32, 128, 64, 4, 3, 2), Tile(64, 128, 64, 4, 3, 2), Tile(64, 128, 64, 8, 3, 1), Tile(64, 128, 64, 8, 3, 2),
        Tile(32, 128, 64, 8, 3, 2), Tile(16, 128, 64, 4, 3, 2),
    ],
    "reduction_backward": [
        Tile(128, 256, 64, 8, 3, 1), Tile(128, 256, 64, 8, 4, 1), Tile(128, 128, 64, 8, 4, 1),
        Tile(128, 128, 64, 4, 3, 1), Tile(128, 128, 64, 8, 3, 2), Tile(64, 128, 64, 4, 3, 2), Tile(64, 256, 64, 8, 3, 1),
        Tile(64, 64, 64, 4, 4, 2), Tile(128, 128, 128, 8, 2, 1), Tile(64, 128, 128, 4, 2, 2),
    ],
    "weight_gradient": [
        Tile(128, 256, 64, 8, 3, 1), Tile(128, 256, 64, 8, 4, 1), Tile(128, 128, 64, 4, 4, 1), Tile(128, 128, 64, 8, 4, 1),
        Tile(128, 128, 64, 4, 3, 2),
    ],
}  # fmt: skip
OUTPUTS = {
    "reduce": ("hidden",), "gate": ("scores", "gate", "projections"), "gate_backward": ("d_gate",), "reduction_backward": ("d_reduced",),
    "weight_gradient": (),
}  # fmt: skip


def calls_of(step: Any, n_rows: int, tiles: Tiles) -> dict[str, Any]:
    """The launches of a step with these tiles, noted while it runs."""
    from acmil.kernels.training_step import fused

    calls: dict[str, Any] = {}
    names = [f"launch_{name}" for name in CANDIDATES]
    plain = {name: getattr(fused, name) for name in names}

    def note(name: str) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            calls[name.removeprefix("launch_")] = lambda: plain[name](*args, **options)
            return plain[name](*args, **options)

        return launch

    for name in names:
        setattr(fused, name, note(name))
    try:
        step.launch(n_rows, tiles)
    finally:
        for name in names:
            setattr(fused, name, plain[name])
    return calls


def rows_of(step: Any, name: str, n_rows: int) -> torch.Tensor:
    """What a launch wrote of the bag's rows; masked scores as 0."""
    buffer = getattr(step, name)
    value = buffer[:, :n_rows] if name in ("scores", "projections") else buffer[:n_rows]
    value = value.float()
    return torch.where(value.isinf(), 0.0, value)


def tune(shape: Shape, names: list[str], until: float) -> list[dict[str, Any]]:
    """Time all candidates at one size."""
    device, rows = torch.device("cuda"), []
    bags = make_bags(shape, torch.bfloat16, device, 1)
    used = choose_tiles(shape.n, shape.l, shape.a, torch.bfloat16, device)
    for name in names:
        in_use = getattr(used, name)
        seen = dict.fromkeys([in_use, *CANDIDATES[name]])
        expected: dict[str, torch.Tensor] = {}
        for tile in seen:
            if time.monotonic() > until:
                return rows
            row: dict[str, Any] = {"size": str(shape), "launch": name, "tile": tuple(tile), "in_use": tile == in_use}
            try:
                step = make_step(shape, bags, device, 4)
                call = calls_of(step, shape.n, used._replace(**{name: tile}))[name]
                found = {output: rows_of(step, output, shape.n) for output in OUTPUTS[name]}
                expected = expected or found
                errors = {o: ((v - expected[o]).norm() / expected[o].norm()).item() for o, v in found.items()}
                row |= {"us": 1e3 / 10 * _replayed_ms(call, 10), "errors": errors}
            except Exception as error:  # noqa: BLE001  a tile too large for this GPU, say
                row["failed"] = f"{type(error).__name__}: {str(error)[:80]}"
            rows.append(row)
            print(*row.values(), flush=True)
    return rows


def main() -> None:
    """Read the command line, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="", help="N:D:L,… in place of the standard sizes")
    parser.add_argument("--launches", default=",".join(CANDIDATES))
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after")
    parser.add_argument("--result", type=Path)
    options = parser.parse_args()
    shapes = [Shape(*map(int, size.split(":"))) for size in options.sizes.split(",") if size] or SHAPES
    until, rows = time.monotonic() + options.seconds, []
    for shape in shapes:
        rows += tune(shape, options.launches.split(","), until)
    if options.result:
        options.result.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
