"""Pen ink on a thumbnail: strokes of blue, green, red and black marker, told from H&E by the ratio of their densities.

Dye weakens light by a factor, so the ratio of two channels' optical densities d = -ln(I / 255) is the dye's, however
thick it lies. Haematoxylin and eosin both take most out of green: d_R <= d_G, and d_B stays over half of d_G. Blue
and green ink take more out of red than out of green; red ink takes about as much out of blue as out of green and
leaves red alone; black ink takes the same out of all three.

Reference:
    A. Ruifrok, D. Johnston, "Quantification of histochemical staining by color deconvolution", Anal. Quant. Cytol.
    Histol. 23 (2001).
"""

from collections.abc import Callable

import cv2
import numpy as np

# A marker's tip is 300 µm and more. Dye specks, pigment, coal and vessels full of red cells are mostly narrower.
STROKE_UM = 120.0
_RIM_UM = 48.0  # How far a stroke's paler rim may reach over its dense part.
_DENSE_COLD, _DENSE_COLD_MARGIN, _DENSE_RED = 0.6, 0.12, 0.9  # densities of red, of red over green, and of green
_BLACKEST_INK = 16  # Darker than ink ever is: unlit edges of the scan.
_BAND_PX = 1 << 16  # Pixels whose densities are computed at a time, in the processor's cache.
_DENSITIES = -np.log((np.arange(256) + 1.0) / 256).astype(np.float32)  # (256,) of each intensity

_Colour = Callable[[np.ndarray], np.ndarray]  # uint8 RGB (h, w, 3) to bool (h, w)


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
    ink = np.zeros(image.shape[:2], bool)
    for dense, pale in ((_is_dense_cold, _is_pale_cold), (_is_dense_red, _is_pale_red), (_is_black, _is_grey)):
        _add_strokes(ink, image, dense, pale, pitch_um=pitch_um)
    return ink


def ink_coloured(image: np.ndarray) -> np.ndarray:
    """Mark what has the colour of dense ink in uint8 RGB (h, w, 3), however narrow: bool (h, w)."""
    density = _density(image)
    is_cold = _is_cold(density, least=_DENSE_COLD, margin=_DENSE_COLD_MARGIN)
    return is_cold | _is_red(density, least=_DENSE_RED) | _is_black(image)


def _add_strokes(ink: np.ndarray, image: np.ndarray, dense: _Colour, pale: _Colour, *, pitch_um: float) -> None:
    """Mark in `ink` what is as wide as a stroke, and its paler rim."""
    is_dense = _in_bands(dense, image)
    radius_px = max(1, round(STROKE_UM / 2 / pitch_um))
    # Most slides have no stroke, and a square is looked for much faster than a disc: what holds the disc holds it too.
    square = np.ones((2 * int(radius_px / 2**0.5) + 1,) * 2, np.uint8)
    left, top, width, height = cv2.boundingRect(cv2.erode(is_dense, square))
    if not width:
        return
    reach = 2 * radius_px + round(_RIM_UM / pitch_um) + 2
    rows = slice(max(0, top - reach), top + height + reach)
    columns = slice(max(0, left - reach), left + width + reach)
    # A mask's edge is the slide's or lies out of reach.
    pale_part = _in_bands(pale, image[rows, columns])
    ink[rows, columns] |= _strokes(is_dense[rows, columns], pale_part, pitch_um=pitch_um)


def _in_bands(colour: _Colour, image: np.ndarray) -> np.ndarray:
    """Mark the pixels of a colour in uint8 (h, w)."""
    mask = np.empty(image.shape[:2], np.uint8)
    n_rows = max(1, _BAND_PX // image.shape[1])
    for top in range(0, len(image), n_rows):
        mask[top : top + n_rows] = colour(image[top : top + n_rows])
    return mask


def brightest_channel(image: np.ndarray) -> np.ndarray:
    """The greatest of the three channels of uint8 RGB (h, w, 3), as uint8 (h, w)."""
    red, green, blue = cv2.split(image)
    return cv2.max(cv2.max(red, green), blue)


def _density(image: np.ndarray) -> np.ndarray:
    return cv2.LUT(image, _DENSITIES)  # (h, w, 3) float32


def _is_dense_cold(image: np.ndarray) -> np.ndarray:
    return _is_cold(_density(image), least=_DENSE_COLD, margin=_DENSE_COLD_MARGIN)


def _is_pale_cold(image: np.ndarray) -> np.ndarray:
    return _is_cold(_density(image), least=0.15, margin=0.05)


def _is_dense_red(image: np.ndarray) -> np.ndarray:
    return _is_red(_density(image), least=_DENSE_RED)


def _is_pale_red(image: np.ndarray) -> np.ndarray:
    return _is_red(_density(image), least=0.3)


def _is_black(image: np.ndarray) -> np.ndarray:
    """As dark as black ink, and grey."""
    brightest, spread = _brightness_and_spread(image)
    return (spread <= 4 + brightest // 4) & (brightest < 100) & (brightest >= _BLACKEST_INK)


def _is_grey(image: np.ndarray) -> np.ndarray:
    """Darker than glass, with the same taken out of all channels."""
    brightest, spread = _brightness_and_spread(image)
    return (spread <= 4 + brightest // 4) & (brightest < 200)


def _brightness_and_spread(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The greatest channel, and its distance to the least; uint8 (h, w) each."""
    red, green, blue = cv2.split(image)
    brightest = cv2.max(cv2.max(red, green), blue)
    return brightest, brightest - cv2.min(cv2.min(red, green), blue)


def _is_cold(density: np.ndarray, *, least: float, margin: float) -> np.ndarray:
    """Blue and green: red is taken out most; a violet blue takes as much out of green, but leaves blue alone."""
    red, green, blue = cv2.split(density)  # (h, w) each
    is_violet = (red > 0.85 * green) & (blue < 0.4 * green)
    return (red > least) & ((red - green > margin + 0.1 * green) | is_violet)


def _is_red(density: np.ndarray, *, least: float) -> np.ndarray:
    red, green, blue = cv2.split(density)  # (h, w) each
    return (green > least) & (red < 0.12 * green) & (blue > 0.7 * green)


def _strokes(dense: np.ndarray, pale: np.ndarray, *, pitch_um: float) -> np.ndarray:
    """Keep what is as wide as a stroke, and grow it over the paler rim."""
    core = cv2.morphologyEx(_padded_bytes(dense), cv2.MORPH_OPEN, _disc(STROKE_UM / 2 / pitch_um))
    near = cv2.dilate(core, _disc(_RIM_UM / pitch_um))
    rim = near & (_padded_bytes(pale) | _padded_bytes(dense))
    # One pixel more, where ink and its surroundings mix within a pixel.
    return cv2.dilate(rim | core, _disc(1))[1:-1, 1:-1].astype(bool)


def _padded_bytes(mask: np.ndarray) -> np.ndarray:
    return np.pad(mask, 1).astype(np.uint8)


def _disc(radius_px: float) -> np.ndarray:
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
