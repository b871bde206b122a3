"""The demo's page: one HTML file beside the pictures, readable from disk without a network."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from acmil.figures import concentration_figure, training_curves_figure

DPI = 110
_MOST_MAPS = 3  # of each kind: true and false, positive and negative
KINDS = {
    (True, True): "Planted, called planted",
    (True, False): "Planted, called normal",
    (False, True): "Normal, called planted",
    (False, False): "Normal, called normal",
}


def write_page(
    out: Path, values: Mapping[str, Any], concentration: Mapping[str, Sequence[np.ndarray]], *, positive: str
) -> Path:
    """Draw the page's own figures and write OUT/index.html.

    Args:
        out: The demo's folder; the pictures of its stages are there already.
        values: What summary.json holds.
        concentration: Model name → concentration curve of each test slide, (N,).
        positive: The class that carries lesions.
    """
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    for name, run in (("ACMIL", "run"), ("ABMIL", "run_abmil")):
        selected = json.loads((out / run / "model.json").read_text(encoding="utf-8"))["selected_epoch"]
        figure = training_curves_figure(read_history(out / run / "history.csv"), selected_epoch=selected, title=name)
        figure.savefig(figures / f"{run}.png", dpi=DPI)
    concentration_figure(concentration).savefig(figures / "concentration.png", dpi=DPI)
    environment = Environment(loader=PackageLoader("acmil"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("demo.html").render(
        values=values,
        calls=group_calls(out / "evaluation" / "predictions.csv", positive=positive),
        real_slide=next((out / "cmu-1" / "heatmaps").glob("*.png")).name,
        most_maps=_MOST_MAPS,
    )
    path = out / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def read_history(path: Path) -> dict[str, np.ndarray]:
    """Read history.csv: column name → (epochs,) float64."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def group_calls(predictions: Path, *, positive: str) -> dict[str, list[dict[str, Any]]]:
    """Group predictions.csv by truth and call, the most confident first: kind → slide_id and probability."""
    with predictions.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS.values()}
    for row in rows:
        kind = KINDS[row["label"] == positive, row["prediction"] == positive]
        groups[kind].append({"slide_id": row["slide_id"], "probability": float(row[f"probability_{positive}"])})
    for name, group in groups.items():
        group.sort(key=lambda call: call["probability"], reverse=name.endswith("called planted"))
    return groups
