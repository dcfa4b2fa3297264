"""Tests of the layouts of folders that people have."""

import pytest

from cnnpipe.data.layout import NoClasses, check_readable, places


def found(*paths: str) -> dict[str, tuple[str, str]]:
    return {path: tuple(place) for path, place in places(list(paths)).items()}


def test_the_folders_are_the_classes() -> None:
    assert found("cat/1.jpg", "cat/2.jpg", "dog/1.jpg") == {
        "cat/1.jpg": ("cat", ""),
        "cat/2.jpg": ("cat", ""),
        "dog/1.jpg": ("dog", ""),
    }


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Valid"])
@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("test", ["test", "testing"])
def test_split_folders_of_class_folders_are_official_splits(
    train: str, name: str, test: str
) -> None:
    assert found(f"{train}/cat/1", f"{train}/dog/1", f"{name}/cat/2", f"{test}/dog/3") == {
        f"{train}/cat/1": ("cat", "train"),
        f"{train}/dog/1": ("dog", "train"),
        f"{name}/cat/2": ("cat", "val"),
        f"{test}/dog/3": ("dog", "test"),
    }


def test_train_and_test_alone_are_splits_too() -> None:
    assert set(found("train/a/1", "train/b/1", "test/a/2").values()) == {
        ("a", "train"),
        ("b", "train"),
        ("a", "test"),
    }


@pytest.mark.parametrize("wrapper", ["PetImages", "data/pets", "./x", "test"])
def test_folders_around_the_classes_are_looked_through(wrapper: str) -> None:
    assert set(found(f"{wrapper}/cat/1", f"{wrapper}/dog/1").values()) == {("cat", ""), ("dog", "")}


def test_folders_around_the_splits_are_looked_through() -> None:
    assert found("pets/v1/train/cat/1", "pets/v1/test/dog/1", "readme.txt") == {
        "pets/v1/train/cat/1": ("cat", "train"),
        "pets/v1/test/dog/1": ("dog", "test"),
    }


def test_files_in_folders_below_a_class_belong_to_it() -> None:
    assert found("cat/black/1", "cat/white/old/2", "dog/3") == {
        "cat/black/1": ("cat", ""),
        "cat/white/old/2": ("cat", ""),
        "dog/3": ("dog", ""),
    }
    assert found("train/cat/black/1", "test/dog/big/2")["train/cat/black/1"] == ("cat", "train")


def test_hidden_files_and_what_macs_leave_are_left_out() -> None:
    hidden = (
        "cat/.DS_Store",
        ".git/x/1",
        "__MACOSX/cat/._1.jpg",
        "dog/.cache/2",
        "../cat/3",
        "__MACOSX/4",
    )
    assert set(found("cat/1", "dog/1", *hidden)) == {"cat/1", "dog/1"}
    assert set(found("pets/cat/1", "pets/dog/1", "__MACOSX/pets/cat/1")) == {
        "pets/cat/1",
        "pets/dog/1",
    }


def test_files_beside_class_folders_are_left_out() -> None:
    assert set(found("cat/1", "dog/1", "readme.txt", "3.jpg")) == {"cat/1", "dog/1"}
    assert set(found("pets/cat/1", "pets/dog/1", "pets/Thumbs.db", "a.pdf")) == {
        "pets/cat/1",
        "pets/dog/1",
    }


def test_a_file_beside_the_class_folders_of_a_split_does_not_make_the_split_a_class() -> None:
    assert found("train/cat/1", "train/dog/1", "train/labels.csv", "test/cat/2") == {
        "train/cat/1": ("cat", "train"),
        "train/dog/1": ("dog", "train"),
        "test/cat/2": ("cat", "test"),
    }


def test_unlabelled_test_images_are_left_out_and_are_no_class() -> None:
    assert set(found("train/cat/1", "train/dog/1", "test/1", "test/2").values()) == {
        ("cat", "train"),
        ("dog", "train"),
    }


def test_classes_may_be_called_train_and_test() -> None:
    assert found("train/1.jpg", "test/1.jpg", "train/old/2.jpg", "train/3.jpg") == {
        "train/1.jpg": ("train", ""),
        "train/old/2.jpg": ("train", ""),
        "train/3.jpg": ("train", ""),
        "test/1.jpg": ("test", ""),
    }
    assert set(found("toys/train/1", "toys/test/1").values()) == {("train", ""), ("test", "")}


def test_a_split_name_among_other_classes_is_a_class() -> None:
    assert set(found("train/1", "plane/1", "train/steam/2").values()) == {
        ("train", ""),
        ("plane", ""),
    }


@pytest.mark.parametrize("paths", [[], ["1.jpg", "2.jpg"], [".hidden/1.jpg"], ["pets/"]])
def test_no_class_folders_at_all_are_refused_with_an_example(paths: list[str]) -> None:
    with pytest.raises(NoClasses, match=r"no class folders: .* such as cat/1.jpg and dog/1.jpg"):
        places(paths)


@pytest.mark.parametrize(
    "paths", [["cat/1", "cat/2"], ["pets/cat/1"], ["train/cat/1", "test/cat/2"], ["cat/1", "2.jpg"]]
)
def test_one_class_only_is_refused_by_name(paths: list[str]) -> None:
    with pytest.raises(NoClasses, match="only one class, 'cat'"):
        places(paths)


def test_a_leading_slash_makes_no_class() -> None:
    assert found("/cat/1", "cat/2", "//dog/3") == {
        "/cat/1": ("cat", ""),
        "cat/2": ("cat", ""),
        "//dog/3": ("dog", ""),
    }


def test_both_names_of_a_split_are_one_split() -> None:
    assert found("train/a/1", "train/b/1", "val/a/2", "validation/a/3", "Valid/b/4") == {
        "train/a/1": ("a", "train"),
        "train/b/1": ("b", "train"),
        "val/a/2": ("a", "val"),
        "validation/a/3": ("a", "val"),
        "Valid/b/4": ("b", "val"),
    }


def test_a_class_of_which_nothing_can_be_read_is_named_with_the_first_reason() -> None:
    layout = places(["a/1", "a/2", "b/1"])
    check_readable(layout, {"a/1": "a link"})
    with pytest.raises(NoClasses, match=r"^class 'a': none .* the first is a/1: a link$"):
        check_readable(layout, {"a/2": "a pipe", "a/1": "a link"})
