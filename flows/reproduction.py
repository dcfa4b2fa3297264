"""DVC at work for a flow: `dvc repro` or an experiment, stage by stage, line by line."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from prefect.concurrency.sync import concurrency

from flows import commands

STAGES = ("download", "resize", "split", "train", "evaluate")
GPU_LIMIT = "gpu"
"""The concurrency limit on trainings that use the GPU; whoever serves the flows makes it."""

_MARK = re.compile(
    r"(?:Running stage|Stage) '(?P<stage>\w+)'"
    r"(?P<verdict>:| didn't change, skipping| is cached - skipping run)"
)
_VERDICTS = {":": "Completed", " didn't change, skipping": "Skipped"}
# Of a workspace that begins empty, DVC says so once for each output.
_NOISE = "WARNING: No file hash info found for "


class Reproduction:
    """One call of DVC; as a context it ends with the block, whatever happens there."""

    def __init__(self, arguments: Sequence[str], uses_gpu: bool = False, **variables: str) -> None:
        """Nothing begins before `start`.

        Args:
            arguments: of `dvc`.
            uses_gpu: whether its training has to wait for the GPU.
            variables: for the environment of the stages.
        """
        self.arguments = list(arguments)
        self.uses_gpu = uses_gpu
        self._variables = variables
        self._process: subprocess.Popen[str] | None = None
        self._ahead = ""
        self.verdict = ""
        """On the stage last read: Completed where it ran, Skipped, Restored; empty for none."""
        self.reason = ""
        """The last line of cnnpipe's own, else of DVC's errors, else of all."""
        self.code: int | None = None
        """DVC's exit code, once it has ended."""
        self.refused = False
        """Whether the stage found a mistake of the user's, which no retry mends."""
        self.stopped = False
        """Whether it was ended before its time."""

    @property
    def ran(self) -> bool:
        """Whether the stage last read was run."""
        return self.verdict == "Completed"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begins, or begins anew."""
        self.stop()
        self._ahead, self.code, self.refused, self.stopped = "", None, False, False
        self._process = commands.start("dvc", *self.arguments, variables=self._variables)

    def stage(self, name: str) -> Iterator[str]:
        """What is said up to the beginning of another stage; sets `verdict` and `reason`.

        The training of one that uses the GPU stands still until the limit lets it in.

        Raises:
            ConcurrencySlotAcquisitionError: there is no such limit.
        """
        assert self._process is not None
        self.verdict = self.reason = ""
        with ExitStack() as slot:
            for line in self._lines():
                mark = _MARK.match(line)
                if mark and mark["stage"] != name:
                    self._ahead = line
                    return
                if mark:
                    self.verdict = _VERDICTS.get(mark["verdict"], "Restored")
                self.refused |= line.endswith(", exited with 2")
                if _weight(line) >= _weight(self.reason):
                    self.reason = line
                yield line
                if mark and self.uses_gpu and name == "train" and self.ran:
                    # Python takes longer to start than this line to get here.
                    os.killpg(self._process.pid, signal.SIGSTOP)
                    slot.enter_context(concurrency(GPU_LIMIT, strict=True))
                    os.killpg(self._process.pid, signal.SIGCONT)
        self.code = self._process.wait()

    def stop(self) -> None:
        """Ends DVC, its stage, and everything that they started."""
        if self._process is not None:
            self.stopped |= self._process.poll() is None
            commands.stop(self._process)

    def _lines(self) -> Iterator[str]:
        assert self._process is not None and self._process.stdout is not None
        if self._ahead:
            yield self._ahead
            self._ahead = ""
        for line in self._process.stdout:
            if (line := line.rstrip()) and not line.startswith(_NOISE):
                yield line


def _weight(line: str) -> int:
    return 2 * line.startswith("cnnpipe: ") or 1 * line.startswith("ERROR: ")


def has_gpu() -> bool:
    """Whether the machine has an NVIDIA GPU."""
    return Path("/dev/nvidia0").exists()
