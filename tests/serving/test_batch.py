"""Tests of `cnnpipe predict`: files, folders and stdin to a table, with an honest exit code."""

import csv
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cnnpipe.errors import UserError
from cnnpipe.serving import Predictor
from cnnpipe.serving.batch import predict_paths

CLASS_NAMES = ("cat, big", 'the "dog"')


@pytest.fixture
def predictor(make_classifier: Any) -> Predictor:
    return Predictor(make_classifier(class_names=CLASS_NAMES))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one of them in a folder of its own, what is no image, and a hidden file."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(["b.png", "more/a.png"]):
        pixels = np.random.default_rng(i).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden").write_text("no image")
    return folder


def interrupted(images: Iterable[bytes]) -> Iterator[np.ndarray]:
    raise KeyboardInterrupt


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_a_file_becomes_a_row_with_the_predictors_probabilities(
    predictor: Predictor, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "b.png"
    assert predict_paths(predictor, [str(path)], None).exit_code == 0
    out, err = capsys.readouterr()
    probabilities = predictor.predict([path.read_bytes()])[0]
    assert table(out) == [
        {
            "path": str(path),
            "prediction": CLASS_NAMES[probabilities.argmax()],
            "probability_cat, big": repr(float(probabilities[0])),
            'probability_the "dog"': repr(float(probabilities[1])),
        }
    ]
    # Written so that the very same number is read again.
    assert np.float32(table(out)[0]["probability_cat, big"]) == probabilities[0]
    assert err == ""


def test_a_folder_gives_its_images_in_order_and_names_the_rest(
    predictor: Predictor, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict_paths(predictor, [str(folder)], None).exit_code == 0
    out, err = capsys.readouterr()
    assert [row["path"] for row in table(out)] == [
        str(folder / "b.png"),
        str(folder / "more" / "a.png"),
    ]
    assert err == f"cnnpipe: {folder / 'notes.txt'}: not an image\n"


def test_a_named_file_that_is_no_image_is_an_error_and_the_others_are_done(
    predictor: Predictor, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict_paths(predictor, [str(folder / "notes.txt"), str(folder)], None).exit_code == 2
    assert len(table(capsys.readouterr().out)) == 2


def test_a_folder_without_a_single_image_is_an_error(
    predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    assert predict_paths(predictor, [str(tmp_path)], None).exit_code == 2
    assert table(capsys.readouterr().out) == []


def test_an_image_can_come_from_stdin(
    predictor: Predictor,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = (folder / "b.png").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert predict_paths(predictor, ["-"], None).exit_code == 0
    (row,) = table(capsys.readouterr().out)
    assert row["path"] == "-"
    assert float(row["probability_cat, big"]) == predictor.predict([data])[0, 0]


def test_an_empty_stdin_is_an_error(
    predictor: Predictor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert predict_paths(predictor, ["-"], None).exit_code == 2
    assert capsys.readouterr().err == "cnnpipe: -: empty file\n"


def test_a_missing_path_is_refused_before_anything_is_written(
    predictor: Predictor, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.png: no such file or folder"):
        predict_paths(predictor, [str(folder), "nowhere.png"], None)
    assert capsys.readouterr().out == ""


def test_an_empty_folder_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no files"):
        predict_paths(predictor, [str(tmp_path)], None)


def test_the_csv_file_holds_what_stdout_would(
    predictor: Predictor, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict_paths(predictor, [str(folder)], None)
    out = capsys.readouterr().out
    assert predict_paths(predictor, [str(folder)], str(tmp_path / "new" / "out.csv")).exit_code == 0
    assert (tmp_path / "new" / "out.csv").read_text(encoding="utf-8") == out
    assert capsys.readouterr().out == ""


def test_the_csv_file_is_whole_or_as_it_was(
    predictor: Predictor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.csv"
    target.write_text("before")

    monkeypatch.setattr(predictor, "each", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict_paths(predictor, [str(folder)], str(target))
    assert target.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "out.csv"]


def test_a_csv_file_that_cannot_be_written_is_named(
    predictor: Predictor, folder: Path, tmp_path: Path
) -> None:
    for target in (folder, folder / "notes.txt" / "out.csv"):
        with pytest.raises(UserError, match=r"(images|out\.csv): cannot be written: "):
            predict_paths(predictor, [str(folder / "b.png")], str(target))


def test_a_file_name_that_is_no_text_comes_out_as_it_is(
    predictor: Predictor, folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    odd = os.fsencode(folder) + b"/\xff.png"
    try:
        Path(os.fsdecode(odd)).write_bytes((folder / "b.png").read_bytes())
    except OSError:
        pytest.skip("this file system has no such names")
    assert predict_paths(predictor, [os.fsdecode(odd)], str(tmp_path / "out.csv")).exit_code == 0
    assert odd in (tmp_path / "out.csv").read_bytes()
    assert predict_paths(predictor, [os.fsdecode(odd)], None).exit_code == 0
    assert odd in capfdbinary.readouterr().out
