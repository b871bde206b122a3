"""Options of the commands on cohorts and models: typed, documented, and the only place where their defaults stand."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from acmil.models import defaults

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positional: JsonDict = {"positional": True}  # read by the command line: the field is an argument as well as an option
NotNegatable: JsonDict = {"negatable": False}  # likewise: a flag whose name is a negation has no --no- form

_DEVICE = "Where to compute: auto (a GPU if there is one), cpu, cuda or cuda:N."
_FORCE = "Go on although encoder or resolution of the features differ from the model's."
_MPP_TOLERANCE = (
    "Share by which the tiles' µm per pixel may differ between slides; tiles cut by nominal magnification, as "
    "TRIDENT's, may differ by more from scanner to scanner."
)


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Training(_Options):
    """What every command that trains asks for: the recipe of the ACMIL reference unless told otherwise."""

    cohort: Path = Field(
        description="CSV with slide_id,label and, if there, case_id and split.", json_schema_extra=Positional
    )
    features: Path = Field(description="Folder of feature files, one a slide.")
    out: Path = Field(description="Folder to write; what is unfinished in it is resumed.")
    model: str = Field(
        defaults.MODEL, description="Model: acmil_ga (gated attention) or acmil_mha (multi-head attention)."
    )
    n_branches: int = Field(
        defaults.N_BRANCHES, ge=1, le=16, description="Attention branches K; 1 with mask_top_k 0 is ABMIL."
    )
    mask_top_k: int = Field(
        defaults.MASK_TOP_K, ge=0, description="Instances of highest attention that masking draws from; 0 turns it off."
    )
    mask_ratio: Fraction = Field(defaults.MASK_RATIO, description="Share of them masked at each training step.")
    hidden_features: int | None = Field(
        None, ge=1, description="Inner size L; by default chosen from the feature size as the reference does."
    )
    attention_features: int = Field(
        defaults.ATTENTION_FEATURES, ge=1, description="Hidden size of the attention gate (acmil_ga)."
    )
    n_heads: int = Field(defaults.N_HEADS, ge=1, description="Heads of each branch (acmil_mha).")
    dropout: Fraction = Field(defaults.DROPOUT, description="Dropout after the attention (acmil_mha).")
    epochs: int = Field(100, ge=1, description="Passes over the training bags.")
    learning_rate: float = Field(1e-4, gt=0, description="Highest learning rate of the cosine schedule.")
    min_learning_rate: float = Field(0.0, ge=0, description="Learning rate at the end of the schedule.")
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs of linear warm-up.")
    weight_decay: float = Field(1e-5, ge=0, description="Weight decay of AdamW.")
    mpp_tolerance: float = Field(defaults.MPP_TOLERANCE, ge=0, description=_MPP_TOLERANCE)
    batch_size: int = Field(1, ge=1, description="Bags a step.")
    split_seed: int = Field(0, ge=0, description="Seed of the split, where the cohort has no split column.")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="Share of cases for validation, where the cohort has no split column."
    )
    bootstrap_samples: int = Field(
        1000, ge=100, description="Bootstrap samples (of cases) behind each confidence interval."
    )
    device: Device = Field("auto", description=_DEVICE)
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="How training steps compute: fp32, bf16 (products alone), or auto: bf16 where the device has it.",
    )
    engine: Literal["auto", "eager", "resident"] = Field(
        "auto",
        description="What trains: eager (PyTorch), resident (fused steps on a GPU), or auto: resident where it is had.",
    )

    @model_validator(mode="after")
    def _options_are_of_the_model(self) -> Self:
        for name, model in (("attention_features", "acmil_ga"), ("n_heads", "acmil_mha"), ("dropout", "acmil_mha")):
            value = getattr(self, name)
            if self.model != model and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} is an option of {model} and does nothing for {self.model}, got {value}.")
        return self

    @model_validator(mode="after")
    def _rates_rise_and_then_fall(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be less than epochs {self.epochs}, got {self.warmup_epochs:g}.")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate must not be above learning_rate {self.learning_rate:g}, "
                f"got {self.min_learning_rate:g}."
            )
        return self


class TrainConfig(_Training):
    """Options of `acmil train`."""

    out: Path = Field(description="Run folder to write; an unfinished run in it is resumed.")
    seed: int = Field(0, ge=0, description="Seed of weights, order and masking; independent of the split.")
    test_fraction: Fraction = Field(
        0.2, description="Share of cases held out for the test, where the cohort has no split column."
    )


class CrossvalConfig(_Training):
    """Options of `acmil crossval`."""

    cohort: Path = Field(
        description="CSV with slide_id,label and, if there, case_id; slides whose split is test are kept out.",
        json_schema_extra=Positional,
    )
    out: Path = Field(description="Folder of run folders to write; what is finished in it is not trained again.")
    n_folds: int = Field(5, ge=2, description="Parts that the cases are dealt into; each is the test set in turn.")
    n_seeds: int = Field(5, ge=1, description="Runs of each fold, of the seeds 0, 1, ...; more can be added later.")
    split_seed: int = Field(0, ge=0, description="Seed of the folds and of the validation cases in each.")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="Share of a fold's other cases for validation, which selects the epoch."
    )


class EvaluateConfig(_Options):
    """Options of `acmil evaluate`."""

    run: Path = Field(description="Run folder of `acmil train`.", json_schema_extra=Positional)
    cohort: Path = Field(
        description="CSV with slide_id and, for metrics, label; case_id if there.", json_schema_extra=Positional
    )
    features: Path = Field(description="Folder of feature files, one a slide.")
    out: Path = Field(description="Folder for metrics.json, predictions.csv and plots.")
    split: Literal["held-out", "train", "val", "test", "all"] = Field(
        "held-out", description="Slides to use: held-out leaves out every case that the run trained or selected on."
    )
    bootstrap_samples: int = Field(
        1000, ge=100, description="Bootstrap samples (of cases) behind each confidence interval."
    )
    seed: int = Field(0, ge=0, description="Seed of the bootstrap.")
    device: Device = Field("auto", description=_DEVICE)
    force: bool = Field(False, description=_FORCE)


class HeatmapConfig(_Options):
    """Options of `acmil heatmap`."""

    run: Path = Field(description="Run folder of `acmil train`.", json_schema_extra=Positional)
    slides: list[Path] = Field(
        description="Slide files, folders of them, or a CSV with path and slide_id, such as the job's slides.csv.",
        min_length=1,
        json_schema_extra=Positional,
    )
    features: Path = Field(description="Folder of feature files, one a slide.")
    out: Path = Field(description="Folder for PNG, GeoJSON and per-tile CSV of each slide.")
    branch: str = Field(
        "mean", pattern=r"^(mean|\d+)$", description="Attention shown: mean over branches, or the number of one branch."
    )
    scale: Literal["relative", "percentile"] = Field(
        "relative",
        description="Colours: attention relative to uniform (slides compare), or percentile within the slide.",
    )
    outlines: Path | None = Field(
        None, description="Folder of GeoJSON outlines (slide_id.geojson) to draw on the maps."
    )
    outline_label: str = Field("outline", description="What the outlines are, for the legend.")
    thumbnail_mpp: float = Field(
        4.0, gt=0, description="Resolution of the picture in µm per pixel; coarser for slides too large for it."
    )
    opacity: float = Field(0.5, gt=0, le=1, description="Opacity of the colours over the tissue.")
    mpp_override: float | None = Field(
        None, gt=0, description="Level-0 resolution in µm per pixel, for slides that do not state theirs."
    )
    device: Device = Field("auto", description=_DEVICE)
    force: bool = Field(False, description=_FORCE)


class UmapConfig(_Options):
    """Options of `acmil umap`."""

    run: Path = Field(description="Run folder of `acmil train`.", json_schema_extra=Positional)
    cohort: Path = Field(description="CSV with slide_id and, if there, label and split.", json_schema_extra=Positional)
    features: Path = Field(description="Folder of feature files, one a slide.")
    out: Path = Field(description="Folder for umap.png and umap.csv.")
    split: Literal["held-out", "train", "val", "test", "all"] = Field(
        "held-out", description="Slides to use: held-out leaves out every case that the run trained or selected on."
    )
    tiles_per_slide: int = Field(
        100, ge=4, description="Tiles drawn from each slide: a quarter the most attended, the rest at random."
    )
    space: Literal["hidden", "encoder"] = Field(
        "hidden", description="Features to project: the model's instance features, or the encoder's."
    )
    n_neighbors: int = Field(15, ge=2, description="UMAP's neighbourhood size.")
    min_dist: float = Field(0.1, ge=0, lt=1, description="UMAP's least distance between points.")
    seed: int = Field(0, ge=0, description="Seed of the sampling and of UMAP.")
    device: Device = Field("auto", description=_DEVICE)
    force: bool = Field(False, description=_FORCE)


class DemoConfig(_Options):
    """Options of `acmil demo`: real texture, planted lesions, made to test the pipeline; of no medical meaning."""

    out: Path = Field(Path("demo"), description="Folder for everything the demo makes.")
    seed: int = Field(0, ge=0, description="Seed of the training runs.")
    cohort_seed: int = Field(0, ge=0, description="Seed of the planted-lesion cohort.")
    n_slides: int = Field(80, ge=12, description="Slides to compose.")
    difficulty: float | None = Field(
        None, ge=0, le=1, description="How faint the lesions are: 0 plain, 1 invisible; default as measured."
    )
    epochs: int = Field(100, ge=1, description="Training epochs.")
    workers: int | None = Field(None, ge=1, description="Processes and reader threads; default: one a core.")
    device: Device = Field("auto", description=_DEVICE)


class FeaturesInfoConfig(_Options):
    """Options of `acmil features info`."""

    path: Path = Field(description="A feature file of any format, or a folder of them.", json_schema_extra=Positional)


class FeaturesVerifyConfig(_Options):
    """Options of `acmil features verify`."""

    path: Path = Field(description="A feature file of any format, or a folder of them.", json_schema_extra=Positional)
    cohort: Path | None = Field(None, description="CSV with slide_id: each of its slides must have features.")
    encoder: str | None = Field(
        None, description="Encoder that the features must be of; by default that of most of the files."
    )
    mpp_tolerance: float = Field(defaults.MPP_TOLERANCE, ge=0, description=_MPP_TOLERANCE)


class FeaturesConvertConfig(_Options):
    """Options of `acmil features convert`; what the files state themselves must not be stated differently."""

    path: Path = Field(description="A feature file of any format, or a folder of them.", json_schema_extra=Positional)
    out: Path = Field(description="Folder for the converted files, and cohort.csv where the source holds labels.")
    to: Literal["acmil", "trident", "clam", "stamp", "acmil-reference"] = Field(
        "acmil", description="Format to write: acmil, trident, clam (h5 and pt), stamp or acmil-reference."
    )
    slides: Path | None = Field(
        None, description="Folder of the slides, which state what the files do not: size and resolution of level 0."
    )
    level0_mpp: float | None = Field(None, gt=0, description="Resolution of level 0 in µm per pixel.")
    level0_width: int | None = Field(None, ge=1, description="Width of the slide in level-0 pixels.")
    level0_height: int | None = Field(None, ge=1, description="Height of the slide in level-0 pixels.")
    tile_px: int | None = Field(None, ge=1, description="Side of a tile in pixels at the tiles' resolution.")
    tile_level0_px: int | None = Field(None, ge=1, description="Side of a tile in level-0 pixels.")
    tile_mpp: float | None = Field(None, gt=0, description="Resolution of the tiles in µm per pixel.")
    overlap_px: int | None = Field(None, ge=0, description="Overlap of neighbouring tiles in pixels of the tile.")
    coords_mpp: float | None = Field(
        None, gt=0, description="µm per unit of the coordinates, for files that do not state the unit."
    )
    encoder: str | None = Field(None, description="Encoder that the features are of, for files that do not state it.")
    without_geometry: bool = Field(
        False,
        description="Convert to acmil although geometry is missing: enough to train, not for heatmaps.",
        json_schema_extra=NotNegatable,
    )
    cohort: Path | None = Field(
        None, description="CSV with slide_id,label, for acmil-reference, which keeps labels with the features."
    )
