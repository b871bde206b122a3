"""Tiles per second from slide file to feature file: this package, the plain loop of the field, and the bare network.

    python benchmarks/preprocessing.py cpu --weights efficientnet-lite0.pth
    python benchmarks/preprocessing.py gpu --encoder vit_large_patch16_224
    python benchmarks/preprocessing.py read --n-slides 8
    python benchmarks/preprocessing.py large --weights efficientnet-lite0.pth

The slides are synthetic: real tissue (CMU-1-Small-Region, the sample `cmu-1-small-region`), repeated until they are
large. Every arm embeds the same tiles of the same slides in a process of its own, from opening the slide to the file
of features; imports and the loading of weights are not counted. Arms take turns, `--rounds` times, and their ratios are
taken within a round, since other work on the machine comes and goes.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from acmil.demo.pyramid import TiledLevel

MALLOC_SETTING = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
TILE_PX = 224
MPP = 0.5
BLOCK_PX = 2048


def compose(source: Path, out: Path, *, side_px: int, n_slides: int) -> list[Path]:
    """Write slides of repeated tissue inside a margin of glass.

    Equal tiles are stored once, so that even a slide of 100,000 px a side is a small file; a reader decodes each of
    them all the same. The files lie in the operating system's cache: what is timed is decoding, not a disk.
    """
    import openslide

    from acmil.demo.pyramid import write_levels

    with openslide.OpenSlide(source) as slide:
        part = np.asarray(slide.read_region((900, 1900), 0, (BLOCK_PX // 2, BLOCK_PX // 2)).convert("RGB"))
    block = np.block([[[part], [part[:, ::-1]]], [[part[::-1]], [part[::-1, ::-1]]]])  # seamless when repeated
    paths = [out / f"slide{number:02d}.tif" for number in range(n_slides)]
    write_levels(paths[0], mosaic_levels(block, side_px), mpp=MPP, description="Synthetic: repeated tissue.")
    for path in paths[1:]:
        shutil.copyfile(paths[0], path)
    return paths


def mosaic_levels(block: np.ndarray, side_px: int) -> "Iterator[TiledLevel]":
    """Levels of a square slide: the block (BLOCK_PX, BLOCK_PX, 3) repeated, glass on an eighth at each edge."""
    downsample = 1
    while downsample == 1 or side_px // downsample >= 512:
        yield mosaic_level(block, side_px, downsample)
        downsample *= 2


def mosaic_level(block: np.ndarray, side_px: int, downsample: int) -> "TiledLevel":
    """One level of it; each tile of the block is compressed once."""
    import cv2

    from acmil.demo.pyramid import TILE_PX as JPEG_PX
    from acmil.demo.pyramid import TiledLevel, jpeg_tile

    small = cv2.resize(block, (BLOCK_PX // downsample,) * 2, interpolation=cv2.INTER_AREA)
    repeats = max(1, JPEG_PX // len(small))
    small = np.tile(small, (repeats, repeats, 1))
    per_block = len(small) // JPEG_PX
    cut = small.reshape(per_block, JPEG_PX, per_block, JPEG_PX, 3).swapaxes(1, 2)  # (row, column, h, w, 3)
    tissue = {(row, column): jpeg_tile(cut[row, column]) for row in range(per_block) for column in range(per_block)}
    glass = np.full((JPEG_PX, JPEG_PX, 3), 243, np.uint8)
    empty = jpeg_tile(glass)
    margin_px = side_px // 8 // JPEG_PX * JPEG_PX
    low, high = margin_px / downsample, (side_px - margin_px) / downsample

    def tile_at(row: int, column: int) -> bytes:
        y, x = (np.arange(index * JPEG_PX, (index + 1) * JPEG_PX) for index in (row, column))
        inside = ((y >= low) & (y < high))[:, None] & ((x >= low) & (x < high))
        place = (row % per_block, column % per_block)
        if inside.all():
            return tissue[place]
        return jpeg_tile(np.where(inside[..., None], cut[place], glass)) if inside.any() else empty

    side = side_px // downsample
    count = -(-side // JPEG_PX)
    tiles = (tile_at(row, column) for row in range(count) for column in range(count))
    return TiledLevel(side, side, downsample, tiles)


def configuration(options: argparse.Namespace, out: Path) -> Any:
    """The options of `acmil preprocess` that the arms share."""
    from acmil.preprocessing.config import PreprocessConfig

    return PreprocessConfig(
        slides=options.slides,
        out=out,
        encoder=options.encoder,
        weights=options.weights,
        tile_px=TILE_PX,
        tile_mpp=MPP,
        min_tissue=0.5,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        precision=options.precision,
        previews=False,
        reader=options.reader,
        **({"compile": True} if options.compile else {}),
    )


def arm_acmil(options: argparse.Namespace) -> dict[str, Any]:
    """`preprocess`, whole."""
    from acmil.preprocessing.job import preprocess

    summary = preprocess(configuration(options, options.out))
    if summary.failed:
        raise RuntimeError((options.out / "slides.csv").read_text(encoding="utf-8"))
    seconds = summary.seconds
    work = seconds["total"] - seconds["setup"] - seconds["warm_up"]
    return {"tiles": summary.new_tiles, "seconds": work, "setup_and_warm_up": seconds["setup"] + seconds["warm_up"]}


def arm_plain(options: argparse.Namespace) -> dict[str, Any]:
    """A DataLoader with two workers over `read_region`, fp32 forward, then save."""
    import openslide
    import torch

    from acmil.preprocessing.encoders import create_encoder
    from acmil.preprocessing.feature_file import open_feature_file

    encoder = create_encoder(options.encoder, weights=options.weights, device="cpu", precision="fp32")
    model = encoder.model.to(memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (encoder.mean, encoder.std))

    class Tiles(torch.utils.data.Dataset):
        def __init__(self, path: Path, coords: np.ndarray) -> None:
            self.path, self.coords, self.slide = path, coords, None

        def __len__(self) -> int:
            return len(self.coords)

        def __getitem__(self, index: int) -> Any:
            if self.slide is None:
                self.slide = openslide.OpenSlide(self.path)
            corner = tuple(int(value) for value in self.coords[index])
            image = np.array(self.slide.read_region(corner, 0, (TILE_PX, TILE_PX)).convert("RGB"))
            return (torch.from_numpy(image).permute(2, 0, 1).float() / 255 - mean) / std

    n_tiles, begun = 0, time.perf_counter()
    for path in options.slides:
        coords = open_feature_file(options.reference / "features" / f"{path.stem}.h5").coords()
        loader = torch.utils.data.DataLoader(Tiles(path, coords), batch_size=options.batch_size, num_workers=2)
        with torch.inference_mode():
            features = torch.cat([model(batch) for batch in loader])
        np.save(options.out / f"{path.stem}.npy", features.numpy())
        n_tiles += len(features)
    return {"tiles": n_tiles, "seconds": time.perf_counter() - begun}


def arm_bare(options: argparse.Namespace) -> dict[str, Any]:
    """The network alone on one batch of tiles in memory, again and again; no reading."""
    import torch

    from acmil.preprocessing.allocator import keep_large_buffers
    from acmil.preprocessing.encoders import create_encoder

    encoder = create_encoder(
        options.encoder, weights=options.weights, device=options.device, precision=options.precision
    )
    tiles = torch.randint(0, 256, (options.batch_size, TILE_PX, TILE_PX, 3), dtype=torch.uint8)
    if encoder.device.type == "cpu":
        keep_large_buffers()
    else:
        tiles = tiles.to(encoder.device)
    if options.compile:
        encoder.compile()
    for _ in range(4):
        encoder(tiles)
    n_batches = max(8, options.bare_tiles // options.batch_size)
    begun = time.perf_counter()
    for _ in range(n_batches):
        encoder(tiles)
    return {"tiles": n_batches * options.batch_size, "seconds": time.perf_counter() - begun}


def arm_read(options: argparse.Namespace) -> dict[str, Any]:
    """Opening, tissue and reading alone, with `--workers` threads, or processes where `preprocess` takes these."""
    from functools import partial

    from acmil.preprocessing.job_run import choose_reader
    from acmil.preprocessing.prepare import prepare_slide
    from acmil.preprocessing.slide_list import list_slides
    from acmil.preprocessing.stream import TileBatch, TileStream

    config = configuration(options, options.out)
    prepare = partial(
        prepare_slide,
        tile_px=TILE_PX,
        tile_mpp=MPP,
        overlap_px=0,
        min_tissue=0.5,
        tissue_mpp=8.0,
        previews=False,
        reader=options.reader,
    )
    sources = list_slides(config.slides, mpp=None)
    reader = choose_reader(options.workers, block_bytes=options.batch_size * TILE_PX**2 * 3)
    stream = TileStream(sources, prepare, batch_size=options.batch_size, workers=options.workers, reader=reader)
    begun = time.perf_counter()
    with reader:
        n_tiles = sum(len(event.tiles) for event in stream if isinstance(event, TileBatch))
    return {"tiles": n_tiles, "seconds": time.perf_counter() - begun}


def arm_timeline(options: argparse.Namespace) -> dict[str, Any]:
    """`preprocess` under the profiler: how long no kernel ran on the GPU between its first tiles and its last.

    The warm-up's batch is copied from pageable memory, tiles from page-locked: the first such copy is the beginning.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        result = arm_acmil(options)
    events = [event for event in profiler.events() if str(event.device_type).endswith("CUDA")]
    copies = [event for event in events if event.name.startswith("Memcpy HtoD (Pinned")]
    if not copies:
        raise RuntimeError(
            f"a GPU's timeline must show copies from page-locked memory, got {sorted({event.name for event in events})}"
        )
    first = min(event.time_range.start for event in copies)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.time_range.start >= first and not event.name.startswith("Mem")
    )
    busy_until, gaps = first, []
    for start, end in spans:
        if start > busy_until:
            gaps.append((busy_until - first, start - busy_until))
        busy_until = max(busy_until, end)
    whole = busy_until - first
    long_gaps = [(at / 1e6, gap / 1e3) for at, gap in gaps if gap > 5000.0]  # a batch of ViT-L takes tens of ms
    return result | {
        "gpu_idle_share": sum(gap for _, gap in gaps) / whole,
        "gpu_seconds": whole / 1e6,
        "gaps_over_5_ms": [{"at_s": round(at, 3), "ms": round(gap, 1)} for at, gap in long_gaps],
    }


