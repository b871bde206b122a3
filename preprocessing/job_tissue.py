"""The tissue that a job took a slide to have, for who draws over the slide afterwards."""

import logging
from pathlib import Path
from typing import Any

from acmil.preprocessing.config import PreprocessConfig
from acmil.preprocessing.job_folder import JobError, read_numbers
from acmil.preprocessing.slide import Slide
from acmil.preprocessing.tissue import Tissue, find_tissue, given_tissue
from acmil.preprocessing.tissue_outlines import outlines_path

logger = logging.getLogger(__name__)

_OPTIONS = ("tissue_mpp", "tissue", "remove_ink")


def tissue_of_job(slide: Slide, job: Path) -> Tissue:
    """Take the tissue of a slide from the outlines in a job folder, or else find it as the job did.

    Args:
        slide: The slide; its name is that of its outlines, `tissue/<slide_id>.geojson`.
        job: The folder; it need not be a job's. Where it has no outlines of the slide, tissue is found with the options
            of its `config.yaml`; where it has none, with the defaults, and the log says so.

    Returns:
        The tissue.

    Raises:
        SlideError: If the slide cannot be read, or its outlines cannot be used.
    """
    options = _options(job)
    mpp = options["tissue_mpp"]
    if outlines_path(job / "tissue", slide.slide_id).is_file():
        return given_tissue(slide, job / "tissue", mpp=mpp)
    return find_tissue(slide, mpp=mpp, preset=options["tissue"], remove_ink=options["remove_ink"])


def _options(job: Path) -> dict[str, Any]:
    """How the job finds tissue; the defaults where this is no job's folder."""
    options = {name: PreprocessConfig.model_fields[name].default for name in _OPTIONS}
    try:
        numbers = read_numbers(job / "config.yaml")
    except (JobError, FileNotFoundError):
        logger.info("%s has no config.yaml of a job: tissue is taken as found with the default options", job)
        return options
    return options | {name: numbers[name] for name in _OPTIONS if name in numbers}
