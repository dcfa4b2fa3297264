"""download: from wherever the images are to data/raw/, as obtained."""

from cnnpipe.data.raw import open_raw
from cnnpipe.data.sources import obtain
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
    print(f"{len(images):,} files in {len(classes)} classes, from {source.origin}")
