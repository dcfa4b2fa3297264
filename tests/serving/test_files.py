"""Paths on an object storage: the same files in the same order as local ones, by their address."""

import io
import threading
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_storage import Storage
from PIL import Image

from cnnpipe.errors import RunFailed, UserError
from cnnpipe.serving import Predictor
from cnnpipe.serving.batch import Model, predict_paths, update_table
from cnnpipe.serving.files import File, find_files, read_ahead

MODEL = Model("models:/cnnpipe/3", "a" * 64)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


# "-" comes before "/", but a folder's files before those of the folder that goes on with a "-".
FILES = {
    "inbox/b.png": png(0), "inbox/a-b/c.png": png(1), "inbox/a/d.png": png(2),
    "inbox/notes.txt": b"no image", "inbox/.hidden.png": png(3), "inbox/.git/e.png": png(4),
}  # fmt: skip
VISIBLE = ["inbox/a/d.png", "inbox/a-b/c.png", "inbox/b.png", "inbox/notes.txt"]


@pytest.fixture(autouse=True)
def _in_both(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files in the current folder and in the bucket."""
    monkeypatch.chdir(tmp_path)
    for name, data in FILES.items():
        put(storage, name, data)


def put(storage: Storage, name: str, data: bytes) -> None:
    storage.put(name, data)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data)


@pytest.fixture
def predictor(make_classifier: Any) -> Predictor:
    return Predictor(make_classifier())


def found(*paths: str) -> dict[str, bytes]:
    with ExitStack() as stack:
        return {file.path: file.read() for file in find_files(list(paths), stack)}


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    return file.getvalue()


@pytest.mark.parametrize("address", ["s3://photos/inbox", "s3://photos/inbox/"])
def test_a_folder_holds_what_a_local_one_does_in_the_same_order(address: str) -> None:
    files = found(address)
    assert list(files) == [f"s3://photos/{name}" for name in VISIBLE]
    assert [*files.values()] == [*found("inbox").values()]
    assert [path.removeprefix("s3://photos/") for path in files] == [*found("inbox")]


def test_a_whole_bucket_is_a_folder() -> None:
    assert list(found("s3://photos")) == [f"s3://photos/{name}" for name in VISIBLE]


def test_an_object_is_a_file_that_was_named() -> None:
    with ExitStack() as stack:
        (file,) = find_files(["s3://photos/inbox/b.png"], stack)
    assert (file.path, file.named, file.read()) == ("s3://photos/inbox/b.png", True, png(0))


def test_an_archive_is_read_as_a_local_one_and_leaves_nothing(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(storage, "all.zip", archive())
    local = found("all.zip")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    assert found("s3://photos/all.zip") == {f"s3://photos/{name}": data
                                            for name, data in local.items()}  # fmt: skip
    assert list(scratch.iterdir()) == []
    storage.put("bad.zip", b"PK no archive")
    with pytest.raises(UserError, match=r"^s3://photos/bad.zip: the archive is damaged: "):
        found("s3://photos/bad.zip")


def test_the_table_is_the_local_one_but_for_the_paths(
    predictor: Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict_paths(predictor, ["inbox"], "local.csv").exit_code == 0
    assert predict_paths(predictor, ["s3://photos/inbox"], "remote.csv").exit_code == 0
    assert (
        Path("remote.csv").read_text().replace("s3://photos/", "") == Path("local.csv").read_text()
    )
    assert "cnnpipe: s3://photos/inbox/notes.txt: not an image\n" in capsys.readouterr().err


def test_an_update_scores_what_is_new(storage: Storage, predictor: Predictor) -> None:
    first = update_table(predictor, MODEL, ["s3://photos/inbox"], "scores.csv")
    assert (first.scored, first.skipped, len(first.unreadable)) == (3, 0, 1)
    storage.put("inbox/new.png", png(5))
    second = update_table(predictor, MODEL, ["s3://photos/inbox"], "scores.csv")
    assert (second.scored, second.skipped) == (1, 3)


def test_a_folder_that_is_not_there_yet_may_be_empty(predictor: Predictor) -> None:
    outcome = update_table(predictor, MODEL, ["s3://photos/later/"], "scores.csv")
    assert (outcome.scored, outcome.exit_code) == (0, 0)
    for path in ("s3://photos/later", "s3://photos/later/"):
        with pytest.raises(UserError, match=f"^{path}: no such object$"):
            found(path)
    with pytest.raises(UserError, match=r"^s3://photos/later: no such object$"):
        update_table(predictor, MODEL, ["s3://photos/later"], "scores.csv")


def test_an_object_that_is_gone_is_unreadable_as_a_file_would_be(
    storage: Storage, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cnnpipe.data import object_storage

    real = object_storage.addresses
    monkeypatch.setattr(
        object_storage, "addresses", lambda folder: [*real(folder), f"{folder}/gone.png"]
    )
    outcome = predict_paths(predictor, ["s3://photos/inbox"], "scores.csv")
    assert (outcome.scored, outcome.exit_code) == (3, 0)
    assert ("s3://photos/inbox/gone.png", "no such object") in outcome.unreadable


def test_a_storage_that_goes_away_fails_the_run_and_the_table_stays(
    storage: Storage, predictor: Predictor
) -> None:
    update_table(predictor, MODEL, ["s3://photos/inbox"], "scores.csv")
    before = Path("scores.csv").read_bytes()
    with ExitStack() as stack, pytest.raises(RunFailed, match="does not answer as it should"):
        files = find_files(["s3://photos/inbox"], stack)
        storage.failures = 99
        for _, read in read_ahead(files):
            read()
    with pytest.raises(RunFailed, match="does not answer as it should"):
        update_table(predictor, MODEL, ["s3://photos/inbox"], "scores.csv")
    assert Path("scores.csv").read_bytes() == before


@pytest.mark.parametrize("address", ["s3://me:hidden@photos/inbox", "s3://photos/a?token=hidden"])
def test_an_address_with_credentials_is_refused_without_them(address: str) -> None:
    with pytest.raises(UserError, match=r"^an address s3://... holds credentials") as failure:
        found(address)
    assert "hidden" not in str(failure.value)


def test_objects_are_read_ahead_a_few_at_a_time_and_files_when_their_turn_comes() -> None:
    together = threading.Barrier(3, timeout=60)
    begun = []

    def read(i: int) -> bytes:
        begun.append(i)
        if i < 3:
            together.wait()  # or it is broken: each waits for the others
        return bytes([i])

    files = [File(str(i), False, lambda i=i: read(i), is_object=i < 100) for i in range(200)]
    ahead = read_ahead(files)
    assert next(ahead)[1]() == bytes([0])
    assert max(begun) < 10
    results = [(file.path, get()) for file, get in ahead]
    assert results == [(str(i), bytes([i])) for i in range(1, 200)]
    assert begun[100:] == list(range(100, 200))
