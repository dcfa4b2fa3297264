"""The commands as a user types them: exit codes, and one clear line for each mistake."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from cnnpipe import cli
from cnnpipe.data.raw import png

CNNPIPE = Path(sys.executable).with_name("cnnpipe")


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str, params: str | None = "{}") -> int:
    if params is not None:
        Path("params.yaml").write_text(params)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["cnnpipe", *arguments])
        cli.main()
    signal.signal(signal.SIGTERM, before)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def picture(path: str, value: int = 0) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(value)
    Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cnnpipe: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys; from cnnpipe import cli; sys.argv[1:] = ['--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'mlflow', 'matplotlib', 'numpy', 'pandas', 'pydantic', 'prefect'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = ("summary", "explain", "predict", "export", "compare", "promote", "trace", "up",
                "doctor")  # fmt: skip
    for command in (*cli.STAGES, *commands):
        assert command in done.stdout


def test_summary_prints_the_articles_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("summary") == 0
    text = capsys.readouterr().out
    for number in ("760", "296 x 296 x 10", "148 x 148 x 10", "438,082", "438,842"):
        assert number in text
    assert run("summary", params="model: {head: sigmoid}") == 0
    assert "219,801" in capsys.readouterr().out


def test_summary_as_json_is_json_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("summary", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["parameters"] == content["parameters_trainable"] == 438_842
    assert [layer["name"] for layer in content["layers"]][:2] == ["convolution", "pooling"]


def test_summary_counts_the_classes_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    Path("data/resized").mkdir(parents=True)
    Path("data/resized/classes.json").write_text(json.dumps(list("abcde")))
    assert run("summary", "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"][-1]["output"] == [5, 1, 1]
    assert run("summary", params="model: {head: sigmoid}") == 2
    assert "5 classes" in only_line(capsys)


@pytest.mark.parametrize("command", [*cli.STAGES, "summary"])
def test_every_command_refuses_impossible_settings(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, params="model: {filters: 0, kernal_size: 3}") == 2
    line = only_line(capsys)
    assert "params.yaml: model.filters = 0: must be greater than or equal to 1" in line
    assert "model.kernal_size: unknown, did you mean kernel_size?" in line


def test_a_network_that_shrinks_to_nothing_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("download", params="{resize: {size: 8}, model: {architecture: deep, blocks: 2}}")
    assert "convolution_2: (W - F + 2P)/S + 1 = (2 - 5 + 2·0)/1 + 1 = -2" in only_line(capsys)
    assert sorted(p.name for p in Path().iterdir()) == ["params.yaml"]


def test_no_settings_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", params=None) == 2
    assert "params.yaml: no such file" in only_line(capsys)


FOLDER = "download: {source: folder, folder: photos}"
BAD_FOLDERS = {
    "no such folder": [],
    "holds no class folders": ["photos/1.png"],
    "holds only one class, 'cat'": ["photos/cat/1.png", "photos/cat/2.png"],
}


@pytest.mark.parametrize("reason", BAD_FOLDERS)
def test_a_folder_that_cannot_be_used(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in BAD_FOLDERS[reason]:
        picture(name)
    assert run("download", params=FOLDER) == 2
    line = only_line(capsys)
    assert "photos" in line
    assert reason in line
    assert not Path("data").exists() or list(Path("data").iterdir()) == []


def test_a_class_without_a_readable_image(capsys: pytest.CaptureFixture[str]) -> None:
    picture("photos/cat/1.png")
    Path("photos/dog").mkdir()
    Path("photos/dog/1.png").write_text("no picture")
    assert run("download", params=FOLDER) == 0
    capsys.readouterr()
    assert run("resize", params=FOLDER) == 2
    assert "class 'dog': none of its 1 files can be read" in only_line(capsys)
    assert [p.name for p in Path("data").iterdir()] == ["raw"]


def test_an_unknown_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("download", params="download: {source: imagenet}") == 2
    assert "download.source = 'imagenet': must be 'drawn-pets', 'digits'" in only_line(capsys)


def test_a_url_without_a_checksum(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("download", params="download: {source: url, url: 'http://127.0.0.1/a.zip'}") == 2
    assert "download.sha256 is null" in only_line(capsys)


def test_a_missing_mlflow_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10):
        for name in ("cat", "dog"):
            picture(f"photos/{name}/{number}.png", value=number + 10 * (name == "dog"))
    small = FOLDER + "\nresize: {size: 12}\n"
    for stage in ("download", "resize", "split"):
        assert run(stage, params=small) == 0
    capsys.readouterr()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert run("train", params=small) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "MLflow" in line]
    assert len(lines) == 1 and lines[0].startswith(
        "warning: MLFLOW_TRACKING_URI = http://127.0.0.1:9: no MLflow server answers there"
    )
    assert Path("models/model.safetensors").exists()


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run("up", "--mlflow-port", str(port)) == 2
    line = only_line(capsys)
    assert f"port {port}" in line
    assert "--mlflow-port" in line


@pytest.mark.parametrize(
    ("number", "to_all", "code", "word"),
    [(signal.SIGTERM, False, 143, "terminated"), (signal.SIGTERM, True, 143, "terminated"),
     (signal.SIGINT, True, 130, "interrupted")],
)  # fmt: skip
def test_a_signal_ends_a_stage_in_one_line_and_leaves_nothing_half_written(
    number: signal.Signals, to_all: bool, code: int, word: str
) -> None:
    Path("params.yaml").write_text("base: {seed: 7}")
    process = subprocess.Popen(
        [CNNPIPE, "download"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list(Path().glob("data/.raw.*/images.zip")):  # it is drawing
        assert process.poll() is None
        time.sleep(0.05)
    if to_all:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.communicate(timeout=60)[1] == f"cnnpipe: {word}\n"
    assert process.returncode == code
    assert list(Path("data").iterdir()) == []


STARTED_AS_BY_DVC = """
import os, subprocess, sys, time
subprocess.Popen(sys.argv[1:], env={**os.environ, "DVC_STAGE": "download"})
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("shell", [["sh", "-c", '"$0" download; :'], ["env"]])
def test_a_stage_does_not_outlive_the_dvc_that_started_it(
    number: signal.Signals, shell: list[str]
) -> None:
    Path("params.yaml").write_text("base: {seed: 7}")
    command = [*shell, str(CNNPIPE)] if shell[0] == "sh" else [str(CNNPIPE), "download"]
    with Path("log").open("w") as log:
        dvc = subprocess.Popen([sys.executable, "-c", STARTED_AS_BY_DVC, *command], stderr=log)
    while not list(Path().glob("data/.raw.*/images.zip")):  # it is drawing
        assert dvc.poll() is None
        time.sleep(0.05)
    children = psutil.Process(dvc.pid).children(recursive=True)
    dvc.send_signal(number)
    dvc.wait()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive and gone
    assert Path("log").read_text() == "cnnpipe: terminated\n"
    assert list(Path("data").iterdir()) == []


