"""download: from wherever the images are to data/raw/, as obtained."""

import unicodedata
from collections import defaultdict

from cnnpipe.data.raw import open_raw
from cnnpipe.data.sources import obtain
from cnnpipe.errors import printable
from cnnpipe.params import Params
from cnnpipe.workspace import whole_folder


def run(params: Params) -> None:
    """Fills data/raw/.

    Raises:
        UserError: what is to be obtained is not there, or not what the settings say it is.
        RunFailed: a server could not be reached.
    """
    with whole_folder("data/raw") as folder:
        source = obtain(params.download, params.base.seed, folder)
        with open_raw(folder) as (_, images):
            classes = {image.label for image in images}
    print(f"{len(images):,} files in {len(classes)} classes, from {printable(source.origin)}")
    alike = defaultdict[str, list[str]](list)
    for label in sorted(classes):
        alike[unicodedata.normalize("NFKC", label).casefold()].append(label)
    for labels in alike.values():
        if len(labels) > 1:
            print(f"warning: {len(labels)} classes look alike: {', '.join(map(ascii, labels))}")
