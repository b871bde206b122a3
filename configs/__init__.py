"""Presets: options of the commands as YAML files."""
