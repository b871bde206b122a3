"""Strict JSON."""

import json

from acmil.json_file import write_json


def test_what_is_not_defined_is_null(tmp_path):
    write_json(tmp_path / "a.json", {"auroc": float("nan"), "ci": (float("-inf"), 1.0), "name": "µm", "n": 3})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=lambda name: 1 / 0) == {
        "auroc": None,
        "ci": [None, 1.0],
        "name": "µm",
        "n": 3,
    }
    assert "µm" in text
