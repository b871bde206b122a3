"""Outlines drawn by people or planted by the demo: rings of GeoJSON polygons in level-0 pixels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class OutlineError(ValueError):
    """A file of outlines that cannot be used."""


Polygon = list[np.ndarray]  # exterior ring, then holes; each (M, 2)


def read_outlines(path: Path) -> list[Polygon]:
    """Read every polygon of a GeoJSON file, as QuPath exports them.

    Args:
        path: A FeatureCollection, a Feature, a list of Features, or a bare geometry.

    Returns:
        Polygons in level-0 px, each its exterior ring and then its holes, each ring of shape (M, 2), float64.

    Raises:
        OutlineError: If the file is not GeoJSON, or its polygons are malformed.
    """
    try:
        return _polygons(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise OutlineError(
            f"outlines must be GeoJSON polygons, got {type(error).__name__} ({error}) in {path}. "
            "Export them from QuPath as GeoJSON."
        ) from error


def _polygons(node: Any) -> list[Polygon]:
    if isinstance(node, list):
        return [polygon for item in node for polygon in _polygons(item)]
    kind = node["type"]
    if kind == "FeatureCollection":
        return _polygons(node["features"])
    if kind == "Feature":
        return [] if node["geometry"] is None else _polygons(node["geometry"])
    if kind == "GeometryCollection":
        return _polygons(node["geometries"])
    if kind == "Polygon":
        return [[_ring(ring) for ring in node["coordinates"]]]
    if kind == "MultiPolygon":
        return [[_ring(ring) for ring in polygon] for polygon in node["coordinates"]]
    return []


def _ring(points: Any) -> np.ndarray:
    ring = np.asarray(points, dtype=np.float64)
    if ring.ndim != 2 or ring.shape[1] < 2:
        raise ValueError(f"a ring must be (M, 2), got {ring.shape}")
    return ring[:, :2]


def inside_outlines(points: np.ndarray, polygons: Sequence[Polygon]) -> np.ndarray:
    """Tell which points lie inside any of the polygons; a point in a hole is outside.

    Args:
        points: (x, y) in level-0 px, shape (N, 2).
        polygons: What `read_outlines` returns.

    Returns:
        Boolean, shape (N,).
    """
    points = np.asarray(points, dtype=np.float64)
    inside = np.zeros(len(points), dtype=bool)
    for polygon in polygons:
        inside |= np.logical_xor.reduce([_inside_ring(points, ring) for ring in polygon], axis=0)
    return inside


def _inside_ring(points: np.ndarray, ring: np.ndarray) -> np.ndarray:
    x, y = points[:, 0], points[:, 1]
    inside = np.zeros(len(points), dtype=bool)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if y0 == y1:
            continue  # a horizontal edge is never crossed by a horizontal ray
        crosses = ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        inside ^= crosses
    return inside