def arm_layout(options: argparse.Namespace) -> dict[str, Any]:
    """Opening, tissue and grid alone."""
    from acmil.preprocessing.slide import Slide
    from acmil.preprocessing.tiling import tile_grid
    from acmil.preprocessing.tissue import find_tissue

    begun = time.perf_counter()
    with Slide.open(options.slides[0], reader=options.reader) as slide:
        grid = tile_grid(slide, find_tissue(slide), tile_px=TILE_PX, tile_mpp=MPP)
    return {"tiles": len(grid), "seconds": time.perf_counter() - begun}


ARMS = {
    "acmil": arm_acmil,
    "plain": arm_plain,
    "bare": arm_bare,
    "read": arm_read,
    "layout": arm_layout,
    "timeline": arm_timeline,
}


def run_arm(arm: str, options: argparse.Namespace, *, out: Path, **changes: Any) -> dict[str, Any]:
    """Run an arm in a fresh process and return what it measured."""
    environment = os.environ | changes.pop("environment", {})
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    values = {key: value for key, value in vars(options).items() if key != "command"} | {"out": out} | changes
    text = json.dumps(values, default=str)
    command = [sys.executable, __file__, "arm", arm, text]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    result["tiles_per_second"] = result["tiles"] / result["seconds"]
    result["seconds"] = round(result["seconds"], 3)
    speed, peak = f"{result['tiles_per_second']:.1f} tiles/s", f"{result['peak_gb']:.2f} GB at its peak"
    print(f"{arm} {changes}: {speed} ({result['tiles']} tiles in {result['seconds']} s), {peak}", flush=True)
    print(f"  {json.dumps(result)}", flush=True)
    return result


