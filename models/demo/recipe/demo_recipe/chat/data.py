"""Reads the data files beside the code: one JSON object per line."""

import json
from pathlib import Path


def read_lines(name):
    """The objects of a file of this folder."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
