"""The reader of plain images (PNG, JPEG, BMP, TIFF) through Pillow (https://pillow.readthedocs.io)."""

import logging
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from acmil.preprocessing.geometry import MPP_RANGE_UM_PER_PX
from acmil.preprocessing.readers import Rectangle, SlideError, SlideFacts, whiten, within
from acmil.preprocessing.readers.description import described_mpp

logger = logging.getLogger(__name__)

MAX_DECODED_BYTES = 2**30  # 1 GiB: 16384 x 16384 px in colour, 32768 x 32768 px in grey or with a palette.

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
# As Pillow holds them in memory.
_BYTES_PER_PX = {"1": 1, "L": 1, "P": 1, "LA": 4, "PA": 4, "RGB": 4, "RGBA": 4, "RGBX": 4, "YCbCr": 4}
_REFUSED = {
    "CMYK": "its ink colours need the printer's profile to become RGB. Convert it to 8-bit RGB with that profile.",
    "LAB": "its colours are CIELAB. Convert it to 8-bit RGB.",
}
_DEEP = "more than 8 bits a channel have no one way to be shown in 8. Convert it to 8 bits with a range of your choice."
_MEND_SIZE = (
    "Convert it to a tiled pyramid, which is read piece by piece: "
    "vips tiffsave IMAGE OUT.tif --tile --pyramid --compression jpeg --bigtiff."
)
_UM_PER_INCH, _UM_PER_CM = 25_400.0, 10_000.0
# Numbers of TIFF tags.
_WIDTH, _HEIGHT, _BITS, _DESCRIPTION, _ORIENTATION = 256, 257, 258, 270, 274
_X_RESOLUTION, _Y_RESOLUTION, _UNIT = 282, 283, 296
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow lets through of a damaged file, over its own OSError and UnidentifiedImageError.
_READ_ERRORS = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, MemoryError)
_guard = threading.Lock()


