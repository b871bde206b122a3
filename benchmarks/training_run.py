"""Speed of training: `cpu` holds the trainer against the loop that is common in the field, `gpu` times whole runs.

    python benchmarks/training_run.py cpu --result benchmarks/results/training_cpu.json
    python benchmarks/training_run.py gpu --result benchmarks/results/training_gpu.json

Bags are synthetic: normal features, N = 2,000 tiles of D = 384, K = 5 branches, masks of 10 and 0.6. The common loop
does the same mathematics with the same optimizer: a head a branch and the cosine of each pair of branches in Python
loops, the loss read at every step, float32. It is timed with its features in memory, with a DataLoader of two workers
in front, and with one whose workers read each bag from its HDF5 file (float32, in the page cache). The trainer is
`acmil.training.fit` as `acmil train` calls it, with features as they are stored (float16) and its time as it records
it, validation of one bag included. Before anything is timed the two must compute the same losses and gradients. The
arms take turns in short rounds; ratios are taken within a round, and their median is given, since other work on the
machine slows both sides of a round alike.

`gpu`: synthetic bags of the number of Camelyon16's slides, 270 and 129, lengths log-normal around 10,000 (sigma 0.5),
D = 1024, float16. The resident engine trains one run with its features in host memory, one from feature files, and 25
that differ in fold and seed, together; the eager engine a few epochs. Kernels are compiled before, by an epoch of each
engine, and one of the runs together. Before anything is timed the engines must agree on the losses of an epoch without
masks, and a run among the 25 must give what it gives alone, to the bit.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from acmil.models import create_model

N_CLASSES, N_BRANCHES, N_GATE = 2, 5, 128
TOP_K, RATIO = 10, 0.6
RATE, WEIGHT_DECAY = 1e-4, 1e-5
GPU_FEATURES = 1024
GPU_ERROR = 0.01  # of the mean losses of an epoch in bf16, relative
FLOAT32_ERROR = 1e-5  # of losses, relative
FLOAT32_GRADIENT_ERROR = 1e-4  # by norm
BF16_ERROR, BF16_GRADIENT_ERROR = 2**-8, 0.05  # a bf16 number is 2^-9 off; gradients sum such errors of both signs


class Bag(NamedTuple):
    """What `fit` asks of a bag."""

    slide_id: str
    features: np.ndarray  # (N, D) float16
    label: int


class CommonModel(nn.Module):
    """ACMIL with gated attention as it is commonly written: a module a branch, one bag with a leading 1."""

    def __init__(self, n_features: int, n_hidden: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(n_features, n_hidden, bias=False)
        self.gate_v = nn.Linear(n_hidden, N_GATE)
        self.gate_u = nn.Linear(n_hidden, N_GATE)
        self.score = nn.Linear(N_GATE, N_BRANCHES)
        self.branch_heads = nn.ModuleList(nn.Linear(n_hidden, N_CLASSES) for _ in range(N_BRANCHES))
        self.bag_head = nn.Linear(n_hidden, N_CLASSES)

    def forward(self, features: Tensor, *, masking: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Branch logits (K, C), bag logits (1, C), scores (K, N) of one bag (1, N, D)."""
        hidden = torch.relu(self.reduction(features[0]))  # (N, L)
        gate = torch.tanh(self.gate_v(hidden)) * torch.sigmoid(self.gate_u(hidden))
        scores = self.score(gate).transpose(0, 1)  # (K, N)
        if masking:
            scores = scores.masked_fill(self.draw(scores) == 0, -1e9)
        pooled = torch.softmax(scores, dim=-1) @ hidden  # (K, L)
        branch_logits = torch.stack([head(pooled[index]) for index, head in enumerate(self.branch_heads)])
        bag_attention = torch.softmax(scores, dim=-1).mean(dim=0, keepdim=True)  # (1, N)
        return branch_logits, self.bag_head(bag_attention @ hidden), scores

    @staticmethod
    def draw(scores: Tensor) -> Tensor:
        """Masks (K, N), 0 for what is hidden."""
        n_top = min(TOP_K, scores.shape[1])
        top = scores.topk(n_top, dim=-1).indices
        chosen = torch.rand(top.shape, device=scores.device).argsort(dim=-1)[:, : int(n_top * RATIO)]
        return torch.ones_like(scores).scatter_(-1, top.gather(-1, chosen), 0)


