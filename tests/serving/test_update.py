"""Tests of `cnnpipe predict --update`: a table that grows by what is new, and loses nothing."""

import csv
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cnnpipe.errors import UserError
from cnnpipe.serving import Predictor
from cnnpipe.serving.batch import Model, Outcome, predict_paths, scores_json, update_table

MODEL = Model("models:/cnnpipe/3", "a" * 64)
HEADER = ["path", "sha256", "model", "model_sha256", "prediction",
          "probability_cat", "probability_dog"]  # fmt: skip


@pytest.fixture
def predictor(make_classifier: Any) -> Predictor:
    return Predictor(make_classifier())


@pytest.fixture
def inbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["a.png", "deep/b.png"]):
        picture(Path("inbox", name), i)
    return Path("inbox")


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def rows(path: str | Path = "scores.csv") -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def update(predictor: Predictor, *paths: str, model: Model = MODEL) -> Outcome:
    return update_table(predictor, model, list(paths), "scores.csv")


def interrupted(images: Iterable[bytes]) -> Iterator[np.ndarray]:
    next(iter(images))
    raise KeyboardInterrupt


def test_the_first_time_everything_is_scored_and_the_second_nothing(
    predictor: Predictor, inbox: Path
) -> None:
    first = update(predictor, "inbox")
    assert (first.scored, first.skipped, first.unreadable, first.exit_code) == (2, 0, [], 0)
    assert Path("scores.csv").read_text().splitlines()[0].split(",") == HEADER
    row = rows()[0]
    data = (inbox / "a.png").read_bytes()
    expected = predictor.predict([data])[0]
    assert row["path"] == "inbox/a.png"
    assert (row["model"], row["model_sha256"]) == (MODEL.name, MODEL.sha256)
    assert [float(row["probability_cat"]), float(row["probability_dog"])] == expected.tolist()
    before = Path("scores.csv").stat()
    second = update(predictor, "inbox")
    assert (second.scored, second.skipped) == (0, 2)
    after = Path("scores.csv").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # untouched


def test_what_is_new_or_changed_is_added_and_all_else_stays(
    predictor: Predictor, inbox: Path
) -> None:
    update(predictor, "inbox")
    text = Path("scores.csv").read_text()
    picture(inbox / "a.png", 7)
    shutil.copy(inbox / "deep/b.png", inbox / "c.png")  # the same bytes, another path
    outcome = update(predictor, "inbox")
    assert (outcome.scored, outcome.skipped) == (2, 1)
    assert Path("scores.csv").read_text().startswith(text)
    assert [row["path"] for row in rows()[2:]] == ["inbox/a.png", "inbox/c.png"]
    assert rows()[0]["sha256"] != rows()[2]["sha256"]


def test_a_file_that_is_named_twice_is_scored_once(predictor: Predictor, inbox: Path) -> None:
    outcome = update(predictor, "inbox", "inbox/a.png")
    assert (outcome.scored, outcome.skipped) == (2, 1)
    assert len(rows()) == 2


@pytest.mark.parametrize(
    ("before", "now", "scored"),
    [
        (MODEL, Model("models:/cnnpipe/4", "a" * 64), 2),
        (MODEL, Model("models:/cnnpipe/3", "b" * 64), 2),  # the third of another registry
        (Model("m.safetensors", "b" * 64), Model("m.safetensors", "c" * 64), 2),
        (Model("m.safetensors", "b" * 64), Model("copies/m.safetensors", "b" * 64), 0),
    ],
)
def test_another_model_scores_anew_and_its_rows_come_after(
    predictor: Predictor, inbox: Path, before: Model, now: Model, scored: int
) -> None:
    update(predictor, "inbox", model=before)
    kept = rows()
    assert update(predictor, "inbox", model=now).scored == scored
    assert rows()[:2] == kept
    assert [Model(row["model"], row["model_sha256"]) for row in rows()[2:]] == [now] * scored


def test_a_table_of_other_classes_is_refused_and_stays(
    predictor: Predictor, make_classifier: Any, inbox: Path
) -> None:
    update(predictor, "inbox")
    before = Path("scores.csv").read_bytes()
    other = Predictor(make_classifier(class_names=("cat", "fox")))
    with pytest.raises(UserError) as error:
        update(other, "inbox")
    message = str(error.value)
    assert message.startswith("scores.csv: its columns are path, ")
    assert "probability_cat, probability_dog, but the scores of models:/cnnpipe/3 are" in message
    assert "probability_cat, probability_fox: name another file" in message
    assert Path("scores.csv").read_bytes() == before
    assert list(Path().glob("*.unreadable.csv")) == [Path("scores.unreadable.csv")]