class PillowReader:
    """Reads one plain image as a slide of one level.

    A plain image can only be decoded whole. It is, once, when the first pixels are asked for, and held until `close`;
    the header alone decides before that whether it fits `max_decoded_bytes`. In a job up to five slides are open at a
    time. Of a TIFF of several pages the largest is read (a pyramid's level 0); two pages of that size are refused, as
    the one that is meant cannot be told.

    Resolution is taken from what ImageJ and OME write into a TIFF's description, else from TIFF's, PNG's, BMP's and
    JFIF's tags where they are in inches, centimetres or metres, and within what a microscope gives (0.05 to 20 µm/px).
    72, 96 or 300 dpi are for printers and screens and count as none.

    Greys and palettes become RGB, transparency is laid on white, and a picture with an EXIF or TIFF orientation is
    turned upright, as viewers show it: coordinates are of the upright picture, and turning takes the memory twice for
    a moment. CMYK, CIELAB, floating point and more than 8 bits a channel are refused. Embedded colour profiles are not
    applied, as OpenSlide does not.

    Args:
        path: The file.
        slide_id: Name of the slide in messages.
        max_decoded_bytes: Largest memory that the decoded image may take.

    Raises:
        SlideError: If the file is missing, no such image, of a kind that is refused, or too large.
    """

    def __init__(self, path: Path, *, slide_id: str, max_decoded_bytes: int = MAX_DECODED_BYTES) -> None:
        self._path = path
        self._slide_id = slide_id
        self._lock = threading.Lock()
        self._closed = False
        self._image: Image.Image | None = None
        if not path.exists():
            raise SlideError(f"slide '{slide_id}': no such file: {path}")
        with self._file() as image:
            description = _description(image)  # the first page's, for all
            self._page = self._largest_page(image)
            self._check(image, max_decoded_bytes)
            self._orientation = _orientation(image)
            self._facts = _facts(image, description, turned=self._orientation >= 5)
        if self._orientation != 1:
            logger.info("%s: turned upright (orientation %d): %s", slide_id, self._orientation, path)

    @property
    def facts(self) -> SlideFacts:
        """What the file says of itself."""
        return self._facts

    def read(self, level: int, x_level0_px: int, y_level0_px: int, width_px: int, height_px: int) -> np.ndarray:
        """Read a rectangle as uint8 RGB (height_px, width_px, 3); see `SlideReader.read`."""
        image = self._decoded()
        pixels = np.full((height_px, width_px, 3), 255, np.uint8)
        inside = within(x_level0_px, y_level0_px, width_px, height_px, size=image.size)
        if inside is not None:
            x, y, part = inside.x, inside.y, image.crop(_corners(inside))
            row, column = y - y_level0_px, x - x_level0_px
            pixels[row : row + inside.height, column : column + inside.width] = _rgb(part)
        return pixels

    def close(self) -> None:
        """Let the image go; reading afterwards is an error."""
        with self._lock:
            self._closed = True
            self._image = None

    @contextmanager
    def _file(self) -> Iterator[Image.Image]:
        """Open the file, with this reader's limit in place of Pillow's; its errors become ours."""
        try:
            with _without_pillow_limit(), Image.open(self._path, formats=_FORMATS) as image:
                yield image
        except SlideError:
            raise
        except _READ_ERRORS as error:
            raise SlideError(
                f"slide '{self._slide_id}': cannot read {self._path} as PNG, JPEG, BMP or TIFF: "
                f"{error or type(error).__name__}. The file is damaged or of another kind; copy it anew or convert it."
            ) from error

    def _decoded(self) -> Image.Image:
        """The image in memory; decoded by the thread that comes first."""
        with self._lock:
            if self._closed:
                raise SlideError(f"slide '{self._slide_id}': read after it was closed: {self._path}")
            if self._image is None:
                with self._file() as image:
                    _seek(image, self._page)
                    image.load()
                self._image = image
                if self._orientation != 1 and not isinstance(image, TiffImageFile):  # Pillow turns TIFFs by itself.
                    self._image = image.transpose(_UPRIGHT[self._orientation])
            return self._image

    def _largest_page(self, image: Image.Image) -> int:
        """Go to the page to read, and say which it is."""
        if not isinstance(image, TiffImageFile):
            return 0
        sizes = []
        for page in range(getattr(image, "n_frames", 1)):
            _seek(image, page)
            sizes.append(image.size)
        largest = max(sizes, key=lambda size: size[0] * size[1])
        if sizes.count(largest) > 1:
            raise SlideError(
                f"slide '{self._slide_id}': a TIFF must have one page of its largest size, got "
                f"{sizes.count(largest)} of {largest[0]} x {largest[1]} px, such as a stack or one a channel "
                f"({self._path}). Save the page that is meant as an image of its own."
            )
        _seek(image, sizes.index(largest))
        return sizes.index(largest)

    def _check(self, image: Image.Image, max_bytes: int) -> None:
        """Refuse what cannot be shown in 8-bit RGB or does not fit."""
        what = f"slide '{self._slide_id}': an image must"
        if image.mode in _REFUSED:
            raise SlideError(f"{what} be grey or RGB, got {image.mode} ({self._path}): {_REFUSED[image.mode]}")
        if image.mode not in _BYTES_PER_PX or _is_deep(image):
            raise SlideError(f"{what} have 8 bits a channel, got {image.mode} of more ({self._path}): {_DEEP}")
        decoded = image.width * image.height * _BYTES_PER_PX[image.mode]
        if decoded > max_bytes:
            raise SlideError(
                f"{what} take at most {max_bytes / 2**20:,.0f} MiB decoded, got {decoded / 2**20:,.0f} MiB for "
                f"{image.width} x {image.height} px ({self._path}). {_MEND_SIZE}"
            )


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Switch off Pillow's guard against decompression bombs, whose limit is lower and whose error names no mend.

    The guard is one variable for the whole process: one thread at a time, for the time of one decoding.
    """
    with _guard:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _seek(image: Image.Image, page: int) -> None:
    if isinstance(image, TiffImageFile):
        image.seek(page)


def _is_deep(image: Image.Image) -> bool:
    """Whether channels have more than 8 bits, which Pillow would cut to their high byte in RGB."""
    if isinstance(image, TiffImageFile):
        return max(np.atleast_1d(image.tag_v2.get(_BITS, 1))) > 8
    return isinstance(image, PngImageFile) and ";16" in str(image.tile)


def _orientation(image: Image.Image) -> int:
    # The base class's: PNG's own decodes the image to look for EXIF behind the pixels, where none of note is.
    orientation = Image.Image.getexif(image).get(_ORIENTATION, 1)
    return orientation if orientation in _UPRIGHT else 1


def _description(image: Image.Image) -> str:
    """A TIFF's description; empty where there is none."""
    text = str(image.tag_v2.get(_DESCRIPTION, "")) if isinstance(image, TiffImageFile) else ""
    return text.encode("latin-1", errors="replace").decode("utf-8", errors="replace")  # Pillow takes it for Latin-1.