def circumstances() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    from acmil.preprocessing.encoders.torchvision_schemas import import_timm

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "torch": torch.__version__,
        "timm": import_timm().__version__,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def main() -> None:
    """Compose the slides, run the arms in turns, and print the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["cpu", "gpu", "read", "large"])
    parser.add_argument("--encoder", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", type=Path, help="local weights; random ones if left out")
    parser.add_argument("--source", type=Path, help="CMU-1-Small-Region.svs; by default the sample")
    parser.add_argument("--side-px", type=int, default=13_200, help="side of the slides; of `large` it is 100,000")
    parser.add_argument("--n-slides", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare-tiles", type=int, default=2000)
    parser.add_argument("--arms", default="timeline,acmil,bare", help="of `gpu`: which to run")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--result", type=Path, help="JSON file to write")
    options = parser.parse_args()
    options.precision, options.device = "auto", "cuda" if options.command == "gpu" else "cpu"
    if options.command == "large":
        options.side_px, options.n_slides = 100_000, 1
    options.reader = "auto"
    with tempfile.TemporaryDirectory() as folder:
        table = measured(options, Path(folder))
    shown = ("encoder", "side_px", "n_slides", "batch_size", "workers", "rounds", "compile", "device")
    facts = {name: getattr(options, name) for name in shown} | {"random_weights": options.weights.stem == "random"}
    text = json.dumps(circumstances() | {"options": facts, "results": table}, indent=2)
    print(text)
    if options.result is not None:
        options.result.write_text(text + "\n", encoding="utf-8")


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the arms."""
    if options.source is None:
        from acmil.samples import fetch_sample

        options.source = fetch_sample("cmu-1-small-region")
    if options.weights is None:
        options.weights = random_weights(options.encoder, folder / "random.pth")
    options.slides = compose(options.source, folder, side_px=options.side_px, n_slides=options.n_slides)
    options.reference = folder / "acmil"
    return {"cpu": on_cpu, "gpu": on_gpu, "read": on_reading, "large": on_a_large_slide}[options.command](
        options, folder
    )


