"""Optical density and stains: the space in which tissue is blended and its colour jittered.

Light that passes through dye is weakened by a factor per layer, so amounts of dye add up in optical density
`d = -ln(I / I_glass)`, and a density is a sum of stain vectors weighted by their amounts.

Reference:
    Ruifrok & Johnston, "Quantification of histochemical staining by color deconvolution", 2001.
"""

from dataclasses import dataclass

import cv2
import numpy as np

HAEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)
_WHITE = 255


def _stain_matrix() -> np.ndarray:
    haematoxylin, eosin = (np.array(vector) / np.linalg.norm(vector) for vector in (HAEMATOXYLIN, EOSIN))
    residual = np.cross(haematoxylin, eosin)
    return np.stack([haematoxylin, eosin, residual / np.linalg.norm(residual)])


STAINS = _stain_matrix()  # (3, 3): haematoxylin, eosin, residual; each a unit vector of R, G, B density
DENSITY_TO_STAINS = np.linalg.inv(STAINS)  # (3, 3): density (…, 3) @ this = amounts (…, 3)


def optical_density(image: np.ndarray, glass: np.ndarray) -> np.ndarray:
    """Optical density of an image, 0 where the light is that of clear glass.

    Args:
        image: RGB uint8 (h, w, 3).
        glass: Light through clear glass, (3,), in 0-255.

    Returns:
        `-ln((I + 1) / (I_glass + 1))` cut at 0, float32 (h, w, 3); one is added so that black stays finite.
    """
    levels = np.arange(_WHITE + 1)[:, None]  # (256, 1)
    table = np.maximum(0.0, -np.log((levels + 1.0) / (np.asarray(glass) + 1.0))).astype(np.float32)  # (256, 3)
    return cv2.LUT(image, table[None])


def haematoxylin_amount(density: np.ndarray) -> np.ndarray:
    """Amount of haematoxylin in density (…, 3), cut at 0: float32 (…)."""
    return np.maximum(density @ DENSITY_TO_STAINS[:, 0].astype(np.float32), 0.0)


@dataclass(frozen=True)
class StainJitter:
    """How one slide's stains differ from the source's.

    Attributes:
        gain: Factor on the amount of haematoxylin, eosin and residual, (3,).
        offset: Amount of each added wherever there is tissue, (3,).
        glass: Light through this slide's clear glass, (3,), in 0-255.
    """

    gain: np.ndarray
    offset: np.ndarray
    glass: np.ndarray

    def density_map(self) -> np.ndarray:
        """The gain as one linear map of densities, (3, 3) float32: density (…, 3) @ it."""
        return (DENSITY_TO_STAINS @ np.diag(self.gain) @ STAINS).astype(np.float32)

    def density_offset(self) -> np.ndarray:
        """The offset as density, (3,) float32."""
        return (self.offset @ STAINS).astype(np.float32)


def draw_stain_jitter(case_rng: np.random.Generator, slide_rng: np.random.Generator) -> StainJitter:
    """Draw a slide's stain: a part that a case's slides share and a part of its own."""
    shared, own = case_rng.normal(size=6), slide_rng.normal(size=6)
    step = np.clip(0.6 * shared + 0.8 * own, -2.0, 2.0)  # (6,), variance 1 before the cut
    return StainJitter(
        gain=np.exp(step[:3] * (0.23, 0.23, 0.15)),
        offset=step[3:] * (0.03, 0.04, 0.006),
        glass=np.array([244.0, 243.0, 242.0]) + slide_rng.uniform(-4.0, 4.0) + slide_rng.uniform(-1.5, 1.5, size=3),
    )