def _facts(image: Image.Image, description: str, *, turned: bool) -> SlideFacts:
    """Read what the header says; `turned` swaps the axes."""
    width, height = image.size
    if isinstance(image, TiffImageFile):  # Pillow's size of a turned TIFF differs between its versions.
        width, height = int(image.tag_v2[_WIDTH]), int(image.tag_v2[_HEIGHT])
    x, y = _stated_mpp(image, description, size=(width, height))
    mpp = _plausible(x), _plausible(y)
    size = width, height
    if turned:
        size, mpp = size[::-1], mpp[::-1]
    return SlideFacts(
        vendor=str(image.format).lower(),
        level_sizes=(size,),
        level_downsamples=(1.0,),
        mpp_x=mpp[0],
        mpp_y=mpp[1],
        magnification=None,
        bounds=Rectangle(0, 0, *size),
    )


def _stated_mpp(image: Image.Image, description: str, *, size: tuple[int, int]) -> tuple[float, float]:
    """Pitch in µm/px along x and y by the file's tags; NaN where there is none in a real unit."""
    unit_um: float | None
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        unit_um = {2: _UM_PER_INCH, 3: _UM_PER_CM}.get(tags.get(_UNIT, 0))
        density = float(tags.get(_X_RESOLUTION, 0)), float(tags.get(_Y_RESOLUTION, 0))
        if (described := described_mpp(description, size=size, density=density)) is not None:
            return described
    elif image.format in ("JPEG", "MPO"):
        unit_um = {1: _UM_PER_INCH, 2: _UM_PER_CM}.get(image.info.get("jfif_unit", 0))
        density = image.info.get("jfif_density", (0, 0))
    else:  # PNG and BMP state pixels per metre, which Pillow gives per inch.
        unit_um, density = _UM_PER_INCH, image.info.get("dpi", (0, 0))
    x, y = (unit_um / float(value) if unit_um and float(value) > 0 else float("nan") for value in density)
    return x, y


def _plausible(mpp: float) -> float | None:
    """Return `mpp` if a microscope can have it."""
    low, high = MPP_RANGE_UM_PER_PX
    return mpp if low <= mpp <= high else None  # False for NaN as well.


def _corners(area: Rectangle) -> tuple[int, int, int, int]:
    return area.x, area.y, area.x + area.width, area.y + area.height


def _rgb(part: Image.Image) -> np.ndarray:
    """Turn any of the modes into uint8 RGB (h, w, 3), transparency laid on white."""
    if "A" in part.mode or "transparency" in part.info:
        return whiten(np.asarray(part.convert("RGBA")))
    if part.mode == "L":
        return cv2.cvtColor(np.asarray(part), cv2.COLOR_GRAY2RGB)
    return np.asarray(part.convert("RGB"))
