"""Flows that take no time, with the names that prefect.yaml has for the real ones."""

from pathlib import Path

_FLOW = """
import time
from prefect import flow

@flow(name="{name}")
def {name}({parameters}):
    time.sleep(seconds)
"""


def write_flows(folder: Path) -> None:
    """Puts them in the place of a project's flows; its worker stays."""
    for name, parameters in {
        "pipeline": "promote: bool = False, only_when_new: bool = False",
        "sweep": "number: int = 1",
        "predict": "path: str = 'data/unlabelled'",
    }.items():
        text = _FLOW.format(name=name, parameters=f"{parameters}, seconds: float = 0")
        (folder / "flows" / f"{name}.py").write_text(text)
