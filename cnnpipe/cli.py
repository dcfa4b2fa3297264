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
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
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
        _tell(error)
        code = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        _tell(KeyboardInterrupt("terminated" if terminated else "interrupted"))
        code = 128 + (signal.SIGTERM if terminated else signal.SIGINT)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        where = printable(str(error.filename or Path.cwd()))
        _tell(
            RunFailed(
                f"{where}: {error.strerror}: nothing that was there is lost, run it again when "
                "that is put right"
            )
        )
        code = 1
    gc.freeze()  # or the interpreter would look through all modules once more, for up to 0.8 s
    sys.exit(code)


def _tell(error: BaseException) -> None:
    """Says on stderr why the command ends; of several processes the one that started them does."""
    from cnnpipe.processes import place

    here = place()
    if here is None or not here.is_launched:
        print(f"cnnpipe: {printable(str(error))}", file=sys.stderr)
    else:
        told = {"kind": type(error).__name__, "message": str(error), "timestamp": int(time.time())}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(told))


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
        "export": _export,
        "compare": _compare,
        "promote": _promote,
        "trace": _trace,
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
        "paths", nargs="+", metavar="PATH",
        help="image files, folders or zip or tar archives of them, also s3://BUCKET/KEY, or - for "
        "stdin",
    )  # fmt: skip
    predict.add_argument("--csv", metavar="FILE", help="write there instead of to stdout")
    predict.add_argument(
        "--update", action="store_true",
        help="add to FILE what this version of the model has not scored yet, and list what is no "
        "image in *.unreadable.csv beside it",
    )  # fmt: skip
    predict.add_argument("--log", action="store_true", help="keep the new scores in MLflow, too")
    predict.add_argument(
        "--json", action="store_true", help="print what was done as JSON; with --csv"
    )
    export = commands.add_parser(
        "export",
        help="write the network as an ONNX file",
        description="Writes an ONNX file from uint8 pixels to probabilities, if it gives the "
        "network's own.",
    )
    export.add_argument("file", metavar="FILE.onnx", help="to write")
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
    for command in (predict, explain, export):
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
    _add_promote(commands)
    _add_trace(commands)
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


