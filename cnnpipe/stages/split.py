"""split: from the manifest to data/split.csv, one row an image: train, val or test."""

import pandas as pd

from cnnpipe.data import manifest
from cnnpipe.data.splits import SPLITS, assign_splits
from cnnpipe.data.store import open_images
from cnnpipe.errors import UserError, printable
from cnnpipe.params import Params
from cnnpipe.workspace import whole_file


def run(params: Params) -> None:
    """Writes data/split.csv.

    Raises:
        UserError: there is no data/resized/, or a class or a split would be without images.
    """
    _, table = open_images("data/resized")
    splits = assign_splits(
        table["label"].tolist(),
        table["sha256"].tolist(),
        table["group"].to_numpy(),
        table["official"].tolist(),
        params.split.val,
        params.split.test,
        params.base.seed,
    )
    result = table[["path", "label"]].assign(split=splits, group=table["group"])
    counts = pd.crosstab(result["label"], result["split"]).reindex(columns=SPLITS, fill_value=0)
    _check(counts)
    with whole_file("data/split.csv") as part:
        manifest.write(result, part, manifest.SPLIT_COLUMNS)
    largest = counts.loc[counts.sum(axis=1).nlargest(20).index].sort_index()
    print(largest.rename(printable).to_string())
    for name in ("val", "test"):
        if without := counts.index[counts[name] == 0].tolist():
            print(f"warning: no {name} images of {len(without):,} classes, such as {without[0]!r}")
    sizes = result["group"].value_counts()
    print(
        f"{(sizes > 1).sum():,} groups of copies or near-copies, {sizes[sizes > 1].sum():,} images"
    )
    torn = int((result.groupby("group")["split"].nunique() > 1).sum())
    if torn:
        print(
            f"warning: {torn:,} groups of copies are in several official splits, "
            "so the test score is too good"
        )


def _check(counts: pd.DataFrame) -> None:
    missing = counts.index[counts["train"] == 0].tolist()
    if missing:
        raise UserError(
            f"class {missing[0]!r} has no images to train on, only "
            f"{counts.loc[missing[0]].sum()} held out or copies of another class's: add some"
        )
    for split in ("val", "test"):
        if not counts[split].sum():
            raise UserError(
                f"the {split} split is empty: no class has enough different images to hold some "
                f"out; add images or raise split.{split}"
            )
