"""Options of preprocessing: typed, documented, and the only place where their defaults stand."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
QUALITY_LIMITS = ("min_focus", "max_pen", "max_fold", "max_blood", "max_dark", "min_stain")
_FINEST_MPP, _COARSEST_MPP = 0.05, 20.0  # µm/px; a slide scanner's pixels are 0.1 to 2


class PreprocessConfig(BaseModel):
    """Options of `acmil preprocess`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    slides: list[Path] = Field(
        min_length=1,
        description="Slide files, folders of them, or CSV files of path[,slide_id][,mpp].",
        json_schema_extra={"positional": True},
    )
    out: Path = Field(description="Job folder to write; what is already done in it is kept.")
    encoder: str = Field(
        min_length=1, description="A name of `acmil encoders list`, a timm model, or hf-hub:organisation/model."
    )
    weights: Path | None = Field(
        None,
        description="Local weights file (.safetensors, .pth, .pt, .bin, .torch); by default the hub's are fetched.",
    )
    tile_px: int = Field(256, ge=16, le=8192, description="Side of a tile in px.")
    tile_mpp: float = Field(
        0.5, ge=_FINEST_MPP, le=_COARSEST_MPP, description="Resolution of the tiles in µm/px: 0.5 is about 20x."
    )
    overlap_px: int = Field(0, ge=0, description="Overlap of neighbouring tiles in px of the tile.")
    min_tissue: float = Field(0.25, ge=0, le=1, description="Least share of a tile that must be tissue.")
    mpp_override: float | None = Field(
        None,
        ge=_FINEST_MPP,
        le=_COARSEST_MPP,
        description="Resolution of level 0 in µm/px of every slide, in place of the file's; a CSV's mpp wins.",
    )
    tissue_mpp: float = Field(
        8.0, ge=0.5, le=128, description="Resolution of the thumbnail that tissue is found on, in µm/px."
    )
    tissue: Literal["brightfield", "dark"] = Field(
        "brightfield",
        description="What tissue looks like: brightfield: stained, on glass; dark: brighter than the background.",
    )
    remove_ink: bool = Field(
        True, description="Take pen ink out of the tissue; turn off for blue stains such as trichrome."
    )
    tissue_from: Path | None = Field(
        None,
        description="Folder of <slide_id>.geojson, as a job writes and QuPath edits them, to use in place of finding.",
    )
    stain_normalisation: Literal["none", "macenko", "reinhard"] = Field(
        "none",
        description="Bring the H&E colours of each slide, estimated once a slide, to fixed ones before encoding.",
    )
    reader: Literal["auto", "openslide", "pillow", "cucim"] = Field(
        "auto",
        description="Library that reads slides: auto takes OpenSlide, decodes plain JPEG tiles itself, takes Pillow "
        "for plain images; cucim is an extra.",
    )
    workers: int | None = Field(None, ge=1, le=256, description="Threads that read slides; by default one a core.")
    batch_size: int = Field(64, ge=1, le=65536, description="Tiles that the encoder gets at a time.")
    device: Device = Field("auto", description="Where to compute: auto (a GPU if there is one), cpu, cuda or cuda:N.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="How the encoder computes: auto takes bf16 where the hardware has it."
    )
    compile: bool = Field(
        False, description="Have torch.compile make faster code of the encoder: minutes at the start, for large jobs."
    )
    feature_dtype: Literal["float16", "float32"] = Field("float16", description="Type of the features on disk.")
    min_focus: float | None = Field(
        None, ge=0, description="Drop tiles of less focus: 0.3 drops what is blurred badly; see the README."
    )
    max_pen: float | None = Field(None, ge=0, le=1, description="Drop tiles with more of their area in pen ink.")
    max_fold: float | None = Field(None, ge=0, le=1, description="Drop tiles with more of their area folded.")
    max_blood: float | None = Field(None, ge=0, le=1, description="Drop tiles with more of their area in red cells.")
    max_dark: float | None = Field(
        None, ge=0, le=1, description="Drop tiles with more of their area dark and not in H&E's colours."
    )
    min_stain: float | None = Field(None, ge=0, description="Drop tiles whose tissue has less mean optical density.")
    previews: bool = Field(True, description="Write a picture of each slide's tissue and tiles.")
    save_tiles: Literal["none", "folder", "tar"] = Field(
        "none",
        description="Write the tiles as the encoder gets them: tiles/<slide_id>/x_y.jpg, or a tar a slide; slides that "
        "were done without them are done again.",
    )
    tile_format: Literal["jpeg", "png"] = Field(
        "jpeg", description="Format of the tiles' pictures: jpeg (quality 90) or png (lossless)."
    )

    @model_validator(mode="after")
    def _stains_are_of_brightfield(self) -> Self:
        if self.stain_normalisation != "none" and self.tissue == "dark":
            raise ValueError(f"stain_normalisation must be none with tissue dark, got {self.stain_normalisation}.")
        return self

    @model_validator(mode="after")
    def _quality_is_of_brightfield(self) -> Self:
        if self.quality_limits and self.tissue == "dark":
            name = next(iter(self.quality_limits))
            raise ValueError(f"{name} must not be given with tissue dark, of which no quality is measured.")
        return self

    @model_validator(mode="after")
    def _overlap_is_less_than_a_tile(self) -> Self:
        if self.overlap_px >= self.tile_px:
            raise ValueError(f"overlap_px must be less than tile_px {self.tile_px}, got {self.overlap_px}.")
        return self

    @property
    def quality_limits(self) -> dict[str, float]:
        """The limits that are given, by the options' names."""
        values = {name: getattr(self, name) for name in QUALITY_LIMITS}
        return {name: value for name, value in values.items() if value is not None}
