"""The command line: parses options into the config models and calls one function a command."""

import errno
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from acmil import __version__
from acmil.config import (
    CrossvalConfig,
    DemoConfig,
    EvaluateConfig,
    FeaturesConvertConfig,
    FeaturesInfoConfig,
    FeaturesVerifyConfig,
    HeatmapConfig,
    TrainConfig,
    UmapConfig,
)
from acmil.config_file import ConfigError, load_config
from acmil.preprocessing.config import PreprocessConfig
from acmil.terminal import TerminalProgress, configure_logging

DONE, FAILED, MISUSED = 0, 1, 2

app = App(
    name="acmil",
    version=__version__,
    help="Whole-slide images to a trained, tested and explainable classifier.",
    help_epilogue="Everywhere: --config FILE.yaml (options from a file or preset), --quiet, --debug (show tracebacks).",
    result_action="return_value",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # what was finished is told of below
)
samples = App(name="samples", help="Real sample slides, weights and bags out of published packages, checksummed.")
app.command(samples)
features = App(name="features", help="Look into, check and convert feature files of acmil and of other tools.")
app.command(features)
encoders = App(name="encoders", help="The registry of backbones: dimension, resolution, licence, access.")
app.command(encoders)


def _option(name: str, field: Any) -> inspect.Parameter:
    """One field of a config model as a parameter that is None unless given."""
    extra = field.json_schema_extra or {}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if extra.get("positional") else inspect.Parameter.KEYWORD_ONLY
    default = field.get_default(call_default_factory=True)
    tail = "[required]" if default is PydanticUndefined else "" if default is None else f"[default: {default}]"
    parameter = Parameter(
        help=f"{field.description} {tail}".strip(),
        show_default=False,
        negative=None if extra.get("negatable", True) else (),
        negative_iterable=(),
    )
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[field.annotation | None, parameter])


def _command(
    name: str, model: type[BaseModel], target: str, summary: str, *, parent: App = app, alias: Sequence[str] = ()
) -> None:
    """Register a command: its options are the model's fields, its work the function `module:function`."""

    def run(*arguments: Any, **keywords: Any) -> int:
        given = {
            key: value for key, value in signature.bind(*arguments, **keywords).arguments.items() if value is not None
        }
        config, quiet = given.pop("config", None), given.pop("quiet", False)
        given.pop("debug", None)  # read where errors are shown
        settings = load_config(model, config, **given)
        module, function = target.split(":")
        with TerminalProgress(quiet=quiet) as progress:
            result = getattr(import_module(module), function)(settings, progress=progress)
        return _announce(result, quiet=quiet)

    fields = [_option(key, field) for key, field in model.model_fields.items()]
    fields.sort(key=lambda parameter: parameter.kind)
    shared = [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None,
                Parameter(
                    help="YAML file of options, or a preset such as train/acmil_ga.yaml; flags win over it.",
                    show_default=False,
                ),
            ],
        ),
        inspect.Parameter(
            "quiet",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, Parameter(help="Warnings and errors only.", negative=())],
        ),
        inspect.Parameter(
            "debug",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, Parameter(help="Show the traceback of an error.", negative=())],
        ),
    ]
    signature = inspect.Signature([*fields, *shared])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__doc__ = summary
    parent.command(run, name=name, alias=tuple(alias))


def _announce(result: Any, *, quiet: bool) -> int:
    """Print a command's summary line(s), or, quiet, what it found wrong; a count of failures sets the exit status."""
    text = "\n".join(map(str, result)) if isinstance(result, list) else str(result)
    shown = getattr(result, "failures", "") if quiet else text
    if shown:
        print(shown)
    return FAILED if getattr(result, "failed", 0) else DONE


_command(
    "demo",
    DemoConfig,
    "acmil.demo.pipeline:demo",
    "Run the whole pipeline on real tissue with planted lesions, offline, on any machine.",
)
_command(
    "preprocess",
    PreprocessConfig,
    "acmil.preprocessing.job:preprocess",
    "Turn slides into tissue outlines, tiles and feature files; resumes.",
)
_command("train", TrainConfig, "acmil.training_run:train", "Train one model on the bags of a cohort.")
_command(
    "crossval",
    CrossvalConfig,
    "acmil.crossval:crossval",
    "Cross-validate: folds by case times seeds, one run folder each, and pooled statistics; resumes.",
)
_command(
    "evaluate",
    EvaluateConfig,
    "acmil.evaluation:evaluate",
    "Metrics with confidence intervals of a run on a cohort; predictions only where labels are missing.",
    alias=["eval"],
)
_command("heatmap", HeatmapConfig, "acmil.heatmaps:heatmaps", "Attention maps over slides: PNG, GeoJSON, per-tile CSV.")
_command(
    "umap", UmapConfig, "acmil.projection:umap", "UMAP of instance features, coloured by attention, label and slide."
)
_command(
    "info",
    FeaturesInfoConfig,
    "acmil.feature_commands:info",
    "Show what feature files hold, and what geometry they do not state.",
    parent=features,
)
_command(
    "verify",
    FeaturesVerifyConfig,
    "acmil.feature_commands:verify",
    "Check feature files: truncation, NaN, shapes, encoder, missing slides; exit status 1 when something is wrong.",
    parent=features,
)
_command(
    "convert",
    FeaturesConvertConfig,
    "acmil.feature_conversion:convert",
    "Convert feature files (TRIDENT, CLAM, STAMP, ACMIL reference, .npz bags) to acmil's format, or acmil's to theirs.",
    parent=features,
)


