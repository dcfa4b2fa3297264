"""How long it takes to find out that nothing is to be done, and to say hello."""

import hashlib
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

from ruamel.yaml import YAML

from benchmarks.harness import (
    CNNPIPE,
    DVC,
    REPOSITORY,
    at_most,
    command,
    in_turn,
    photos,
    report,
    workspace,
)
from cnnpipe.params import load

COUNT = 25_000


def pipeline(folder: Path, images: Path) -> None:
    """A clone of this repository whose pipeline has run on 25,000 images in an archive."""
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(folder)], check=True)
    packed = folder.with_name("packed")
    packed.mkdir()
    # Tiny images and a tiny network: what is timed does not look into them.
    workspace(
        packed, images, COUNT,
        resize__size=16, train__epochs=1, model__filters=1, model__kernel_size=3,
    )  # fmt: skip
    archive = next(path for path in (packed / "data/raw").iterdir() if path.suffix != ".json")
    handler = partial(SimpleHTTPRequestHandler, directory=archive.parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = load(packed / "params.yaml").model_dump()
    settings["download"] |= {
        "source": "url",
        "folder": "data/inbox",
        "url": f"http://127.0.0.1:{server.server_port}/{archive.name}",
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
    }
    YAML().dump(settings, folder / "params.yaml")
    command([DVC, "repro"], folder)()
    server.shutdown()


def two_lines(folder: Path) -> None:
    """A repository whose pipeline is the least there is."""
    folder.mkdir()
    (folder / "dvc.yaml").write_text("stages:\n  nothing: {cmd: 'true'}\n")
    for arguments in (["git", "init", "-q"], [DVC, "init", "-q"], [DVC, "repro", "-q"]):
        command(arguments, folder)()


def main() -> None:
    """Runs the benchmark."""
    repro = f"dvc repro, nothing changed, {COUNT:,} images"
    python = [sys.executable, "-c"]
    comparisons = [
        ("cnnpipe --help", "python -c pass", [CNNPIPE, "--help"], [*python, "pass"], 6, 15),
        (
            "cnnpipe summary",
            "import torch",
            [CNNPIPE, "summary"],
            [*python, "import torch"],
            1.3,
            7,
        ),
        (repro, "dvc repro of two lines", [DVC, "repro"], [DVC, "repro"], 3, 7),
    ]
    rows = []
    with photos() as images, TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
        pipeline(ours, images)
        two_lines(theirs)
        for what, peer, our_command, their_command, limit, rounds in comparisons:
            seconds = in_turn(
                {"ours": command(our_command, ours), "theirs": command(their_command, theirs)},
                rounds,
            )
            rows.append(at_most(what, peer, seconds["theirs"], seconds["ours"], "s", limit))
    report("startup", rows, ["dvc", "torch"])


if __name__ == "__main__":
    main()