def random_weights(encoder: str, path: Path) -> Path:
    """Write the random initial weights of a network, seed 0."""
    import torch

    from acmil.preprocessing.encoders.registry import find_encoder
    from acmil.preprocessing.encoders.timm_encoder import build_network

    facts = find_encoder(encoder)
    if facts is None:
        raise SystemExit(f"{encoder} is not in the registry: give --weights.")
    torch.manual_seed(0)
    torch.save(build_network(facts).state_dict(), path)
    return path


def on_cpu(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare with the plain loop, as it comes and with malloc told to keep its buffers."""
    rounds = []
    for _ in range(options.rounds):
        results = {
            "acmil": run_arm("acmil", options, out=folder / "acmil"),
            "bare": run_arm("bare", options, out=folder / "bare"),
            "plain": run_arm("plain", options, out=folder / "plain"),
            "plain_kept": run_arm("plain", options, out=folder / "plain_kept", environment=MALLOC_SETTING),
            "read, 1 thread": run_arm("read", options, out=folder / "read", workers=1),
            "read with OpenSlide, 1 thread": run_arm(
                "read", options, out=folder / "read", workers=1, reader="openslide"
            ),
        }
        rounds.append({name: result["tiles_per_second"] for name, result in results.items()})
    ratios = {
        f"acmil / {other}": spread([speeds["acmil"] / speeds[other] for speeds in rounds])
        for other in ("plain", "plain_kept", "bare")
    }
    own, openslide = "read, 1 thread", "read with OpenSlide, 1 thread"
    ratios[f"{own} / {openslide}"] = spread([speeds[own] / speeds[openslide] for speeds in rounds])
    speeds = {name: spread([round_[name] for round_ in rounds]) for name in rounds[0]}
    return {"tiles_per_second": speeds, "ratios": ratios, "cosine": cosine(options, folder)}


def on_a_large_slide(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of tissue and grid, then of the whole."""
    layouts = [run_arm("layout", options, out=folder / "layout") for _ in range(options.rounds)]
    whole = run_arm("acmil", options, out=folder / "acmil")
    return {
        "tissue and grid, s": spread([layout["seconds"] for layout in layouts]),
        "tissue and grid, peak GB": spread([layout["peak_gb"] for layout in layouts]),
        "whole": whole,
    }


def cosine(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Cosine between the features of the package and of the plain fp32 loop, tile by tile."""
    from acmil.preprocessing.feature_file import open_feature_file

    name = options.slides[0].stem
    ours = open_feature_file(folder / "acmil" / "features" / f"{name}.h5").features().astype(np.float64)
    plain = np.load(folder / "plain" / f"{name}.npy").astype(np.float64)
    similarity = (ours * plain).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(plain, axis=1))
    return {"mean": float(similarity.mean()), "least": float(similarity.min())}


def on_gpu(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The GPU's timeline; compare with the bare network."""
    table: dict[str, Any] = {}
    arms = options.arms.split(",")
    if "timeline" in arms:
        few = argparse.Namespace(**vars(options) | {"slides": options.slides[:3]})
        table["timeline"] = run_arm("timeline", few, out=folder / "timeline")
    rounds = [
        {arm: run_arm(arm, options, out=folder / arm)["tiles_per_second"] for arm in ("acmil", "bare") if arm in arms}
        for _ in range(options.rounds)
    ]
    table["tiles_per_second"] = {arm: spread([speeds[arm] for speeds in rounds]) for arm in rounds[0]}
    if len(rounds[0]) == 2:
        table["acmil / bare"] = spread([speeds["acmil"] / speeds["bare"] for speeds in rounds])
    return table


def on_reading(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Reading and decoding alone."""
    table: dict[str, Any] = {}
    few = argparse.Namespace(**vars(options) | {"slides": options.slides[:3]})
    one = argparse.Namespace(**vars(options) | {"slides": options.slides[:1]})
    table["read, 1 reader"] = run_arm("read", one, out=folder / "read", workers=1)
    for n_readers in (4, options.workers):
        table[f"read, {n_readers} readers"] = run_arm("read", options, out=folder / "read", workers=n_readers)
    table[f"read with OpenSlide, {options.workers} readers"] = run_arm(
        "read", few, out=folder / "read", reader="openslide"
    )
    return table


def main_arm(arm: str, text: str) -> None:
    """Run one arm in this process; print its result as the last line."""
    values = json.loads(text)
    for name in ("weights", "source", "out", "reference"):
        values[name] = Path(values[name])
    values["slides"] = [Path(path) for path in values["slides"]]
    result = ARMS[arm](argparse.Namespace(**values))
    result["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["arm"]:
        main_arm(*sys.argv[2:4])
    else:
        main()