STARTED_AS_BY_A_FLOW = """
import os, subprocess, sys, time
env = {**os.environ, "CNNPIPE_FLOW_RUN_ID": "a run"}
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], env=env, start_new_session=True)
time.sleep(600)
"""


def test_a_stage_does_not_outlive_the_flow_that_started_its_dvc() -> None:
    Path("params.yaml").write_text("base: {seed: 7}")
    command = [STARTED_AS_BY_A_FLOW, STARTED_AS_BY_DVC, str(CNNPIPE), "download"]
    with Path("log").open("w") as log:
        flow = subprocess.Popen([sys.executable, "-c", *command], stderr=log)
    while not list(Path().glob("data/.raw.*/images.zip")):  # it is drawing
        assert flow.poll() is None
        time.sleep(0.05)
    dvc, stage, *_ = psutil.Process(flow.pid).children(recursive=True)
    flow.kill()
    flow.wait()
    deadline = time.monotonic() + 10
    while stage.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)  # this DVC waits for nobody
    dvc.kill()
    assert Path("log").read_text() == "cnnpipe: terminated\n"
    assert list(Path("data").iterdir()) == []


def test_a_resize_that_was_killed_leaves_nothing_that_split_could_take_for_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = "download: {source: digits}\nresize: {size: 200, workers: 1}"
    assert run("download", params=settings) == 0
    process = subprocess.Popen([CNNPIPE, "resize"], stdout=subprocess.DEVNULL)
    while not list(Path().glob("data/.resized.*/images-*.npy")):  # it is at work
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not Path("data/resized").exists()
    capsys.readouterr()
    assert run("split", params=settings) == 2
    assert "manifest.csv: no such file: run `cnnpipe resize` first" in only_line(capsys)
    assert run("resize", params=settings) == 0
    assert run("split", params=settings) == 0


