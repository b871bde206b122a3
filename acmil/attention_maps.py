"""From attention to maps: display values, score rasters, concentration measures, per-tile tables and GeoJSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

MEAN_BRANCH = "mean"


class AttentionMapError(ValueError):
    """Attention, coordinates or a choice of branch that do not fit together."""


def select_branch(attention: np.ndarray, branch: str | int = MEAN_BRANCH) -> np.ndarray:
    """Take one branch's attention, or the mean over branches (the model's bag attention).

    Args:
        attention: Attention of every branch, each row summing to 1, shape (K, N).
        branch: `"mean"` or the number of a branch, 0 to K - 1.

    Returns:
        Attention of the tiles, shape (N,), float64.

    Raises:
        AttentionMapError: If there is no such branch.
    """
    attention = np.asarray(attention, dtype=np.float64)
    if branch == MEAN_BRANCH:
        return attention.mean(axis=0)
    try:
        index = int(branch)
    except ValueError:
        index = -1
    if not 0 <= index < len(attention):
        numbers = f"a number from 0 to {len(attention) - 1}" if len(attention) > 1 else "0, the only one"
        allowed = f"'{MEAN_BRANCH}' or {numbers}"
        raise AttentionMapError(f"branch must be {allowed}, got {branch!r}. Choose one of the model's branches.")
    return attention[index]


def relative_attention(attention: np.ndarray) -> np.ndarray:
    """Attention as a multiple of the uniform share, `a_i · N`: 1 is what each tile gets when none is preferred.

    Args:
        attention: Attention that sums to 1 over its last axis, shape (..., N).

    Returns:
        Relative attention, same shape, float64.
    """
    attention = np.asarray(attention, dtype=np.float64)
    return attention * attention.shape[-1]


def percentile_rank(values: np.ndarray) -> np.ndarray:
    """Percentile of each value among all of them, between 0 and 100; equal values share their mean rank.

    A slide on which the model prefers nothing still fills this range, which is why it is not the default display.

    Args:
        values: Scores, shape (N,).

    Returns:
        Percentiles `100 (r_i + ½) / N` for mean ranks `r_i` from 0 (lowest), shape (N,).
    """
    values = np.asarray(values)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    mean_rank = below + (counts - 1) / 2
    return 100.0 * (mean_rank[inverse] + 0.5) / max(len(values), 1)


def descending_rank(values: np.ndarray) -> np.ndarray:
    """Rank of each value from 1 (highest); of equal values the earlier comes first. Shape (N,), int64."""
    order = np.argsort(-np.asarray(values), kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    return rank


def score_raster(
    values: np.ndarray,
    coords: np.ndarray,
    *,
    tile_level0_px: int,
    level0_size: tuple[int, int],
    downsample: float,
    shape: tuple[int, int] | None = None,
) -> np.ndarray:
    """Paint tile scores into a raster that lies over a thumbnail of the slide.

    A level-0 edge at `x` falls on raster edge `floor(x / downsample + ½)` whichever tile it bounds, so tiles that
    touch on the slide touch in the raster, without gap or overlap, at any downsample. Where tiles overlap on the
    slide, the pixel is the mean of their scores. A tile narrower than one raster pixel still paints one.

    Args:
        values: Score of each tile, shape (N,).
        coords: Top-left corners (x, y) in level-0 px, shape (N, 2).
        tile_level0_px: Side of a tile in level-0 px.
        level0_size: Width and height of the slide in level-0 px.
        downsample: Level-0 px per raster px, > 0.
        shape: Height and width of the raster in px; by default the slide's size over `downsample`, rounded.

    Returns:
        Scores, shape (h, w), float32; NaN where there is no tile.

    Raises:
        AttentionMapError: If values and coords differ in number, or a tile lies wholly outside the slide.
    """
    values, coords = np.asarray(values, dtype=np.float64), np.asarray(coords)
    _check_tiles(values, coords, level0_size)
    height, width = shape or (round(level0_size[1] / downsample), round(level0_size[0] / downsample))
    height, width = max(height, 1), max(width, 1)
    left, right = _raster_edges(coords[:, 0], tile_level0_px, downsample, width)
    top, bottom = _raster_edges(coords[:, 1], tile_level0_px, downsample, height)
    total = np.zeros((height, width))
    count = np.zeros((height, width), dtype=np.int32)
    for value, y0, y1, x0, x1 in zip(values, top, bottom, left, right, strict=True):
        total[y0:y1, x0:x1] += value
        count[y0:y1, x0:x1] += 1
    raster = np.full((height, width), np.nan, dtype=np.float32)
    np.divide(total, count, out=raster, where=count > 0, casting="same_kind")
    return raster


def _raster_edges(start: np.ndarray, side: int, downsample: float, limit: int) -> tuple[np.ndarray, np.ndarray]:
    low = np.floor(start / downsample + 0.5).astype(np.int64).clip(0, limit - 1)
    high = np.floor((start + side) / downsample + 0.5).astype(np.int64).clip(0, limit)
    return low, np.maximum(high, low + 1)


def _check_tiles(values: np.ndarray, coords: np.ndarray, level0_size: tuple[int, int]) -> None:
    if values.ndim != 1 or coords.shape != (len(values), 2):
        raise AttentionMapError(
            f"scores must be (N,) and coords (N, 2), got {values.shape} and {coords.shape}. "
            "Take both from one feature file."
        )
    if len(coords) and (coords.min() < 0 or (coords >= np.asarray(level0_size)).any()):
        low, high = coords.min(axis=0).tolist(), coords.max(axis=0).tolist()
        raise AttentionMapError(
            f"tile corners must lie within the slide of {level0_size[0]} x {level0_size[1]} px, got {low} to {high}. "
            "The coordinates belong to another slide, or are not level-0 pixels."
        )


def concentration_curve(attention: np.ndarray) -> np.ndarray:
    """Cumulative attention of the tiles in falling order: entry k - 1 is the share of the k most attended.

    Args:
        attention: Attention that sums to 1, shape (N,).

    Returns:
        Cumulative shares, rising to 1, shape (N,), float64.

    Reference:
        Zhang et al., Attention-Challenging Multiple Instance Learning, ECCV 2024, arXiv 2311.07125.
    """
    return np.cumsum(np.sort(np.asarray(attention, dtype=np.float64))[::-1])


def top_k_mass(attention: np.ndarray, k: int) -> float:
    """Share of the attention on the k most attended tiles (all of them where there are fewer)."""
    return float(np.sort(np.asarray(attention, dtype=np.float64))[::-1][:k].sum())


def attention_entropy(attention: np.ndarray) -> float:
    """Shannon entropy `−Σ a_i ln a_i` in nats: 0 when one tile has all, ln N when all have the same."""
    attention = np.asarray(attention, dtype=np.float64)
    positive = attention[attention > 0]
    return float(-(positive * np.log(positive)).sum())


def tile_table(
    slide_id: str,
    attention: np.ndarray,
    coords: np.ndarray,
    *,
    tile_level0_px: int,
    tissue_fraction: np.ndarray | None = None,
    branch: str | int = MEAN_BRANCH,
) -> pd.DataFrame:
    """List every tile of a slide with what the model gave it, in the order of the feature file.

    Args:
        slide_id: Name of the slide.
        attention: Attention of every branch, each row summing to 1, shape (K, N).
        coords: Top-left corners (x, y) in level-0 px, shape (N, 2).
        tile_level0_px: Side of a tile in level-0 px.
        tissue_fraction: Share of each tile that is tissue, shape (N,).
        branch: "mean", or the number of a branch: the attention that is shown.

    Returns:
        Columns slide_id; x, y, width, height (level-0 px); attention (mean over branches); attention_branch_0 and
        on; shown ("mean" or the branch), and of that attention relative_attention (× N), rank (1 = most attended) and
        percentile; tissue_fraction.

    Raises:
        AttentionMapError: If attention and coords differ in number.
    """
    import pandas as pd

    attention, coords = np.asarray(attention, dtype=np.float64), np.asarray(coords)
    if attention.ndim != 2 or coords.shape != (attention.shape[1], 2):
        raise AttentionMapError(
            f"attention must be (K, N) and coords (N, 2), got {attention.shape} and {coords.shape} "
            f"(slide '{slide_id}'). Take both from one prediction."
        )
    mean, shown = attention.mean(axis=0), select_branch(attention, branch)
    columns: dict[str, Any] = {
        "slide_id": [slide_id] * len(mean),
        "x": coords[:, 0],
        "y": coords[:, 1],
        "width": np.full(len(mean), tile_level0_px),
        "height": np.full(len(mean), tile_level0_px),
        "attention": mean,
        **{f"attention_branch_{k}": row for k, row in enumerate(attention)},
        "shown": [str(branch)] * len(mean),
        "relative_attention": relative_attention(shown),
        "rank": descending_rank(shown),
        "percentile": percentile_rank(shown),
    }
    if tissue_fraction is not None:
        columns["tissue_fraction"] = np.asarray(tissue_fraction)
    return pd.DataFrame(columns)


def attention_geojson(
    table: pd.DataFrame, *, top_fraction: float = 1.0, colours: np.ndarray | None = None
) -> dict[str, Any]:
    """Tiles as squares that QuPath (0.4 or later) opens as detections with their attention as measurements.

    Args:
        table: What `tile_table` returns.
        top_fraction: Share of the tiles to keep, the most attended first, in (0, 1].
        colours: Colour of each row of `table`, uint8, shape (N, 3).

    Returns:
        A GeoJSON FeatureCollection in level-0 px, most attended tile first.

    Raises:
        AttentionMapError: If `top_fraction` is outside (0, 1].
    """
    if not 0 < top_fraction <= 1:
        raise AttentionMapError(f"top_fraction must be in (0, 1], got {top_fraction}. 0.1 keeps the top tenth.")
    names = [name for name in table.columns if name not in ("slide_id", "shown", "x", "y", "width", "height")]
    order = np.argsort(table["rank"].to_numpy(), kind="stable")[: int(np.ceil(top_fraction * len(table)))]
    boxes = table[["x", "y", "width", "height"]].to_numpy()
    measured = table[names].to_numpy(dtype=np.float64)
    features = [
        _detection(boxes[i].tolist(), dict(zip(names, measured[i].tolist(), strict=True)), _rgb(colours, i))
        for i in order
    ]
    return {"type": "FeatureCollection", "features": features}


def _rgb(colours: np.ndarray | None, row: int) -> list[int] | None:
    return None if colours is None else np.asarray(colours)[row].tolist()


def _detection(box: Sequence[int], measurements: dict[str, float], colour: list[int] | None) -> dict[str, Any]:
    x, y, width, height = box
    ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    properties: dict[str, Any] = {"objectType": "detection"}
    if colour is not None:
        properties["color"] = colour
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {**properties, "measurements": measurements},
    }
