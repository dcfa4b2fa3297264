"""What the benchmarks share: turns, medians, tables, JSON, and what machine it was."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PHOTOS = "CNNPIPE_PHOTOS"


@dataclass(frozen=True)
class Row:
    """One comparison."""

    what: str
    peer: str
    """Who it is measured against."""
    theirs: float
    ours: float
    unit: str
    ratio: float
    """Our speed by theirs, or our amount by theirs; see `wanted`."""
    wanted: str
    """The ratio aimed at, such as `>= 1.5`."""

    @property
    def reached(self) -> bool:
        """Whether the ratio is as wanted."""
        sign, limit = self.wanted.split()
        return self.ratio >= float(limit) if sign == ">=" else self.ratio <= float(limit)


def faster(what: str, peer: str, theirs: float, ours: float, unit: str, at_least: float) -> Row:
    """A row of two durations: how many times as fast as the peer we are."""
    return Row(what, peer, theirs, ours, unit, theirs / ours, f">= {at_least:g}")


def at_most(what: str, peer: str, theirs: float, ours: float, unit: str, limit: float) -> Row:
    """A row of two amounts: how many times the peer's ours is."""
    return Row(what, peer, float(theirs), float(ours), unit, ours / theirs, f"<= {limit:g}")


def in_turn(
    cases: dict[str, Callable[[], object]], rounds: int, warm_up: bool = True
) -> dict[str, float]:
    """The median duration of each case, in seconds, all run one after the other in each round.

    A first round, in which caches fill, is not counted, unless `warm_up` is false. Turns, since a
    machine may be faster in one minute than in the next.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for counted in [False] * warm_up + [True] * rounds:
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            if counted:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(durations) for name, durations in taken.items()}


_INSTALLED = Path(sys.executable).parent
CNNPIPE = str(_INSTALLED / "cnnpipe")
DVC = str(_INSTALLED / "dvc")


def workspace(folder: Path, images: Path, count: int, **settings: object) -> None:
    """Makes the folder one to run stages in, its data/raw/ holding `count` of the images.

    Args:
        folder: an empty folder.
        images: class folders; where `count` is more than they hold, images come several times.
        count: the number of images.
        settings: as `write_params` takes them.
    """
    write_params(folder, **settings)
    for label in sorted(images.iterdir()):
        found = sorted(label.iterdir())
        (folder / "inbox" / label.name).mkdir(parents=True)
        for i in range(count // 2):
            os.link(found[i % len(found)], folder / "inbox" / label.name / f"{i:06d}.jpg")
    command([CNNPIPE, "download"], folder)()


def write_params(folder: Path, **settings: object) -> None:
    """Puts a params.yaml into the folder, which is made where there is none.

    Args:
        folder: which.
        settings: by their dotted names with __ for the dot, the defaults for all others.
    """
    from ruamel.yaml import YAML

    from cnnpipe.params import Params

    content = Params().model_dump()
    content["download"].update(source="folder", folder="inbox")
    for name, value in settings.items():
        section, key = name.split("__")
        content[section][key] = value
    folder.mkdir(parents=True, exist_ok=True)
    YAML().dump(content, folder / "params.yaml")


def command(arguments: Sequence[str], folder: Path) -> Callable[[], None]:
    """A command to run in a folder, its output thrown away; it fails as the command does."""
    environment = {**os.environ, "PATH": f"{_INSTALLED}{os.pathsep}{os.environ['PATH']}"}

    def run() -> None:
        result = subprocess.run(
            arguments, cwd=folder, env=environment, capture_output=True, text=True
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {result.stdout[-2000:]}{result.stderr}")

    return run


def alone(module: str, *arguments: str) -> Callable[[], float]:
    """A case that `python -m MODULE ARGUMENTS` measures in a process of its own, printing a number.

    So that no library's threads and no setting of the allocator have a say in another's figures.
    """

    def run() -> float:
        result = subprocess.run(
            [sys.executable, "-m", module, *arguments], capture_output=True, text=True
        )
        if result.returncode:
            raise RuntimeError(f"{module} {' '.join(arguments)}: {result.stderr}")
        return float(result.stdout.split()[-1])

    return run


def medians(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """As `in_turn`, of cases that warm up and measure themselves."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            taken[name].append(case())
    return {name: statistics.median(durations) for name, durations in taken.items()}


def peak_memory(arguments: Sequence[str], folder: Path) -> float:
    """The most memory that a command and its children held at a time, in MB.

    The sum of their proportional set sizes, in which a page that several share is counted once,
    looked at 20 times a second.
    """
    peak = 0
    process = psutil.Popen(arguments, cwd=folder, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        total = 0
        for one in [process, *_children(process)]:
            try:
                total += one.memory_full_info().pss
            except psutil.Error:  # it has just ended
                continue
        peak = max(peak, total)
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {process.returncode}")
    return peak / 1e6


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = process.children(recursive=True)
    except psutil.Error:
        return []
    return found


@contextmanager
def photos(count: int = 400) -> Iterator[Path]:
    """A folder of class folders of JPEG photos of about 400 x 360 pixels.

    The folder that the environment variable CNNPIPE_PHOTOS names; where it is not set, cats and
    dogs drawn by the program and enlarged, `count` of them, in a folder that goes with the block.
    """
    if given := os.environ.get(PHOTOS):
        yield Path(given)
        return
    from cnnpipe.data.drawn_pets import draw
    from cnnpipe.data.raw import jpeg

    with TemporaryDirectory() as folder:
        for i in range(count):
            label, pixels = draw(42, i)
            path = Path(folder) / label / f"{i:05d}.jpg"
            path.parent.mkdir(exist_ok=True)
            size = (330 + 37 * i % 171, 290 + 53 * i % 141)  # 330 to 500 x 290 to 430
            path.write_bytes(jpeg(np.asarray(Image.fromarray(pixels).resize(size))))
        yield Path(folder)


def report(name: str, rows: Sequence[Row], packages: Sequence[str] = ()) -> None:
    """Prints the rows as a table and writes results/NAME.json, with machine and versions."""
    print(f"\n{name}\n")
    head = ("what", "against", "theirs", "ours", "", "ratio", "wanted", "")
    cells = [head] + [
        (
            row.what, row.peer, f"{row.theirs:,.4g}", f"{row.ours:,.4g}", row.unit,
            f"{row.ratio:.2f}", row.wanted, "" if row.reached else "MISSED",
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(packages), "rows": [asdict(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def machine(packages: Sequence[str]) -> dict[str, str]:
    """What it was measured on."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_available()
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "pictures": "photos" if os.environ.get(PHOTOS) else "drawn",
        **{package: importlib.metadata.version(package) for package in packages},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def needs(package: str) -> bool:
    """Whether a peer's package is installed; says so where it is not."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        print(f"{package} is not installed, so it is left out: run `make bench`", file=sys.stderr)
        return False
    return True
