"""All drills, or those that are named: `python -m benchmarks.drills [NAME...]`.

Prints a table of the faults, what is expected of each, and what was seen. The exit code is 1 where
anything was otherwise.
"""

import signal
import sys

from benchmarks.drills import disk, hosts, network, resume, stops, tested, together, tracker
from benchmarks.drills.drill import AS_EXPECTED

DRILLS = [
    drill
    for module in (tested, resume, stops, together, disk, tracker, network, hosts)
    for drill in module.DRILLS
]


def main(names: list[str]) -> int:
    """Runs the drills; the exit code."""
    # A run in the background of a script ignores Ctrl-C, and so would all that the drills start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    known = [drill.name for drill in DRILLS]
    if unknown := set(names) - set(known):
        print(f"no drill {sorted(unknown)[0]!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    widths = (22, 46, 62, 0)
    ok = True
    for row in [("drill", "fault", "expected", "seen"), *DRILLS]:
        if isinstance(row, tuple):
            cells = row
        elif names and row.name not in names:
            continue
        else:
            seen = row.run()
            ok &= seen == AS_EXPECTED
            cells = (row.name, row.fault, row.expected, seen)
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(line, flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