def test_a_table_that_predict_made_without_update_is_refused(
    predictor: Predictor, inbox: Path
) -> None:
    predict_paths(predictor, ["inbox"], "scores.csv")
    with pytest.raises(UserError, match="its columns are path, prediction, probability_cat"):
        update(predictor, "inbox")


@pytest.mark.parametrize("damage", ["inbox/a.png,12\n", 'inbox/a.png,12,"m'])
def test_a_damaged_line_is_named_and_nothing_is_written(
    predictor: Predictor, inbox: Path, damage: str
) -> None:
    update(predictor, "inbox")
    with open("scores.csv", "a") as file:
        file.write(damage)
    before = Path("scores.csv").read_bytes()
    with pytest.raises(UserError, match=r"scores\.csv: line 4 is damaged: \d values instead of 7"):
        update(predictor, "inbox")
    assert Path("scores.csv").read_bytes() == before


def test_a_last_line_without_its_end_is_ended(predictor: Predictor, inbox: Path) -> None:
    update(predictor, "inbox/a.png")
    Path("scores.csv").write_text(Path("scores.csv").read_text().rstrip("\n"))
    update(predictor, "inbox")
    assert [row["path"] for row in rows()] == ["inbox/a.png", "inbox/deep/b.png"]


def test_an_interruption_leaves_the_table_as_it_was(
    predictor: Predictor, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(predictor, "inbox")
    before = Path("scores.csv").read_bytes()
    picture(inbox / "new.png", 5)

    def half(images: Iterable[bytes]) -> Iterator[np.ndarray]:
        next(iter(images))
        yield np.float32([0.25, 0.75])
        raise KeyboardInterrupt

    for each in (interrupted, half):
        with monkeypatch.context() as patch:
            patch.setattr(predictor, "each", each)
            with pytest.raises(KeyboardInterrupt):
                update(predictor, "inbox")
        assert Path("scores.csv").read_bytes() == before
    assert not list(Path().glob(".*.part"))
    assert update(predictor, "inbox").scored == 1


def test_an_update_waits_for_another_and_skips_what_that_has_scored(
    predictor: Predictor, inbox: Path
) -> None:
    update_table(predictor, MODEL, ["inbox/a.png"], "theirs.csv")
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys\nfrom cnnpipe.workspace import locked\n"
         "with locked('.scores.csv.lock', 'x'):\n    print('held', flush=True)\n"
         "    sys.stdin.read()\n"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout and holder.stdout.readline() == "held\n"
    done: list[Outcome] = []
    waiting = threading.Thread(target=lambda: done.append(update(predictor, "inbox")))
    waiting.start()
    waiting.join(0.5)
    assert not done and not Path("scores.csv").exists()
    Path("theirs.csv").rename("scores.csv")
    holder.communicate()
    waiting.join()
    assert (done[0].scored, done[0].skipped) == (1, 1)
    assert len(rows()) == 2


def test_what_is_no_image_is_listed_as_of_this_time_alone(
    predictor: Predictor, inbox: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (inbox / "notes, old.txt").write_text("no image")
    (inbox / "empty.png").touch()
    (inbox / "lost.png").symlink_to("nowhere")  # no file at all
    outcome = update(predictor, "inbox")
    bad = [("inbox/empty.png", "empty file"), ("inbox/notes, old.txt", "not an image")]
    assert (outcome.scored, outcome.unreadable, outcome.exit_code) == (2, bad, 0)
    listed = rows("scores.unreadable.csv")
    assert [(row["path"], row["reason"]) for row in listed] == bad
    err = capsys.readouterr().err
    assert "cnnpipe: inbox/empty.png: empty file\n" in err
    (inbox / "empty.png").unlink()
    assert update(predictor, "inbox").unreadable == bad[1:]
    assert len(rows("scores.unreadable.csv")) == 1
    (inbox / "notes, old.txt").unlink()
    update(predictor, "inbox")
    assert Path("scores.unreadable.csv").read_text() == "path,reason\n"


def test_a_named_file_that_is_no_image_fails_and_the_rest_is_scored(
    predictor: Predictor, inbox: Path
) -> None:
    Path("notes.txt").write_text("no image")
    outcome = update(predictor, "notes.txt", "inbox")
    assert (outcome.scored, outcome.exit_code) == (2, 2)


def test_an_empty_inbox_is_no_failure_and_leaves_a_table(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("inbox").mkdir()
    outcome = update(predictor, "inbox")
    assert (outcome.scored, outcome.exit_code) == (0, 0)
    assert Path("scores.csv").read_text() == ",".join(HEADER) + "\n"
    picture(Path("inbox/a.png"), 0)
    assert update(predictor, "inbox").scored == 1


def test_an_inbox_of_bad_files_alone_is_no_failure(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("inbox").mkdir()
    Path("inbox/x").write_text("no image")
    assert update(predictor, "inbox").exit_code == 0


def test_the_table_may_lie_in_the_inbox(predictor: Predictor, inbox: Path) -> None:
    for _ in range(2):
        outcome = update_table(predictor, MODEL, ["inbox"], "inbox/scores.csv")
        assert outcome.unreadable == []
    assert len(rows("inbox/scores.csv")) == 2


@pytest.mark.parametrize("target", ["inbox", "inbox/a.png/scores.csv"])
def test_a_table_that_cannot_be_there_is_named(
    predictor: Predictor, inbox: Path, target: str
) -> None:
    with pytest.raises(UserError, match=rf"{target}: cannot be (written|read): "):
        update_table(predictor, MODEL, ["inbox"], target)


def test_odd_names_come_back_as_they_were(predictor: Predictor, inbox: Path) -> None:
    odd = 'a "b",\r\nc.png'
    picture(inbox / odd, 3)
    update(predictor, "inbox")
    assert f"inbox/{odd}" in [row["path"] for row in rows()]
    picture(inbox / "z.png", 4)
    assert update(predictor, "inbox").skipped == 3
    assert len(rows()) == 4


def packed(kind: str, members: dict[str, bytes]) -> str:
    path = f"photos.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    return path


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_an_archive_is_scored_like_the_folder_that_it_holds(
    predictor: Predictor, inbox: Path, kind: str
) -> None:
    data = {str(path.relative_to(inbox)): path.read_bytes() for path in inbox.rglob("*.png")}
    bad = {"notes.txt": b"no image", ".hidden": b"no image", "__MACOSX/x.png": b"no image"}
    path = packed(kind, {**data, **bad})
    outcome = update(predictor, path)
    assert (outcome.scored, outcome.exit_code) == (2, 0)
    link = [] if kind == "zip" else [(f"{path}/link.png", "a link, not a file")]
    assert outcome.unreadable == [*link, (f"{path}/notes.txt", "not an image")]
    assert [row["path"] for row in rows()] == [f"{path}/a.png", f"{path}/deep/b.png"]
    of_archive = [list(row.values())[4:] for row in rows()]
    update_table(predictor, MODEL, ["inbox"], "folder.csv")
    assert of_archive == [list(row.values())[4:] for row in rows("folder.csv")]
    assert update(predictor, path).skipped == 2
    assert not list(Path().glob(".untar*"))
    predict_paths(predictor, [path], "plain.csv")
    assert [row["path"] for row in rows("plain.csv")] == [f"{path}/a.png", f"{path}/deep/b.png"]


def test_archives_that_do_harm_are_refused_by_name(predictor: Predictor, inbox: Path) -> None:
    path = packed("zip", {"../out.png": b"x"})
    with pytest.raises(UserError, match=r"photos\.zip: \.\./out\.png leads out of the archive"):
        update(predictor, path)
    whole = Path(packed("zip", {"a.png": b"x" * 1000})).read_bytes()
    Path(path).write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"photos\.zip: the archive is damaged: "):
        update(predictor, path)
    assert not Path("scores.csv").exists()


def test_a_photo_with_an_archive_behind_it_is_a_photo(predictor: Predictor, inbox: Path) -> None:
    path = packed("zip", {"b.png": (inbox / "a.png").read_bytes()})
    Path("both.png").write_bytes((inbox / "a.png").read_bytes() + Path(path).read_bytes())
    update(predictor, "both.png")
    assert [row["path"] for row in rows()] == ["both.png"]


def test_the_outcome_has_a_count_for_every_class(predictor: Predictor, inbox: Path) -> None:
    outcome = update(predictor, "inbox")
    predictions = [row["prediction"] for row in rows()]
    assert outcome.classes == {name: predictions.count(name) for name in ("cat", "dog")}
    outcome.classes = type(outcome.classes)({"cat, big": 1, "cat; big": 2, "dog/x": 0, "été": 3})
    assert outcome.metrics == {
        "scored": 2, "skipped": 0, "unreadable": 0,
        "classes/cat_ big": 3, "classes/dog_x": 0, "classes/été": 3,
    }  # fmt: skip


def test_the_table_for_mlflow_is_the_json_that_it_reads(tmp_path: Path) -> None:
    for count in (0, 1, 3):
        with scores_json(tmp_path / "scores.json", ["path", 'probability_"x"']) as keep:
            for i in range(count):
                keep([f"{i}\udcff", 0.1 * i])
        content = json.loads((tmp_path / "scores.json").read_text())
        assert content == {
            "columns": ["path", 'probability_"x"'],
            "data": [[f"{i}\udcff", 0.1 * i] for i in range(count)],
        }