def common_losses(model: CommonModel, features: Tensor, label: Tensor, *, masking: bool) -> tuple[Tensor, ...]:
    """Bag, branch and diversity losses, the pairs of branches one by one."""
    branch_logits, bag_logits, scores = model(features, masking=masking)
    branch = F.cross_entropy(branch_logits, label.repeat_interleave(N_BRANCHES))
    attention = torch.softmax(scores, dim=-1)
    diversity = torch.zeros(())
    for first in range(N_BRANCHES):
        for second in range(first + 1, N_BRANCHES):
            diversity = diversity + torch.cosine_similarity(attention[first], attention[second], dim=-1)
    return F.cross_entropy(bag_logits, label), branch, diversity / (N_BRANCHES * (N_BRANCHES - 1) / 2)


def common_epoch(model: CommonModel, bags: Iterator[tuple[Tensor, Tensor]], n_bags: int) -> float:
    """One epoch of the common loop; its seconds."""
    started = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    total = 0.0
    for step, (features, label) in enumerate(bags):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + np.cos(np.pi * step / n_bags))
        loss = sum(common_losses(model, features, label, masking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    if not np.isfinite(total):
        raise ArithmeticError(f"the common loop's loss must be finite, got {total}.")
    return time.perf_counter() - started


class Held(torch.utils.data.Dataset):
    """Bags in memory as float32, for the DataLoader."""

    def __init__(self, bags: list[tuple[Tensor, int]]) -> None:
        self.bags = bags

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.bags[index]


class InFiles(torch.utils.data.Dataset):
    """Bags in HDF5 files, one a bag, for the DataLoader."""

    def __init__(self, folder: Path, bags: list[tuple[Tensor, int]]) -> None:
        self.files = [(folder / f"{number}.h5", label) for number, (_, label) in enumerate(bags)]
        for (path, _), (features, _) in zip(self.files, bags, strict=True):
            with h5py.File(path, "w") as file:
                file["features"] = features.numpy()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        with h5py.File(path) as file:
            return torch.from_numpy(file["features"][:]), label


def make_bags(n_bags: int, n_tiles: int, n_features: int) -> list[Bag]:
    """Normal features, as a backbone with a final LayerNorm gives them, stored as the feature files store them."""
    generator = np.random.default_rng(0)
    return [
        Bag(f"synthetic_{i}", generator.standard_normal((n_tiles, n_features), np.float32).astype(np.float16), i % 2)
        for i in range(n_bags)
    ]


def make_model(n_features: int) -> Any:
    """The model that is trained; always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model(
            "acmil_ga", in_features=n_features, n_classes=N_CLASSES, n_branches=N_BRANCHES, mask_top_k=TOP_K,
            mask_ratio=RATIO, attention_features=N_GATE,
        )  # fmt: skip


def common_model_of(model: Any) -> CommonModel:
    """The common model with the weights of ours."""
    common = CommonModel(model.options["in_features"], model.options["hidden_features"])
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("branch_head")}
    for index in range(N_BRANCHES):
        weights |= {
            f"branch_heads.{index}.{name}": getattr(model.branch_head, name)[index] for name in ("weight", "bias")
        }
    common.load_state_dict(weights)
    return common


def trainer_epoch(bags: list[Bag], n_features: int, *, precision: str) -> float:
    """One epoch of `fit`; its seconds, as it records them."""
    from acmil.training import fit

    result = fit(
        make_model(n_features), bags, bags[:1], epochs=1, learning_rate=RATE, min_learning_rate=0.0, warmup_epochs=0.0,
        weight_decay=WEIGHT_DECAY, seed=0, device="cpu", precision=precision,
        score=lambda labels, probabilities: {"f1_macro": 0.0, "auroc": 0.0},
    )  # fmt: skip
    return result.history[0].seconds


def errors_of_losses(bag: Bag, n_features: int, *, precision: str) -> dict[str, float]:
    """Relative error of the loss, and of the worst gradient by norm, of ours against the common model, masking off."""
    from acmil.precision import as_computed

    model = make_model(n_features)
    model.mask_top_k = 0
    common = common_model_of(model)
    features, label = torch.from_numpy(bag.features), torch.tensor([bag.label])
    expected = sum(common_losses(common, features.float()[None], label, masking=False))
    expected.backward()
    out = model(as_computed(features, precision))
    terms = model.loss(out, label)
    terms.total.backward()
    gradients = {name: parameter.grad for name, parameter in common.named_parameters()}
    for name in ("weight", "bias"):
        rows = [gradients.pop(f"branch_heads.{index}.{name}") for index in range(N_BRANCHES)]
        gradients[f"branch_head.{name}"] = torch.stack(rows)
    errors = {
        name: float((parameter.grad - gradients[name]).norm() / gradients[name].norm())
        for name, parameter in model.named_parameters()
        if name != "score.bias"  # softmax is blind to it: its gradient is nothing but rounding
    }
    return {"loss": abs((terms.total / expected).item() - 1), "gradient": max(errors.values())}


def check(bag: Bag, n_features: int) -> dict[str, dict[str, float]]:
    """Refuse to time loops that compute different things."""
    limits = {"fp32": (FLOAT32_ERROR, FLOAT32_GRADIENT_ERROR), "bf16": (BF16_ERROR, BF16_GRADIENT_ERROR)}
    errors = {precision: errors_of_losses(bag, n_features, precision=precision) for precision in limits}
    for precision, (loss, gradient) in limits.items():
        found = errors[precision]
        if found["loss"] > loss or found["gradient"] > gradient:
            raise ArithmeticError(
                f"{precision} must agree with the common loop to {loss:g}, {gradient:g}, got {found}."
            )
    return errors


def spread(values: list[float]) -> dict[str, float]:
    """Median, and the least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def on_cpu(options: argparse.Namespace) -> dict[str, Any]:
    """All arms in turns, round after round."""
    torch.set_num_threads(options.threads)
    bags = make_bags(options.bags, options.tiles, options.features)
    errors = check(bags[0], options.features)
    print(f"same losses: {errors}", flush=True)
    held = [(torch.from_numpy(bag.features).float(), bag.label) for bag in bags]

    def in_memory() -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(held)).tolist():
            yield held[index][0][None], torch.tensor([held[index][1]])

    def common(stream: Callable[[], Any]) -> float:
        return common_epoch(common_model_of(make_model(options.features)), stream(), len(held))

    folder = tempfile.TemporaryDirectory()
    sets = (Held(held), InFiles(Path(folder.name), held))
    loader, from_files = (torch.utils.data.DataLoader(one, batch_size=1, shuffle=True, num_workers=2) for one in sets)
    arms: dict[str, Callable[[], float]] = {
        "common loop": lambda: common(in_memory),
        "common loop, DataLoader": lambda: common(lambda: loader),
        "common loop, DataLoader from files": lambda: common(lambda: from_files),
        "trainer, fp32": lambda: trainer_epoch(bags, options.features, precision="fp32"),
        "trainer, bf16": lambda: trainer_epoch(bags, options.features, precision="bf16"),
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(options.rounds + 1):
        for name, arm in arms.items():
            rate = len(bags) / arm()
            if number:  # the first round warms up
                rates[name].append(rate)
    folder.cleanup()

    def times(base: str) -> dict[str, dict[str, float]]:
        return {
            name: spread([rate / of for rate, of in zip(values, rates[base], strict=True)])
            for name, values in rates.items()
        }

    return {
        "command": "cpu",
        "circumstances": circumstances(),
        "options": {name: getattr(options, name) for name in ("bags", "tiles", "features", "rounds", "threads")},
        "errors": errors,
        "steps_per_s": {name: spread(values) for name, values in rates.items()},
        "times_the_common_loop": times("common loop"),
        "times_that_from_files": times("common loop, DataLoader from files"),
        "rounds": rates,
    }


def camelyon_bags(device: torch.device, scale: float) -> list[Bag]:
    """399 bags; made on the GPU, for speed."""
    lengths = np.random.default_rng(0).lognormal(np.log(10_000 * scale), 0.5, 399).astype(int).clip(1)
    generator = torch.Generator(device).manual_seed(0)
    bags = []
    for number, n in enumerate(lengths):
        features = torch.randn((n, GPU_FEATURES), generator=generator, device=device).half().cpu().numpy()
        bags.append(Bag(f"synthetic_{number}", features, number % 2))
    return bags


def write_bags(folder: Path, bags: list[Bag]) -> None:
    """The bags as feature files."""
    from acmil.preprocessing.feature_file import FeatureMeta, write_feature_file

    for bag in bags:
        n = len(bag.features)
        meta = FeatureMeta(bag.slide_id, "synthetic", "", "", 224, 448, 0, 448 * n, 448, 0.25, 0.5)
        coords = np.stack([448 * np.arange(n), np.zeros(n, np.int64)], axis=1)
        write_feature_file(
            folder / f"{bag.slide_id}.h5", features=bag.features, coords=coords, tissue_fraction=np.ones(n), meta=meta
        )


def gpu_job(train: Any, val: Any, *, seed: int, epochs: int, masks: bool = True) -> Any:
    """A run of the reference's recipe."""
    from acmil.engine import TrainingJob

    model = make_model(GPU_FEATURES)
    model.mask_top_k = model.options["mask_top_k"] = TOP_K if masks else 0
    return TrainingJob(
        model, train, val, epochs=epochs, learning_rate=RATE, min_learning_rate=0.0, warmup_epochs=0.0,
        weight_decay=WEIGHT_DECAY, seed=seed,
    )  # fmt: skip


def timed_jobs(jobs: list[Any], engine: str, device: torch.device) -> dict[str, Any]:
    """Seconds, with and without bringing features to the GPU, and the memory beside the features."""
    from acmil.engine import fit_jobs
    from acmil.metrics import classification_metrics

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    results = fit_jobs(jobs, engine=engine, device=device, score=classification_metrics, precision="bf16")
    whole = time.perf_counter() - started
    for result in results:
        if isinstance(result, Exception):
            raise result
    n_steps = sum(len(job.train_bags) * job.epochs for job in jobs)
    longest = max(sum(record.seconds for record in result.history) for result in results)
    return {
        "whole_s": whole,
        "from_gpu_memory_s": longest,
        "ms_a_step_with_validation": 1e3 * longest / n_steps,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "losses": [[record.train_loss, record.val_loss] for record in (results[0].history[0], results[0].history[-1])],
    }


def on_gpu(options: argparse.Namespace) -> dict[str, Any]:
    """Whole runs."""
    from acmil.bags import BagDataset
    from acmil.cohort import CohortRow

    device = torch.device("cuda")
    bags = camelyon_bags(device, options.scale)
    train, val = bags[:270], bags[270:]
    arms: dict[str, Any] = {}

    result: dict[str, Any] = {
        "command": "gpu",
        "circumstances": circumstances() | {"gpu": torch.cuda.get_device_name()},
        "options": {name: getattr(options, name) for name in ("epochs", "rounds", "scale")},
        "instances": {"train": sum(len(bag.features) for bag in train), "val": sum(len(bag.features) for bag in val)},
        "arms": arms,
    }

    def measure(name: str, jobs: Callable[[], list[Any]], engine: str) -> dict[str, Any]:
        arms[name] = timed_jobs(jobs(), engine, device)
        print(name, arms[name], flush=True)
        write(result, options.result)  # what is measured is kept, whatever comes after
        return arms[name]

    resident, eager = (
        measure(f"{engine}, 1 epoch, no masks", lambda: [gpu_job(train, val, seed=0, epochs=1, masks=False)], engine)
        for engine in ("resident", "eager")
    )
    difference = np.abs(np.array(resident["losses"]) / np.array(eager["losses"]) - 1).max()
    if not difference < GPU_ERROR:
        raise ArithmeticError(f"the engines' losses must agree to {GPU_ERROR:g}, differ by {difference:g}.")
    result["difference_of_losses"] = float(difference)
    for number in range(options.rounds):
        measure(
            f"resident, one run, {number}", lambda: [gpu_job(train, val, seed=0, epochs=options.epochs)], "resident"
        )

    def grid(epochs: int) -> list[Any]:
        folds = [bags[k::5] for k in range(5)]
        jobs = []
        for fold in range(5):
            others = [bag for k in range(5) if k != fold for bag in folds[k]]
            jobs += [gpu_job(others[:270], folds[fold], seed=seed, epochs=epochs) for seed in range(5)]
        return jobs

    together, alone = (
        measure(name, jobs, "resident")["losses"]
        for name, jobs in (
            ("resident, 25 runs, 2 epochs", lambda: grid(2)),
            ("resident, the first of them, 2 epochs", lambda: grid(2)[:1]),
        )
    )
    if together != alone:
        raise ArithmeticError(f"a run must give the same losses alone and among others, got {alone} and {together}.")
    measure("resident, 25 runs", lambda: grid(options.epochs), "resident")
    if not options.without_eager:
        measure("eager, 2 epochs", lambda: [gpu_job(train, val, seed=0, epochs=2)], "eager")
    with tempfile.TemporaryDirectory() as folder:
        write_bags(Path(folder), bags)
        rows = [CohortRow(bag.slide_id, str(bag.label), bag.slide_id, None) for bag in bags]

        def from_files() -> list[Any]:
            data = BagDataset(Path(folder), rows, classes=("0", "1"), check_values=False)
            names = [row.slide_id for row in rows]
            return [gpu_job(data.select(names[:270]), data.select(names[270:]), seed=0, epochs=options.epochs)]

        started = time.perf_counter()
        measure("resident, one run from files", from_files, "resident")
        arms["resident, one run from files"]["with_opening_s"] = time.perf_counter() - started
    return result


def write(result: dict[str, Any], path: Path | None) -> None:
    """Write a result, if there is a place for it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def show_gpu(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = ["| | s from GPU memory | s in all | peak GB |", "|---|---|---|---|"]
    for name, arm in result["arms"].items():
        lines.append(f"| {name} | {arm['from_gpu_memory_s']:.2f} | {arm['whole_s']:.2f} | {arm['peak_gb']:.2f} |")
    return "\n".join(lines)


def circumstances() -> dict[str, Any]:
    """Where and with what this ran."""
    from acmil.environment import describe_machine

    return {
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average_1min": os.getloadavg()[0],
    }


def show_cpu(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = ["| | steps/s: median (least to most) | times the common loop | times that from files |", "|---" * 4 + "|"]
    for name, rate in result["steps_per_s"].items():
        ratios = (result[base][name] for base in ("times_the_common_loop", "times_that_from_files"))
        cells = [f"{of['median']:.2f} ({of['least']:.2f} to {of['most']:.2f})" for of in ratios]
        lines.append(
            f"| {name} | {rate['median']:.0f} ({rate['least']:.0f} to {rate['most']:.0f}) | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure, show and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="the trainer against the common loop, on the processor")
    cpu.add_argument("--bags", type=int, default=64, help="bags, and steps a round")
    cpu.add_argument("--tiles", type=int, default=2000)
    cpu.add_argument("--features", type=int, default=384)
    cpu.add_argument("--rounds", type=int, default=7)
    cpu.add_argument("--threads", type=int, default=os.cpu_count())
    cpu.add_argument("--result", type=Path, help="JSON file to write")
    cpu.set_defaults(measure=on_cpu, show=show_cpu)
    gpu = commands.add_parser("gpu", help="whole runs, on a GPU")
    gpu.add_argument("--epochs", type=int, default=100)
    gpu.add_argument("--rounds", type=int, default=3, help="repetitions of the single run")
    gpu.add_argument("--scale", type=float, default=1.0, help="of the bags' lengths")
    gpu.add_argument("--without-eager", action="store_true", help="do not time the eager engine")
    gpu.add_argument("--result", type=Path, help="JSON file to write")
    gpu.set_defaults(measure=on_gpu, show=show_gpu)
    options = parser.parse_args()
    result = options.measure(options)
    print(options.show(result))
    write(result, options.result)


if __name__ == "__main__":
    main()
