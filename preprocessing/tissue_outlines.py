"""Outlines in level-0 pixels: traced from a mask, written as GeoJSON, read as people have drawn them, filled again."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from acmil.preprocessing.readers import SlideError

SUFFIX = ".geojson"
_CONTAINERS = (("FeatureCollection", "features"), ("Feature", "geometry"), ("GeometryCollection", "geometries"))
_NO_AREA = ("Point", "MultiPoint", "LineString", "MultiLineString")


@dataclass(frozen=True)
class Polygon:
    """An outline in level-0 pixels.

    Attributes:
        exterior: float64 (M, 2) of (x, y), not closed: the last point is not the first again.
        holes: The same for each hole.
    """

    exterior: np.ndarray
    holes: tuple[np.ndarray, ...] = ()

    @property
    def rings(self) -> tuple[np.ndarray, ...]:
        """The exterior, then the holes."""
        return (self.exterior, *self.holes)


class OutlineError(SlideError):
    """Outlines of a slide that are missing or cannot be used."""


def read_outlines(path: Path, *, skip_others: bool = True) -> tuple[Polygon, ...]:
    """Read the polygons of a GeoJSON file, as QuPath exports them.

    Args:
        path: A FeatureCollection, a Feature, a list of these, or a bare geometry, in level-0 pixels.
        skip_others: Leave out points, lines and features without a geometry; False: they are an error.

    Returns:
        The polygons of all Polygons and MultiPolygons.

    Raises:
        OutlineError: If the file is not such GeoJSON.
    """
    try:
        return tuple(_polygons(json.loads(path.read_text(encoding="utf-8-sig")), skip_others=skip_others))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise OutlineError(
            f"outlines must be GeoJSON polygons in level-0 px, got {error} ({path}). "
            "Export them from QuPath as GeoJSON, polygons only."
        ) from error


def read_tissue_outlines(folder: Path, slide_id: str) -> tuple[Polygon, ...]:
    """Read a slide's outlines, as a job writes them and QuPath exports them again.

    Args:
        folder: It holds `<slide_id>.geojson`: a FeatureCollection, a Feature, a list of these, or a bare geometry, of
            Polygons and MultiPolygons in level-0 pixels.
        slide_id: The slide.

    Returns:
        The polygons; none where the file holds none, which says that the slide has no tissue.

    Raises:
        OutlineError: If there is no such file, or it is not such GeoJSON.
    """
    path = outlines_path(folder, slide_id)
    try:
        return read_outlines(path, skip_others=False)
    except FileNotFoundError as error:
        raise OutlineError(
            f"slide '{slide_id}': tissue_from must hold the outlines of every slide, found no {path.name} ({folder}). "
            "Put the file there (without features it says: no tissue), or leave the slide out."
        ) from error
    except OutlineError as error:
        raise OutlineError(f"slide '{slide_id}': {error}") from error


def outlines_path(folder: Path, slide_id: str) -> Path:
    """Where a slide's outlines are."""
    return folder / f"{slide_id}{SUFFIX}"


def trace(mask: np.ndarray, downsample: float) -> tuple[Polygon, ...]:
    """Trace a mask bool (h, w) of `downsample` level-0 pixels per pixel, to half a mask pixel."""
    # OpenCV joins the centres of edge pixels. On the doubled mask they lie a quarter of a mask pixel inside the edge,
    # and a piece one pixel wide still encloses an area.
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    # Two levels of contours: exteriors, and the holes in them.
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    simple = [cv2.approxPolyDP(contour, 1.0, closed=True)[:, 0] for contour in contours]  # (M, 2) each
    rings = [(ring + 0.5) / 2 * downsample for ring in simple]
    holes: dict[int, list[np.ndarray]] = {}
    for ring, (_, _, _, parent) in zip(rings, hierarchy[0] if contours else (), strict=True):
        if parent >= 0 and len(ring) >= 3:
            holes.setdefault(parent, []).append(ring)
    exteriors = [i for i in range(len(rings)) if hierarchy[0][i][3] < 0 and len(rings[i]) >= 3]
    return tuple(Polygon(rings[i], tuple(holes.get(i, ()))) for i in exteriors)


def fill(polygons: tuple[Polygon, ...], *, height: int, width: int, downsample: float) -> np.ndarray:
    """Mark the mask pixels whose centres lie in any polygon and not in its holes: bool (height, width)."""
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        rings = [ring / downsample for ring in polygon.rings]
        corner = np.floor(rings[0].min(0)), np.ceil(rings[0].max(0))
        left, top = np.clip(corner[0], 0, (width, height)).astype(int)
        right, bottom = np.clip(corner[1], 0, (width, height)).astype(int)
        window = mask[top:bottom, left:right]
        if window.size:
            window |= _even_odd([ring - (left, top) for ring in rings], *window.shape)
    return mask


def to_feature(polygon: Polygon) -> dict[str, object]:
    """One outline as a GeoJSON feature with the properties that QuPath reads."""
    rings = [np.vstack([ring, ring[:1]]).round(2).tolist() for ring in polygon.rings]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": {"objectType": "annotation", "classification": {"name": "Tissue"}},
    }


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
        inside |= np.logical_xor.reduce([_inside_ring(points, ring) for ring in polygon.rings], axis=0)
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


def _even_odd(rings: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Fill by the even-odd rule: along each row of pixel centres, every edge crossed turns inside to outside."""
    turns = np.zeros((height, width + 1), np.uint8)
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            low, high = min(y0, y1), max(y0, y1)
            rows = np.arange(max(0, math.ceil(low - 0.5)), min(height, math.ceil(high - 0.5)))  # low <= centre < high
            if len(rows):
                crossing = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                turns[rows, np.clip(np.ceil(crossing - 0.5), 0, width).astype(int)] ^= 1
    return np.bitwise_xor.accumulate(turns, axis=1)[:, :-1].astype(bool)


def _polygons(node: Any, *, skip_others: bool) -> list[Polygon]:
    if isinstance(node, list):
        return [polygon for item in node for polygon in _polygons(item, skip_others=skip_others)]
    if skip_others and node is None:
        return []
    kind = node.get("type")
    for collection, member in _CONTAINERS:
        if kind == collection:
            return _polygons(node[member], skip_others=skip_others)
    if kind == "Polygon":
        return [_polygon(node["coordinates"])]
    if kind == "MultiPolygon":
        return [_polygon(rings) for rings in node["coordinates"]]
    if skip_others and kind in _NO_AREA:
        return []
    raise ValueError(f"type {kind!r}")


def _polygon(rings: Any) -> Polygon:
    exterior, *holes = [_ring(points) for points in rings]
    return Polygon(exterior, tuple(holes))


def _ring(points: Any) -> np.ndarray:
    ring = np.asarray(points, np.float64)
    if ring.ndim != 2 or ring.shape[1] < 2 or not np.isfinite(ring).all():
        raise ValueError(f"a ring that is no list of finite points: shape {ring.shape}")
    ring = ring[:, :2]
    if len(ring) > 1 and (ring[0] == ring[-1]).all():
        ring = ring[:-1]
    if len(ring) < 3:
        raise ValueError(f"a ring of {len(ring)} points")
    return ring
