"""YAML option files: presets, merging with explicit options, and errors that name file, key and mend."""

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """An option, or a file of options, that cannot be used."""


def list_presets() -> list[str]:
    """Name the presets that come with the package, such as `train/acmil_ga.yaml`."""
    root = resources.files("acmil.configs")
    return sorted(
        f"{folder.name}/{file.name}"
        for folder in root.iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    )


def find_config_file(name: str | Path) -> Path:
    """Find a file of options: a path as given, or else the preset of that name.

    Args:
        name: A path, or a preset such as `train/acmil_ga.yaml` (a leading `configs/` is allowed).

    Raises:
        ConfigError: If neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    preset = path.as_posix().removeprefix("configs/")
    if preset in list_presets():
        return Path(str(resources.files("acmil.configs"))) / preset
    raise ConfigError(f"no configuration file {path}. Give a path, or one of the presets: {', '.join(list_presets())}.")


def read_options(path: Path) -> dict[str, Any]:
    """Read one YAML mapping of options.

    Raises:
        ConfigError: If the file is not YAML, or not a mapping of option names.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if options is None:
        return {}
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise ConfigError(f"{path} must hold one mapping of option names to values, such as 'epochs: 100'.")
    return options


def load_config(model: type[Model], file: str | Path | None = None, /, **options: Any) -> Model:
    """Build a config: explicit options win over the file, the file over the defaults.

    Args:
        model: The pydantic model of the command.
        file: A YAML file or the name of a preset; None for defaults only.
        **options: Options given explicitly.

    Raises:
        ConfigError: If a key is unknown (the nearest valid one is named), missing, or its value is not allowed.
    """
    path = find_config_file(file) if file is not None else None
    from_file = read_options(path) if path is not None else {}
    unknown = [key for key in [*from_file, *options] if key not in model.model_fields]
    if unknown:
        where = f" in {path}" if unknown[0] in from_file else ""
        raise ConfigError(f"unknown option '{unknown[0]}'{where}.{_nearest(unknown[0], model)}")
    try:
        return model.model_validate({**from_file, **options})
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, from_file, options, path) for item in error.errors())) from error


def _nearest(key: str, model: type[BaseModel]) -> str:
    close = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" Valid options: {', '.join(model.model_fields)}."


def _explain(
    item: Mapping[str, Any], from_file: Mapping[str, Any], options: Mapping[str, Any], path: Path | None
) -> str:
    """One pydantic error as one line: what, allowed, got, where."""
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not item["loc"]:  # of options that do not go together: their check says it all
        return message if path is None else f"{message.removesuffix('.')} ({path})."
    name = str(item["loc"][0])
    flag = "--" + name.replace("_", "-")
    if item["type"] == "missing":
        return f"{name} is missing. Give {flag}, or set '{name}:' in a --config file."
    where = f" ({path})" if name in from_file and name not in options else ""
    return f"{name} {message}, got {item['input']!r}{where}."


def dump_config(config: BaseModel) -> dict[str, Any]:
    """Turn a config into plain values that YAML and JSON can hold (paths as text)."""
    return config.model_dump(mode="json")