def test_a_stage_runs_once_at_a_time_in_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("params.yaml").write_text("base: {seed: 7}")
    first = subprocess.Popen([CNNPIPE, "download"], stderr=subprocess.DEVNULL)
    while not list(Path().glob("data/.raw.*/images.zip")):
        assert first.poll() is None
        time.sleep(0.05)
    assert run("download") == 1
    line = only_line(capsys)
    assert f"`cnnpipe download` in this folder is running already as process {first.pid}" in line
    first.kill()
    first.wait()
    assert run("download", params="download: {source: digits}") == 0  # nothing holds it any more


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_forbidden_disk_ends_a_stage_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    from cnnpipe.data import sources

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sources, "_pack", fail)
    assert run("download", params="download: {source: digits}") == 1
    assert f"{Path.cwd()}: {os.strerror(number)}: nothing that was there is lost" in only_line(
        capsys
    )


def test_an_error_of_the_program_is_not_taken_for_one_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cnnpipe.data import sources

    monkeypatch.setattr(sources, "_pack", lambda *_: Path("never-made").read_bytes())
    Path("params.yaml").write_text("download: {source: digits}")
    monkeypatch.setattr(sys, "argv", ["cnnpipe", "download"])
    with pytest.raises(FileNotFoundError):
        cli.main()


def test_predict_without_a_model_says_what_to_run_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("predict", "x.png") == 2
    assert "models/model.safetensors: no such file: run `dvc repro train`" in only_line(capsys)


def test_explain_without_a_model_says_what_to_run_first(capsys: pytest.CaptureFixture[str]) -> None:
    picture("x.png")
    assert run("explain", "x.png") == 2
    assert "models/model.safetensors: no such file: run `dvc repro train`" in only_line(capsys)
    assert not Path("reports").exists()


@pytest.fixture
def trained(make_classifier: Callable[..., Any]) -> None:
    make_classifier(12).save("models/model.safetensors")


@pytest.mark.usefixtures("trained")
def test_explain_says_the_answer_and_where_the_page_is(capsys: pytest.CaptureFixture[str]) -> None:
    picture("x.png")
    assert run("explain", "x.png") == 0
    output = capsys.readouterr()
    assert re.fullmatch(r"(cat|dog) \(\d\d\.\d%\): reports/explain/explanation\.html\n", output.out)
    assert output.err == ""
    assert Path("reports/explain/explanation.html").exists()
    Path("models/model.safetensors").rename("mine.safetensors")
    assert run("explain", "x.png", "--model", "mine.safetensors", "--out", "a/b") == 0
    assert Path("a/b/explanation.html").exists()