def _add_promote(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    promote = commands.add_parser(
        "promote",
        help="let a model take the champion's place, if the evidence says so",
        description="Compares a model with the champion, models:/cnnpipe@champion, on the same "
        "test images, and moves that alias if the rules in params.yaml's section `promote` say so.",
    )
    promote.add_argument(
        "run", nargs="?", metavar="RUN",
        help="the id or name of a run, the name of a DVC experiment, or the number of a version "
        "(default: the run that this folder holds, or the last version)",
    )  # fmt: skip
    promote.add_argument("--dry-run", action="store_true", help="decide, and change nothing")
    promote.add_argument(
        "--force", action="store_true",
        help="make it the champion whatever a comparison says, or where there can be none",
    )  # fmt: skip
    promote.add_argument("--json", action="store_true", help="print JSON")
    promote.add_argument(
        "--rollback", action="store_true", help="bring the champion before this one back"
    )


def _add_trace(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    trace = commands.add_parser(
        "trace",
        help="show what a run, model, commit or image belongs to",
        description="From any one of them to all the others: run, version of the model, model "
        "file, data, commit, DVC experiment, Prefect flow run, image.",
    )
    trace.add_argument(
        "name", metavar="ID_OR_FILE",
        help="a run's id or name, a DVC experiment, a commit, a version (3, models:/cnnpipe/3, "
        "models:/cnnpipe@champion), a flow run's id or 6 digits of it or more, a model or image "
        "file, an image's path in manifest.csv, or the SHA-256 of a model or image",
    )  # fmt: skip
    trace.add_argument("--json", action="store_true", help="print JSON")


def _stage(name: str) -> int:
    from cnnpipe.params import load
    from cnnpipe.processes import end_with, end_with_dvc, place
    from cnnpipe.usage import keep, so_far
    from cnnpipe.workspace import locked

    params = load(PARAMS)  # before the stage's own imports, which may take seconds
    end_with_dvc()
    here = place()
    if here and here.is_launched:
        end_with(os.getppid(), signal.SIGTERM)
    # What is imported is no garbage: to look through it again and again takes 0.6 s of 3.5.
    gc.disable()
    stage = importlib.import_module(f"cnnpipe.stages.{name}")
    gc.freeze()
    gc.enable()
    if here and (here.is_launched or here.rank > 0):
        stage.run(params)  # another holds the lock
        return 0
    with locked(f".cnnpipe/{name}.lock", f"`cnnpipe {name}` in this folder", wait=here is not None):
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
    for option in ("update", "json"):
        if getattr(args, option) and not args.csv:
            raise UserError(f"--{option} needs --csv FILE: the table cannot go to stdout")
    if args.csv and args.csv.startswith("s3://"):  # it would be a folder called "s3:"
        raise UserError(f"--csv {args.csv}: the table is written here: name a file")
    from cnnpipe.origin import sha256
    from cnnpipe.serving import batch
    from cnnpipe.serving.predictor import Predictor

    with TemporaryDirectory() as folder:
        name, file = _model(args.model, folder)
        predictor = Predictor.load(file)
        model = batch.Model(name, sha256(file))
        table, bad = Path(folder) / "scores.json", Path(folder) / "unreadable.csv"
        columns = batch.columns(predictor.class_names, args.update)
        with batch.scores_json(table, columns) if args.log else nullcontext(lambda _: 0) as keep:
            if args.update:
                outcome = batch.update_table(predictor, model, args.paths, args.csv, keep)
            else:
                outcome = batch.predict_paths(predictor, args.paths, args.csv, keep)
        ids: tuple[str | None, str | None] = (None, None)
        if args.log and outcome.scored:
            from cnnpipe.tracking import log_scores

            outcome.write_unreadable(bad)
            with redirect_stdout(sys.stderr):  # it says so where it sends what had to wait
                ids = log_scores(table, bad, model.tags, outcome.metrics)
    if args.json:
        print(json.dumps(outcome.to_dict(name, args.csv, *ids)))
    return outcome.exit_code


def _export(args: argparse.Namespace) -> int:
    from cnnpipe.network.classifier import Classifier
    from cnnpipe.serving.export import export

    with TemporaryDirectory() as folder:
        print(export(Classifier.load(_model(args.model, folder)[1]), args.file))
    return 0


def _explain(args: argparse.Namespace) -> int:
    from cnnpipe.evaluation.explain import explain
    from cnnpipe.network.classifier import Classifier

    with TemporaryDirectory() as folder:
        classifier = Classifier.load(_model(args.model, folder)[1])
    print(explain(classifier, args.image, args.out))
    return 0


def _model(model: str, folder: str) -> tuple[str, Path]:
    """The model that --model names, a registered one by its very version, and its file.

    Args:
        model: a file, or the address of a registered model.
        folder: where a file from the tracker's registry may be put.
    """
    if not model.startswith("models:/"):
        return model, Path(model)
    from cnnpipe.registry import find_model_file, find_model_version

    version = find_model_version(model)
    return version, find_model_file(version, folder)


def _compare(args: argparse.Namespace) -> int:
    from cnnpipe import records
    from cnnpipe.evaluation import comparison, comparison_table
    from cnnpipe.workspace import named_file

    curves = ("train/loss", "val/loss", "val/accuracy") if args.html else ()
    runs = [
        comparison.Run(
            run.id, run.name, run.params, run.metrics, run.tags.get("test_hash", ""),
            records.read_predictions(run.id), records.read_history(run.id, curves),
        )
        for run in records.find_runs(args.runs)
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


def _promote(args: argparse.Namespace) -> int:
    from cnnpipe import contest
    from cnnpipe.evaluation import promotion
    from cnnpipe.params import load

    params = load(PARAMS)
    if not args.rollback:
        outcome = contest.promote(args.run, params, args.dry_run, args.force)
        print(promotion.as_json(outcome) if args.json else promotion.as_text(outcome))
        return 0
    if args.run:
        raise UserError(f"{args.run}: --rollback takes no run: it knows which was the champion")
    if args.force:
        raise UserError("--rollback takes no --force: it compares nothing")
    champion, instead_of = contest.roll_back(args.dry_run)
    if args.json:
        print(json.dumps({"champion": champion.number, "instead_of": instead_of.number,
                          "moved": not args.dry_run}, indent=2))  # fmt: skip
    else:
        done = "would be the champion (dry run)" if args.dry_run else "is the champion again"
        print(f"version {champion.number} {done}, instead of version {instead_of.number}")
    return 0


def _trace(args: argparse.Namespace) -> int:
    from cnnpipe.tracing import trace

    found = trace(args.name)
    print(found.as_json() if args.json else found.as_text())
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
