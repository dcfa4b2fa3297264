"""What no line of the program may do: read pickles, run a shell, or load YAML that is code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("cnnpipe/**/*.py"), *ROOT.glob("flows/**/*.py")])

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "pd.read_pickle",
                   "yaml.load", "yaml.unsafe_load", "tarfile.extractall"}  # fmt: skip


def faults(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        if name == "torch.load" and options.get("weights_only") == "True":
            continue
        if name in FORBIDDEN_CALLS or name.endswith((".extractall", ".extract")):
            found.append(name)
        if options.get("shell", "False") != "False":
            found.append(f"{name} with a shell")
        if options.get("allow_pickle", "False") != "False":
            found.append(f"{name} of pickles")
        if name == "np.load" and "allow_pickle" not in options:
            found.append(f"{name} that does not say so")  # its default has been both
        if name == "YAML" and options.get("typ") != "'safe'":
            found.append(f"{name} that is not safe")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_can_run(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from joblib import load", "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)", "np.load('x')", "np.load('x', allow_pickle=True)",
        "import os\nos.system('ls')", "subprocess.run('ls', shell=True)", "eval('1')",
        "tar.extractall()", "yaml.load(text)",
        "YAML(typ='unsafe')", "YAML()",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(text: str) -> None:
    assert faults(text)


def test_servers_listen_on_loopback() -> None:
    from cnnpipe.servers import HOST

    assert HOST == "127.0.0.1"
    text = "".join(path.read_text() for path in SOURCES)
    assert "0.0.0.0" not in text