BAD_IMAGES = {
    "gone.png": "gone.png: no such file",
    "photos": "photos: a folder: name one image in it",
    "note.png": "note.png: not an image",
    "empty.png": "empty.png: empty file",
    "cut.png": "cut.png: damaged: ",
    "x.png/y": "x.png/y: Not a directory",
    "big.png": "big.png: more than 100,000,000 pixels",
    "-": "-: no such file",
}


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("path", BAD_IMAGES)
def test_explain_names_what_is_no_image(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    picture("x.png")
    Path("photos").mkdir()
    Path("note.png").write_text("no picture")
    Path("empty.png").touch()
    Path("cut.png").write_bytes(Path("x.png").read_bytes()[:100])
    Image.new("1", (20_000, 10_000)).save("big.png")
    assert run("explain", path) == 2
    assert BAD_IMAGES[path] in only_line(capsys)
    assert not Path("reports").exists()


@pytest.mark.usefixtures("trained")
def test_explain_refuses_a_folder_of_other_files(capsys: pytest.CaptureFixture[str]) -> None:
    picture("x.png")
    assert run("explain", "x.png", "--out", "models") == 2
    assert "--out models: holds model.safetensors, which is not of an explanation" in only_line(
        capsys
    )
    assert Path("models/model.safetensors").exists()


def test_an_archive_that_is_none_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cnnpipe.data import sources

    data = b"<html>gone</html>"
    digest = sha256(data).hexdigest()
    Path("a.zip").write_bytes(data)
    monkeypatch.setattr(sources, "fetch", lambda url, name, checksum: Path("a.zip"))
    text = f"download: {{source: url, url: 'http://127.0.0.1/a.zip', sha256: '{digest}'}}"
    assert run("download", params=text) == 2
    assert "a.zip: neither a zip nor a tar archive" in only_line(capsys)
    assert list(Path("data").iterdir()) == []


def test_an_archive_of_one_class(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cnnpipe.data import sources

    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.writestr("pets/cat/1.png", png(np.zeros((4, 4), np.uint8)))
    monkeypatch.setattr(sources, "fetch", lambda url, name, checksum: Path("a.zip"))
    text = f"download: {{source: url, url: 'http://127.0.0.1/a.zip', sha256: '{'0' * 64}'}}"
    assert run("download", params=text) == 2
    assert "a.zip: holds only one class" in only_line(capsys)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of three evaluated runs, one of them of another test set."""
    from cnnpipe import tracking

    folder = tmp_path_factory.mktemp("tracked")
    predictions = folder / "predictions.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME"):
            patch.delenv(name, raising=False)
        for number, (name, test_hash, right) in enumerate(
            [("good \x1b[31m", "a", 20), ("bad", "a", 8), ("else", "b", 12)]
        ):
            said = ["NA"] * right + ["<b>"] * (20 - right)
            first = 100 if test_hash == "b" else 0
            rows = [f"{i}.png,NA,{i + first:064x},{label}" for i, label in enumerate(said)]
            predictions.write_text("\n".join(["path,label,sha256,prediction", *rows]) + "\n")
            with tracking.start_run(name, {"test_hash": test_hash}) as run:
                run.log_params({"model.filters": 5 * (number + 1), "base.seed": 1})
                for epoch in (1, 2):
                    run.log_metrics({"val/loss": 1 / epoch, "val/accuracy": 0.5}, step=epoch)
                run.log_metrics({"test/accuracy": right / 20, "test/num_images": 20})
                run.log_file(predictions, "test")
    return folder


def test_compare_shows_runs_best_first_within_a_test_set(
    tracked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tracked)
    assert run("compare", params=None) == 0
    output = capsys.readouterr()
    assert output.err == "" and "\x1b" not in output.out
    lines = output.out.splitlines()
    assert lines[0].startswith("warning: the runs were tested on 2 different test sets")
    assert [line.split("  ")[0] for line in lines[4:7]] == ["good \\x1b[31m", "bad", "else"]
    assert "good \\x1b[31m is better, more than luck explains (p = 0.00049)" in output.out
    assert "good \\x1b[31m and else have no test image in common" in output.out


def test_compare_as_json_is_json_and_nothing_else_whatever_is_written_besides(
    tracked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tracked)
    page, table = tmp_path / "folder" / "page.html", tmp_path / "table.csv"
    files = ("--html", str(page), "--csv", str(table))
    assert run("compare", "bad", "good \x1b[31m", "--json", *files, params=None) == 0
    output = capsys.readouterr()
    content = json.loads(output.out)
    assert [found["name"] for found in content["runs"]] == ["good \x1b[31m", "bad"]
    assert str(page) in output.err and str(table) in output.err
    assert "run 2: &lt;b&gt; ✗" in page.read_text() and "run 2: <b>" not in page.read_text()
    assert table.read_text().startswith("run,name,test_set,model.filters,test/accuracy,")


def test_compare_says_in_one_line_what_it_cannot_do(
    tracked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", params=None) == 2
    assert "no evaluated run yet: run `dvc repro`" in only_line(capsys)
    monkeypatch.chdir(tracked)
    assert run("compare", "nobody\nhere", params=None) == 2
    assert "nobody\\nhere: no such run" in only_line(capsys)
    assert run("compare", "good \x1b[31m", "--html", "predictions.csv/x", params=None) == 2
    assert "predictions.csv/x: cannot be written: " in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert run("compare", params=None) == 1
    assert "no MLflow server answers there" in only_line(capsys)
