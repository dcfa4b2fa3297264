"""The tables in data/resized/: what is known of each image, used or not."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import pandas as pd

from cnnpipe.errors import UserError

COLUMNS = {
    "path": str,  # in the archive
    "label": str,  # the class name
    "official": str,  # the split the data set's author put it in, or empty
    "width": int,  # of the original, pixels
    "height": int,
    "frames": int,  # of an animation, or pages; the first is taken
    "sha256": str,  # of the file's bytes
    "shard": str,  # the file that holds the resized image
    "row": int,  # and where in it
    "crc32": int,  # of the resized image's bytes
    "group": int,  # equal for copies of each other: the row of the first
}
CONFLICT_COLUMNS = {"path": str, "label": str, "group": int}
QUARANTINE_COLUMNS = {
    "path": str,
    "reason": str,
    "size": str,  # of the file, bytes; empty where it could not even be read
}
SPLIT_COLUMNS = {"path": str, "label": str, "split": str, "group": int}

_ROWS_READ = 10_000


def read(path: str | Path, columns: Mapping[str, type], made_by: str) -> pd.DataFrame:
    """A table of the pipeline, with the columns in their types.

    Args:
        path: a CSV file.
        columns: the columns and their types.
        made_by: the command that writes it, for the error.

    Raises:
        UserError: there is no such file, or not with these columns.
    """
    try:
        # Nothing is a missing value: a class may well be called NA or None.
        # In parts, since pandas first makes a Python object of each text.
        with pd.read_csv(
            path, dtype=columns, keep_default_na=False, na_filter=False, chunksize=_ROWS_READ
        ) as parts:
            return pd.concat([part[list(columns)] for part in parts], ignore_index=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: run `cnnpipe {made_by}` first") from None
    except (KeyError, ValueError) as error:  # pandas' errors of parsing are ValueErrors
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged, run `cnnpipe {made_by}` again: {reason}") from None


def write(table: pd.DataFrame, path: Path, columns: Mapping[str, type]) -> None:
    """The table as a CSV file with those columns in that order."""
    table.to_csv(
        path,
        columns=list(columns),
        index=False,
        lineterminator="\n",
        quoting=quoting(table["path"]),
    )


def quoting(texts: Iterable[str]) -> Literal[0, 2]:
    """How a CSV file is to be quoted for these texts to come back unchanged.

    Python's csv module leaves a lone carriage return unquoted, which ends the line for a reader.
    """
    return csv.QUOTE_NONNUMERIC if any("\r" in text for text in texts) else csv.QUOTE_MINIMAL


def read_class_names(folder: str | Path) -> list[str]:
    """The class names in the order of the network's outputs.

    Raises:
        UserError: there is no classes.json.
    """
    path = Path(folder) / "classes.json"
    try:
        names: list[str] = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: run `cnnpipe resize` first") from None
    return names


def write_class_names(class_names: list[str], folder: Path) -> None:
    """Puts classes.json into the folder."""
    (folder / "classes.json").write_text(json.dumps(class_names, indent=2) + "\n")