@samples.command(name="list")
def list_samples() -> int:
    """List the samples with licence and provenance."""
    from acmil.samples import sample_table

    for row in sample_table():
        print(f"{row.pop('name')}")
        for name, value in row.items():
            print(f"  {name.replace('_', ' ') + ':':<12} {value}")
    return DONE


@samples.command(name="fetch")
def fetch(name: str, /, *, out: Path | None = None) -> int:
    """Fetch one sample into the cache, or into a folder.

    Args:
        name: A name that `acmil samples list` shows.
        out: Folder to copy the file to.
    """
    from acmil.samples import fetch_sample

    print(fetch_sample(name, out=out))
    return DONE


@encoders.command(name="list")
def list_encoders() -> int:
    """List the encoders that `--encoder` knows by name; any other timm model works as well."""
    from acmil.preprocessing.encoders.registry import REGISTRY
    from acmil.preprocessing.encoders.tables import encoder_table

    print(encoder_table(REGISTRY))
    return DONE


@encoders.command(name="show")
def show_encoder(name: str, /) -> int:
    """Show all that is known of one encoder, and how to get it.

    Args:
        name: A name that `acmil encoders list` shows.
    """
    from acmil.preprocessing.encoders.registry import encoder_facts
    from acmil.preprocessing.encoders.tables import encoder_page

    print(encoder_page(encoder_facts(name)))
    return DONE


@app.command(name="doctor")
def examine_machine() -> int:
    """Show what this machine has, which path each stage will take on it, and what will be slow and why."""
    from acmil.doctor import examine

    return _announce(examine(), quiet=False)


def run_command_line(arguments: Sequence[str]) -> int:
    """Run one command line; 0: done, 1: the input or the run failed, 2: the command line is wrong."""
    configure_logging(quiet="--quiet" in arguments)
    try:
        status = app(list(arguments), exit_on_error=False, print_error=False)
    except UnusedCliTokensError as error:
        unused = ", ".join(map(repr, error.unused_tokens or ()))
        mend = "A name with spaces needs quotes; --help says what the command takes."
        return _complain(error, arguments, MISUSED, said=f"nothing takes {unused}. {mend}")
    except (CycloptsError, ConfigError) as error:
        return _complain(error, arguments, MISUSED)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        return DONE
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        where = f" for {error.filename}" if error.filename else ""
        said = f"no space left on the disk{where}. Free some: the same command goes on from there." if full else None
        return _complain(error, arguments, FAILED, said=said)
    except (ValueError, ImportError) as error:
        return _complain(error, arguments, FAILED)
    except Exception as error:  # noqa: BLE001  a traceback is for --debug
        return _complain(error, arguments, FAILED, said=_in_words(error))
    except KeyboardInterrupt:
        return _complain(
            KeyboardInterrupt("stopped; what was finished is kept, the same command goes on from there"), (), 130
        )
    return status if isinstance(status, int) else DONE


def _in_words(error: Exception) -> str:
    """Say what became of an error that nobody foresaw; memory that runs out is a RuntimeError of torch's."""
    text = f"{error}".strip().split("\n")[0]
    if any(words in text.lower() for words in ("out of memory", "can't allocate memory", "not enough memory")):
        return f"not enough memory: {text}. Lower batch_size or the model's sizes, or use another device."
    return f"unexpected {type(error).__name__}: {text}. Give --debug to see where."


def _complain(error: BaseException, arguments: Sequence[str], status: int, *, said: str | None = None) -> int:
    if "--debug" in arguments:
        traceback.print_exception(error)
    print(f"error: {said or error}", file=sys.stderr)
    return status


def main() -> None:
    """Entry point of the console script."""
    logging.captureWarnings(True)
    sys.exit(run_command_line(sys.argv[1:]))
