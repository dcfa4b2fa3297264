"""Many files to a table of predictions: what `cnnpipe predict` does."""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from cnnpipe.data import manifest
from cnnpipe.data.decode import UnreadableImage
from cnnpipe.errors import UserError, printable
from cnnpipe.serving.predictor import Predictor
from cnnpipe.workspace import named_file


def predict_paths(predictor: Predictor, paths: list[str], csv_file: str | None) -> int:
    """Writes a row a file: path, prediction and the probability of each class.

    Files that are no images are named on stderr and have no row.

    Args:
        predictor: the model.
        paths: image files, folders of them, or "-" for an image on standard input.
        csv_file: where to write; None is stdout.

    Returns:
        The exit code: 2 where a file that was named, or all of a folder's, are no images.

    Raises:
        UserError: a path does not exist, or the table cannot be written.
    """
    files = list(_files(paths))
    # File names need not be text: bytes that are no UTF-8 come out as they went in.
    if csv_file is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        return _write(predictor, files, sys.stdout)
    with named_file(csv_file) as file:
        return _write(predictor, files, file)


def _write(predictor: Predictor, files: list[tuple[str, bool]], output: TextIO) -> int:
    texts = [*(path for path, _ in files), *predictor.class_names]
    writer = csv.writer(output, lineterminator="\n", quoting=manifest.quoting(texts))
    columns = [f"probability_{name}" for name in predictor.class_names]
    writer.writerow(["path", "prediction", *columns])
    code = 0
    num_read = 0
    for path, named in tqdm(files, "predicting", unit="image", disable=None):
        try:
            data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
            # One at a time: the same sums in the same order as in a request of one image.
            row = predictor.predict([data])[0]
        except (UnreadableImage, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"cnnpipe: {printable(f'{path}: {reason}')}", file=sys.stderr)
            code = 2 if named else code
            continue
        num_read += 1
        prediction = predictor.class_names[int(row.argmax())]
        writer.writerow([path, prediction, *map(float, row)])
    return code if num_read else 2


def _files(paths: list[str]) -> Iterator[tuple[str, bool]]:
    """The files, and whether each was named itself."""
    for path in paths:
        if path != "-" and Path(path).is_dir():
            found = sorted(
                file
                for file in Path(path).rglob("*")
                if file.is_file()
                and not any(p.startswith(".") for p in file.relative_to(path).parts)
            )
            if not found:
                raise UserError(f"{path}: the folder holds no files")
            yield from ((str(file), False) for file in found)
        elif path == "-" or Path(path).exists():
            yield path, True
        else:
            raise UserError(f"{path}: no such file or folder")
