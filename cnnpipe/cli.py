"""The commands: thin, one function a command.

What a command needs is imported by its function, so that `cnnpipe --help` answers at once.
"""

import argparse
import errno
import gc
import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cnnpipe import __version__
from cnnpipe.errors import RunFailed, UserError, printable

PARAMS = "params.yaml"
STAGES = {
    "download": "get the images: params.yaml's `download` says from where",
    "resize": "bring all images to one size",
    "split": "divide them into train, val and test",
    "train": "train the network",
    "evaluate": "judge it on the test split, and register it",
}

_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""A full or broken disk and missing permissions, which are nobody's mistake in the program."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does: orderly, and known to the tracker."""


def main() -> None:
    """Runs the command of the command line and exits with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _command(sys.argv[1:])
        sys.stdout.flush()
    except (UserError, RunFailed) as error:
        print(f"cnnpipe: {printable(str(error))}", file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except Terminated:
        print("cnnpipe: terminated", file=sys.stderr)
        code = 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("cnnpipe: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        where = printable(str(error.filename or Path.cwd()))
        print(
            f"cnnpipe: {where}: {error.strerror}: nothing that was there is lost, run it again "
            "when that is put right",
            file=sys.stderr,
        )
        code = 1
    gc.freeze()  # or the interpreter would look through all modules once more, for up to 0.8 s
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    # One is enough: a second, sent since DVC ends too, would break off what the first has begun.
    signal.signal(number, signal.SIG_IGN)
    raise Terminated


def _command(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    if args.command in STAGES:
        return _stage(args.command)
    functions = {
        "summary": _summary,
        "explain": _explain,
        "predict": _predict,
        "compare": _compare,
        "up": _up,
        "doctor": _doctor,
    }
    return functions[args.command](args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cnnpipe",
        description="From a folder of images to a convolutional network you can trust.",
        epilog="The whole pipeline is `dvc repro`; an experiment is "
        "`dvc exp run -S model.filters=20`.",
    )
    parser.add_argument("--version", action="version", version=f"cnnpipe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for stage, text in STAGES.items():
        commands.add_parser(stage, help=text, description=f"One stage of the pipeline: {text}.")
    summary = commands.add_parser(
        "summary", help="show the network layer by layer, before any training"
    )
    summary.add_argument("--json", action="store_true", help="print JSON")
    predict = commands.add_parser(
        "predict", help="classify images", description="Classifies images; prints CSV."
    )
    predict.add_argument(
        "paths", nargs="+", metavar="PATH", help="image files, folders of them, or - for stdin"
    )
    predict.add_argument("--csv", metavar="FILE", help="write there instead of to stdout")
    explain = commands.add_parser(
        "explain",
        help="show what the trained network sees in an image, step by step",
        description="Writes a page, and its pictures, on how the trained network sees an image.",
    )
    explain.add_argument("image", metavar="IMAGE", help="an image file")
    explain.add_argument(
        "--out",
        metavar="DIR",
        default="reports/explain",
        help="the folder to write, which may hold an earlier explanation (default: %(default)s)",
    )
    for command in (predict, explain):
        command.add_argument(
            "--model",
            default="models/model.safetensors",
            help="a model file, or models:/NAME/VERSION or models:/NAME@ALIAS from MLflow "
            "(default: %(default)s)",
        )
    compare = commands.add_parser(
        "compare",
        help="show runs side by side, and which is better",
        description="Evaluated runs side by side: the parameters that differ, the metrics with "
        "their intervals, and whether a difference is more than luck.",
    )
    compare.add_argument(
        "runs", nargs="*", metavar="RUN",
        help="the id of an MLflow run, 6 digits of it or more, or the name of a run or DVC "
        "experiment (default: the last ten)",
    )  # fmt: skip
    compare.add_argument(
        "--html", metavar="FILE",
        help="write a page there: curves, costs, classes, the images they disagree on",
    )  # fmt: skip
    compare.add_argument("--csv", metavar="FILE", help="write the table there")
    compare.add_argument("--json", action="store_true", help="print JSON instead of the table")
    up = commands.add_parser(
        "up", help="start MLflow, Prefect and a worker for its runs; Ctrl-C stops them"
    )
    up.add_argument("--mlflow-port", type=int, default=5000, help="default: %(default)s")
    up.add_argument("--prefect-port", type=int, default=4200, help="default: %(default)s")
    doctor = commands.add_parser(
        "doctor", help="show what this machine and this folder have and lack"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _stage(name: str) -> int:
    from cnnpipe.params import load
    from cnnpipe.processes import end_with_dvc
    from cnnpipe.usage import keep, so_far
    from cnnpipe.workspace import locked

    params = load(PARAMS)  # before the stage's own imports, which may take seconds
    end_with_dvc()
    # What is imported is no garbage: to look through it again and again takes 0.6 s of 3.5.
    gc.disable()
    stage = importlib.import_module(f"cnnpipe.stages.{name}")
    gc.freeze()
    gc.enable()
    with locked(f".cnnpipe/{name}.lock", f"`cnnpipe {name}` in this folder"):
        stage.run(params)
        keep(so_far(name))
    return 0


def _summary(args: argparse.Namespace) -> int:
    from cnnpipe.network.summary import summarize
    from cnnpipe.params import load

    params = load(PARAMS)
    num_classes = _num_classes()
    try:
        summary = summarize(params.model, params.input_shape, num_classes)
    except ValueError as error:
        raise UserError(f"{PARAMS}: {error}") from None
    print(json.dumps(summary.to_dict(), indent=2) if args.json else summary)
    return 0


def _num_classes() -> int:
    """Of the images that are there; two, as in the built-in data, where there are none yet."""
    from cnnpipe.data.manifest import read_class_names

    folder = Path("data/resized")
    return len(read_class_names(folder)) if (folder / "classes.json").exists() else 2


def _predict(args: argparse.Namespace) -> int:
    from cnnpipe.serving.batch import predict_paths
    from cnnpipe.serving.predictor import Predictor

    return predict_paths(Predictor.load(_model_file(args.model)), args.paths, args.csv)


def _explain(args: argparse.Namespace) -> int:
    from cnnpipe.evaluation.explain import explain
    from cnnpipe.network.classifier import Classifier

    print(explain(Classifier.load(_model_file(args.model)), args.image, args.out))
    return 0


def _model_file(model: str) -> str | Path:
    """The file that --model names, if need be from the tracker's registry."""
    if not model.startswith("models:/"):
        return model
    from cnnpipe.tracking import find_model_file

    return find_model_file(model)


