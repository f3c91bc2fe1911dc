"""Rows on disk: JSON of one run, and CSV files in which a new row replaces the old one of the same measurement."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import environment

Row = dict[str, Any]
KEY = ("op", "case", "dtype", "threads", "peer", "cpu", "isa")


def csv_file(wish: str, device: str = "cpu") -> Path:
    """The file a user asked for; "device" is the one in benchmarks/results/ of this machine's CPU or GPU."""
    if wish != "device":
        return Path(wish)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{environment.results_name(device)}.csv"


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """A list of flat rows."""
    path.write_text(json.dumps(list(rows), indent=1) + "\n")


def update_csv(path: Path, rows: Sequence[Row]) -> None:
    """Replaces the rows of the same measurement (KEY), keeps the others, appends the rest."""
    old = read(path) if path.exists() else []
    merged = {tuple(str(row.get(name)) for name in KEY): row for row in [*old, *rows]}
    fields = list(dict.fromkeys(name for row in merged.values() for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())


def read(path: Path) -> list[Row]:
    """The rows of a JSON or CSV file; an empty CSV field is None, a number is a number."""
    if path.suffix == ".json":
        rows: list[Row] = json.loads(path.read_text())
        return rows
    with path.open(newline="") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
