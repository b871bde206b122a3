"""The planted truth on disk: lesion outlines as GeoJSON, and how much of each tile they cover."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from acmil.demo.lesions import LesionPlan
from acmil.demo.tissue_source import COARSE_PX
from acmil.preprocessing.tissue_outlines import read_outlines

_CONTOUR_PX = 4  # outlines are traced on cells of this side
_SIMPLIFY_PX = 1.0


def lesion_outlines(plan: LesionPlan) -> list[np.ndarray]:
    """Trace the outlines of planned lesions.

    Returns:
        One ring a lesion, (x, y) in level-0 px, float64 (M, 2), not closed.
    """
    fine = COARSE_PX // _CONTOUR_PX
    depth_px = cv2.resize(plan.depth_px, None, fx=fine, fy=fine, interpolation=cv2.INTER_CUBIC)
    contours, _ = cv2.findContours((depth_px > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    rings = [cv2.approxPolyDP(contour, _SIMPLIFY_PX / _CONTOUR_PX, closed=True)[:, 0] for contour in contours]
    return [(ring + 0.5) * _CONTOUR_PX for ring in rings if len(ring) >= 3]


def outlines_geojson(outlines: Sequence[np.ndarray]) -> dict[str, Any]:
    """Rings (M, 2) in level-0 px as a FeatureCollection of annotations that QuPath opens; empty for no rings."""
    features = []
    for number, outline in enumerate(outlines, start=1):
        ring = [[round(float(x), 1), round(float(y), 1)] for x, y in outline]
        features.append(
            {
                "type": "Feature",
                "id": f"lesion-{number}",
                "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
                "properties": {
                    "objectType": "annotation",
                    "name": f"planted lesion {number}",
                    "classification": {"name": "lesion", "color": [200, 0, 0]},
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def tile_lesion_fraction(lesion_geojson_path: Path, coords: np.ndarray, tile_level0_px: int) -> np.ndarray:
    """Share of each tile that the lesion outlines cover: the area of the polygons cut to the tile, exactly.

    Args:
        lesion_geojson_path: Outlines in level-0 px that do not overlap one another.
        coords: Top-left corners (x, y) of the tiles in level-0 px, (N, 2).
        tile_level0_px: Side of a tile in level-0 px.

    Returns:
        Float32 (N,) in 0-1.

    Raises:
        OutlineError: If the file is not GeoJSON.
    """
    coords = np.asarray(coords, dtype=np.float64)
    covered = np.zeros(len(coords))  # level-0 px²
    for polygon in read_outlines(lesion_geojson_path):
        for number, ring in enumerate(polygon.rings):
            sign = 1.0 if number == 0 else -1.0  # rings after the first are holes
            near = (coords < ring.max(axis=0)).all(axis=1) & (coords + tile_level0_px > ring.min(axis=0)).all(axis=1)
            for k in np.flatnonzero(near):
                covered[k] += sign * _area_in_tile(ring, coords[k], tile_level0_px)
    return np.clip(covered / tile_level0_px**2, 0.0, 1.0).astype(np.float32)


def _area_in_tile(ring: np.ndarray, corner: np.ndarray, side: float) -> float:
    """Area of a ring (M, 2) inside a square: cut by its four sides in turn (Sutherland & Hodgman, 1974)."""
    ring = ring - corner
    for axis in (0, 1):
        ring = _cut(ring, axis, 0.0, keep_above=True)
        ring = _cut(ring, axis, side, keep_above=False)
    x, y = ring.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def _cut(ring: np.ndarray, axis: int, bound: float, *, keep_above: bool) -> np.ndarray:
    """Keep the part of a ring on one side of a line parallel to an axis; what crosses gets a point on the line."""
    following = np.roll(ring, -1, axis=0)
    here, there = ring[:, axis] - bound, following[:, axis] - bound
    kept = (here >= 0) if keep_above else (here <= 0)
    crosses = here * there < 0
    span = np.where(crosses, here - there, 1.0)
    crossing = ring + (here / span)[:, None] * (following - ring)
    points = np.stack([ring, crossing], axis=1).reshape(-1, 2)
    return points[np.stack([kept, crosses], axis=1).reshape(-1)]
