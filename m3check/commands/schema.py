"""`m3check schema`: the JSON Schema of report.json."""

from __future__ import annotations

import argparse
import json

from m3check.commands.talk import emit


def main(_arguments: argparse.Namespace) -> int:
    """Print the schema."""
    from m3check.report import jsonfile

    emit(json.dumps(jsonfile.schema(), indent=2))
    return 0
