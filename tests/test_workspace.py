"""Tests of files that are whole or not there."""

import os
from pathlib import Path

import pytest

from cnnpipe.workspace import repository_root, whole_file, whole_folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_root_is_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert repository_root() == tmp_path.resolve()
    assert repository_root().is_absolute()


def test_in_an_experiments_workspace_the_root_is_the_repositorys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "workspace").mkdir()
    monkeypatch.chdir(tmp_path / "workspace")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert repository_root() == tmp_path.resolve()


def test_a_whole_file_appears_with_its_folders(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a" / "b" / "file.txt") as part:
        part.write_text("new")
        assert not (tmp_path / "a" / "b" / "file.txt").exists()
    assert (tmp_path / "a" / "b" / "file.txt").read_text() == "new"
    assert names_in(tmp_path / "a" / "b") == ["file.txt"]


def test_a_whole_file_takes_the_place_of_the_old_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with whole_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names_in(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as part:
        part.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file.txt"]


def test_a_file_that_was_never_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file.txt"]


def test_a_whole_folder_takes_the_place_of_the_old_one_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "raw"
    for content in ("first", "second"):
        with whole_folder(folder) as part:
            assert names_in(part) == []
            (part / f"{content}.txt").write_text(content)
            assert not (folder / f"{content}.txt").exists()
        assert names_in(folder) == [f"{content}.txt"]
        assert names_in(tmp_path / "data") == ["raw"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with pytest.raises(error), whole_folder(folder) as part:
        (part / "new.txt").write_text("ne")
        raise error
    assert names_in(folder) == ["old.txt"]
    assert names_in(tmp_path) == ["raw"]


def test_others_may_read_the_folder(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "raw") as part:
        assert os.stat(part).st_mode & 0o077 == 0
    assert os.stat(tmp_path / "raw").st_mode & 0o777 == 0o755