def _compare(args: argparse.Namespace) -> int:
    from cnnpipe import tracking
    from cnnpipe.evaluation import comparison, comparison_table
    from cnnpipe.workspace import named_file

    curves = ("train/loss", "val/loss", "val/accuracy") if args.html else ()
    runs = [
        comparison.Run(
            run.id, run.name, run.params, run.metrics, run.tags.get("test_hash", ""),
            tracking.read_predictions(run.id), tracking.read_history(run.id, curves),
        )
        for run in tracking.find_runs(args.runs)
    ]  # fmt: skip
    compared = comparison.compare(runs)
    if args.json:
        print(comparison_table.as_json(compared))
    else:
        width = shutil.get_terminal_size(fallback=(160, 24)).columns
        print(comparison_table.as_text(compared, width))
    said = sys.stderr if args.json else sys.stdout
    if args.csv:
        with named_file(args.csv) as file:
            comparison_table.write_csv(compared, file)
        print(f"\nthe table is in {printable(args.csv)}", file=said)
    if args.html:
        from cnnpipe.evaluation import comparison_page

        page = comparison_page.page(compared, Path("data/resized"))
        with named_file(args.html) as file:
            file.write(page)
        print(f"\nthe page is {printable(args.html)}: open it in a browser", file=said)
    return 0


def _up(args: argparse.Namespace) -> int:
    from cnnpipe.params import load
    from cnnpipe.servers import serve

    load(PARAMS)  # or the servers would keep their data in just any folder
    return serve(args.mlflow_port, args.prefect_port)


def _doctor(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from cnnpipe.doctor import as_text, examine

    findings = examine(PARAMS)
    as_json = [asdict(finding) for finding in findings]
    print(json.dumps(as_json, indent=2) if args.json else as_text(findings))
    return int(any(finding.status == "wrong" for finding in findings))
