"""Tests of the pipeline's tables: what is written is what is read."""

from pathlib import Path

import pandas as pd
import pytest

from cnnpipe.data import manifest
from cnnpipe.errors import UserError

ODD_NAMES = [
    "NA",
    "None",
    "nan",
    "null",
    "1",
    "1.0",
    "01",
    "True",
    "",
    " a ",
    "a,b",
    'a "b"',
    "Ä\n",
    "\r",
    "a\r\nb",
]


def test_odd_class_names_survive_the_manifest(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "path": [f"{name}/x.jpg" for name in ODD_NAMES],
            "label": ODD_NAMES,
            "official": "",
            "width": 3,
            "height": 4,
            "frames": 1,
            "sha256": "00ff",
            "shard": "images-00000.npy",
            "row": range(len(ODD_NAMES)),
            "crc32": 2**32 - 1,
            "group": range(len(ODD_NAMES)),
        }
    )
    manifest.write(table, tmp_path / "manifest.csv", manifest.COLUMNS)
    read = manifest.read(tmp_path / "manifest.csv", manifest.COLUMNS, "resize")
    assert read["label"].tolist() == ODD_NAMES
    assert read.to_dict("list") == table.to_dict("list")


def test_the_columns_are_written_in_their_order_and_no_others(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"extra": [1], "size": [""], "reason": ["empty file"], "path": ["cat/1.jpg"]}
    )
    manifest.write(table, tmp_path / "quarantine.csv", manifest.QUARANTINE_COLUMNS)
    assert (
        tmp_path / "quarantine.csv"
    ).read_bytes() == b"path,reason,size\ncat/1.jpg,empty file,\n"


def test_an_empty_table_keeps_its_columns(tmp_path: Path) -> None:
    empty = pd.DataFrame(columns=list(manifest.QUARANTINE_COLUMNS))
    manifest.write(empty, tmp_path / "quarantine.csv", manifest.QUARANTINE_COLUMNS)
    read = manifest.read(tmp_path / "quarantine.csv", manifest.QUARANTINE_COLUMNS, "resize")
    assert list(read) == ["path", "reason", "size"] and len(read) == 0


def test_a_missing_table_names_the_command_that_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    with pytest.raises(UserError, match=rf"{path}: no such file: run `cnnpipe split` first"):
        manifest.read(path, manifest.SPLIT_COLUMNS, "split")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "path,label\na,b\n",
        "path,label,split,group\na,b,train,x\n",
        'path,label,split,group\n"a',
    ],
)
def test_a_damaged_table_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "split.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=r"damaged, run `cnnpipe split` again: .+") as refusal:
        manifest.read(path, manifest.SPLIT_COLUMNS, "split")
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_class_names_keep_their_order_and_spelling(tmp_path: Path) -> None:
    manifest.write_class_names(ODD_NAMES, tmp_path)
    assert manifest.read_class_names(tmp_path) == ODD_NAMES


def test_missing_class_names_name_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"classes.json: no such file: run `cnnpipe resize` first"):
        manifest.read_class_names(tmp_path)
