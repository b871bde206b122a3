"""Pen ink on a thumbnail: strokes of blue, green, red and black marker, told from H&E by the ratio of their densities.

Dye weakens light by a factor, so the ratio of two channels' optical densities d = -ln(I / 255) is the dye's, however
thick it lies. Haematoxylin and eosin both take most out of green: d_R <= d_G, and d_B stays over half of d_G. Blue
and green ink take more out of red than out of green; red ink takes about as much out of blue as out of green and
leaves red alone; black ink takes the same out of all three.

Reference:
    A. Ruifrok, D. Johnston, "Quantification of histochemical staining by color deconvolution", Anal. Quant. Cytol.
    Histol. 23 (2001).
"""

import cv2
import numpy as np

# A marker's tip is 300 µm and more. Dye specks, pigment, coal and vessels full of red cells are mostly narrower.
STROKE_UM = 120.0
_RIM_UM = 48.0  # How far a stroke's paler rim may reach over its dense part.
_BLACKEST_INK = 16  # Darker than ink ever is: unlit edges of the scan.


def pen_ink(image: np.ndarray, *, pitch_um: float) -> np.ndarray:
    """Mark pen strokes.

    Dense ink of one of the colours, at least `STROKE_UM` wide, and around it its paler rim of the same colour. Meant
    for H&E: blue stains such as trichrome's or Alcian blue have the colours of ink.

    Args:
        image: uint8 RGB (h, w, 3), a brightfield thumbnail.
        pitch_um: µm per pixel.

    Returns:
        bool (h, w), True on ink.
    """
    image = cv2.medianBlur(image, 5)  # Ink is even; single noisy pixels would break a stroke.
    levels = -np.log((np.arange(256) + 1.0) / 256)  # (256,)
    density = levels.astype(np.float32)[image]  # (h, w, 3)
    brightest, darkest = image.max(-1).astype(np.float32), image.min(-1).astype(np.float32)
    is_grey = brightest - darkest <= 4 + 0.25 * brightest
    is_black = is_grey & (brightest < 100) & (brightest >= _BLACKEST_INK)
    pairs = (
        (_is_cold(density, least=0.6, margin=0.12), _is_cold(density, least=0.15, margin=0.05)),
        (_is_red(density, least=0.9), _is_red(density, least=0.3)),
        (is_black, is_grey & (brightest < 200)),
    )
    ink = np.zeros(image.shape[:2], bool)
    for dense, pale in pairs:
        ink |= _strokes(dense, pale, pitch_um=pitch_um)
    return ink


def _is_cold(density: np.ndarray, *, least: float, margin: float) -> np.ndarray:
    """Blue and green: red is taken out most; a violet blue takes as much out of green, but leaves blue alone."""
    red, green, blue = np.moveaxis(density, -1, 0)  # (h, w) each
    is_violet = (red > 0.85 * green) & (blue < 0.4 * green)
    return (red > least) & ((red - green > margin + 0.1 * green) | is_violet)


def _is_red(density: np.ndarray, *, least: float) -> np.ndarray:
    red, green, blue = np.moveaxis(density, -1, 0)  # (h, w) each
    return (green > least) & (red < 0.12 * green) & (blue > 0.7 * green)


def _strokes(dense: np.ndarray, pale: np.ndarray, *, pitch_um: float) -> np.ndarray:
    """Keep what is as wide as a stroke, and grow it over the paler rim."""
    core = cv2.morphologyEx(_padded_bytes(dense), cv2.MORPH_OPEN, _disc(STROKE_UM / 2 / pitch_um))
    if not core.any():
        return np.zeros(dense.shape, bool)
    near = cv2.dilate(core, _disc(_RIM_UM / pitch_um))
    rim = near & (_padded_bytes(pale) | _padded_bytes(dense))
    # One pixel more, where ink and its surroundings mix within a pixel.
    return cv2.dilate(rim | core, _disc(1))[1:-1, 1:-1].astype(bool)


def _padded_bytes(mask: np.ndarray) -> np.ndarray:
    return np.pad(mask, 1).astype(np.uint8)


def _disc(radius_px: float) -> np.ndarray:
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
