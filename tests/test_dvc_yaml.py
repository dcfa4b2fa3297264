"""What dvc.yaml says of the stages is so."""

import ast
from pathlib import Path

from ruamel.yaml import YAML

from cnnpipe.cli import STAGES
from cnnpipe.params import Params

ROOT = Path(__file__).parents[1]
PIPELINE = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


def test_the_package_imports_its_own_modules_at_the_top_where_test_dvc_reruns_sees_them() -> None:
    # The commands import what they need when they are called, and so do two packages' __init__.
    lazy = {"cnnpipe/cli.py", "cnnpipe/network/__init__.py", "cnnpipe/serving/__init__.py"}
    hidden = []
    for path in sorted(ROOT.glob("cnnpipe/**/*.py")):
        name = str(path.relative_to(ROOT))
        tree = ast.parse(path.read_text())
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.ClassDef) and name not in lazy:
                hidden += [
                    f"{name}:{node.lineno}"
                    for node in ast.walk(function)
                    if "cnnpipe" in ast.unparse(node)
                    and isinstance(node, ast.Import | ast.ImportFrom)
                ]
    assert hidden == []


def test_stage_command_module_and_section_share_one_word() -> None:
    assert list(PIPELINE) == list(STAGES)
    for stage, content in PIPELINE.items():
        assert content["cmd"] == f"cnnpipe {stage}"
        assert (ROOT / "cnnpipe" / "stages" / f"{stage}.py").exists()
        assert stage in Params.model_fields
        assert any(p.split(".")[0] == stage for p in content["params"])


def test_no_output_switches_the_run_cache_off() -> None:
    for content in PIPELINE.values():
        for kind in ("outs", "metrics", "plots"):
            assert all(isinstance(output, str) for output in content.get(kind, []))


def test_every_parameter_that_a_stage_reads_exists() -> None:
    known = {*Params.model_fields, *Params().flat()}
    for content in PIPELINE.values():
        assert set(content["params"]) <= known
