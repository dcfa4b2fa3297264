"""Many files to a table of predictions, once or added to again and again: `cnnpipe predict`."""

import csv
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal, TextIO

from tqdm import tqdm

from cnnpipe.data import manifest
from cnnpipe.data.decode import UnreadableImage
from cnnpipe.errors import UserError, printable
from cnnpipe.serving.files import File, find_files, read_ahead
from cnnpipe.serving.predictor import Predictor
from cnnpipe.workspace import locked, named_file

Row = list[str | float]


@dataclass(frozen=True)
class Model:
    """Which model a score is by."""

    name: str
    """models:/NAME/VERSION, or a model file's path."""
    sha256: str
    """Of the model file."""

    @property
    def identity(self) -> tuple[str, str]:
        """What must be equal for two models to be the same.

        Of a registered version both, since another registry has the same numbers; of a model file
        its content, wherever it lies.
        """
        return (self.name if self.name.startswith("models:/") else "", self.sha256)

    @property
    def tags(self) -> dict[str, str]:
        """For an MLflow run."""
        return {"model": self.name, "model_sha256": self.sha256}


@dataclass
class Outcome:
    """What became of the files."""

    scored: int = 0
    skipped: int = 0
    """They had been scored already."""
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason."""
    classes: Counter[str] = field(default_factory=Counter)
    """How many were scored as each class."""
    exit_code: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        """The counts, under names that MLflow takes."""
        classes = Counter[str]()
        for name, number in self.classes.items():
            allowed = re.sub(r"[^-.:\w ]", "_", name)
            classes[f"classes/{allowed}"[:250]] += number
        counts = {"scored": self.scored, "skipped": self.skipped}
        return {**counts, "unreadable": len(self.unreadable), **classes}

    def to_dict(
        self, model: str, csv_file: str, run_id: str | None, experiment_id: str | None
    ) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "model": model,
            "scored": self.scored,
            "skipped": self.skipped,
            "unreadable": [{"path": path, "reason": why} for path, why in self.unreadable],
            "csv": csv_file,
            "run_id": run_id,
            "experiment_id": experiment_id,
            "classes": dict(self.classes),
        }

    def write_unreadable(self, path: Path) -> None:
        """The list of what is no image: path and reason."""
        with named_file(str(path)) as file:
            quoting = manifest.quoting(chain.from_iterable(self.unreadable))
            writer = csv.writer(file, lineterminator="\n", quoting=quoting)
            writer.writerow(["path", "reason"])
            writer.writerows(self.unreadable)


def columns(class_names: Sequence[str], update: bool) -> list[str]:
    """The names of the table's columns, for one that is added to or one that is not."""
    origin = ["sha256", "model", "model_sha256"] if update else []
    return ["path", *origin, "prediction", *(f"probability_{name}" for name in class_names)]


def predict_paths(
    predictor: Predictor,
    paths: list[str],
    csv_file: str | None,
    keep: Callable[[Row], object] = lambda row: None,
) -> Outcome:
    """Writes a row a file: path, prediction and the probability of each class.

    Files that are no images are named on stderr and have no row. The exit code is 2 where a file
    that was named, or all of a folder's or archive's, are no images.

    Args:
        predictor: the model.
        paths: image files, folders or archives of them, or "-" for an image on standard input.
        csv_file: where to write; None is stdout.
        keep: is given each row, too.

    Raises:
        UserError: a path does not exist, or the table cannot be written.
    """
    outcome = _outcome(predictor)
    with ExitStack() as stack:
        files = find_files(paths, stack)
        if csv_file is not None:
            output = stack.enter_context(named_file(csv_file))
        else:
            # File names need not be text: bytes that are no UTF-8 come out as they went in.
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="surrogateescape")
            output = sys.stdout
        writer = csv.writer(
            output, lineterminator="\n", quoting=_quoting(files, predictor.class_names)
        )
        writer.writerow(columns(predictor.class_names, update=False))
        for path, _, *scores in _score(predictor, files, outcome, lambda path, sha256: False):
            keep([path, *scores])
            writer.writerow([path, *scores])
    if not outcome.scored:
        outcome.exit_code = 2
    return outcome


def update_table(
    predictor: Predictor,
    model: Model,
    paths: list[str],
    csv_file: str,
    keep: Callable[[Row], object] = lambda row: None,
) -> Outcome:
    """Adds a row to the table for each file that this model has not scored with these bytes.

    Rows that are there stay. The table takes its place whole; who updates it at the same time
    waits. What is no image is listed beside it, in `STEM.unreadable.csv`, as of this time alone.
    The exit code is 2 where a file that was named is no image.

    Args:
        predictor: the model.
        model: which it is.
        paths: as for `predict_paths`; a folder or an archive may be empty.
        csv_file: the table; where there is none it is made.
        keep: is given each new row, too.

    Raises:
        UserError: a path does not exist, or the table is of other classes, damaged, or cannot be
            written.
    """
    table = Path(csv_file)
    listed = table.with_name(f"{table.stem}.unreadable.csv")
    header = columns(predictor.class_names, update=True)
    outcome = _outcome(predictor)
    with ExitStack() as stack:
        try:
            lock = table.with_name(f".{table.name}.lock")
            stack.enter_context(locked(lock, f"an update of {csv_file}", wait=True))
        except OSError as error:
            raise UserError(f"{csv_file}: cannot be written: {error.strerror}") from None
        known = _known(table, header, model)
        files = [
            file
            for file in find_files(paths, stack, may_be_empty=True)
            if os.path.abspath(file.path) not in map(os.path.abspath, (table, listed))
        ]

        def skip(path: str, sha256: str) -> bool:
            key = _key(path, sha256)
            if key in known:
                return True
            known.add(key)
            return False

        scores = _score(predictor, files, outcome, skip)
        rows = ([path, sha, model.name, model.sha256, *rest] for path, sha, *rest in scores)
        first = next(rows, None)
        if first is not None or not table.exists():
            with named_file(csv_file) as file:
                writer = csv.writer(
                    file, lineterminator="\n", quoting=_quoting(files, predictor.class_names)
                )
                if table.exists():
                    with _open(table) as before:
                        for line in before:
                            file.write(line)
                    if not line.endswith(("\n", "\r")):  # somebody's editor left it out
                        file.write("\n")
                else:
                    writer.writerow(header)
                for row in chain([first] if first else [], rows):
                    keep(row)
                    writer.writerow(row)
        outcome.write_unreadable(listed)
    return outcome


@contextmanager
def scores_json(path: Path, names: Sequence[str]) -> Iterator[Callable[[Row], object]]:
    """Takes rows and writes them to the file in MLflow's form of a table, one by one.

    Args:
        path: the file.
        names: of the columns.
    """
    with path.open("w") as file:
        file.write(json.dumps({"columns": names})[:-1] + ', "data": [')
        separators = chain([""], repeat(","))
        yield lambda row: file.write(f"{next(separators)}\n{json.dumps(row)}")
        file.write("]}")


def _outcome(predictor: Predictor) -> Outcome:
    return Outcome(classes=Counter(dict.fromkeys(predictor.class_names, 0)))


def _open(table: Path) -> TextIO:
    """The table to read, as `named_file` writes it."""
    return table.open(newline="", encoding="utf-8", errors="surrogateescape")


def _quoting(files: Sequence[File], class_names: Sequence[str]) -> Literal[0, 2]:
    return manifest.quoting([*(file.path for file in files), *class_names])


def _score(
    predictor: Predictor,
    files: Sequence[File],
    outcome: Outcome,
    skip: Callable[[str, str], bool],
) -> Iterator[Row]:
    """Path, SHA-256, prediction and probabilities of each file, and the outcome as it comes about.

    Args:
        predictor: the model.
        files: what to score.
        outcome: is told.
        skip: whether a file of that path and SHA-256 is left out.
    """
    begun: deque[tuple[File, str]] = deque()

    def unreadable(file: File, reason: object) -> None:
        print(f"cnnpipe: {printable(f'{file.path}: {reason}')}", file=sys.stderr)
        outcome.unreadable.append((file.path, str(reason)))
        if file.named:
            outcome.exit_code = 2

    def images() -> Iterator[bytes]:
        begun_files = tqdm(
            read_ahead(files), "predicting", len(files), unit="image", disable=None
        )  # fmt: skip
        for file, read in begun_files:
            try:
                data = read()
            except (UnreadableImage, OSError) as error:
                unreadable(file, error.strerror if isinstance(error, OSError) else error)
                continue
            sha256 = hashlib.sha256(data).hexdigest()
            if skip(file.path, sha256):
                outcome.skipped += 1
                continue
            begun.append((file, sha256))
            yield data

    for row in predictor.each(images()):
        file, sha256 = begun.popleft()
        if isinstance(row, UnreadableImage):
            unreadable(file, row)
            continue
        prediction = predictor.class_names[int(row.argmax())]
        outcome.scored += 1
        outcome.classes[prediction] += 1
        yield [file.path, sha256, prediction, *map(float, row)]


def _known(table: Path, header: list[str], model: Model) -> set[bytes]:
    """The keys of what the table has by this model.

    Raises:
        UserError: it is of other classes, or damaged.
    """
    known: set[bytes] = set()
    try:
        with _open(table) as file:
            reader = csv.reader(file)
            found = next(reader, [])
            if found != header:
                raise UserError(
                    f"{table}: its columns are {', '.join(found) or 'none'}, but the scores of "
                    f"{model.name} are {', '.join(header)}: name another file for them"
                )
            for row in reader:
                if len(row) != len(header):
                    raise csv.Error(f"{len(row)} values instead of {len(header)}")
                path, sha256, *by = row[:4]
                if Model(*by).identity == model.identity:
                    known.add(_key(path, sha256))
    except FileNotFoundError:
        pass
    except csv.Error as error:
        raise UserError(
            f"{table}: line {reader.line_num} is damaged: {error}: mend it, or name another file"
        ) from None
    except OSError as error:
        raise UserError(f"{table}: cannot be read: {error.strerror}") from None
    return known


def _key(path: str, sha256: str) -> bytes:
    """16 bytes for a file and its content: of millions, these fit into memory."""
    text = f"{sha256} {path}".encode(errors="surrogateescape")
    return hashlib.sha256(text).digest()[:16]
