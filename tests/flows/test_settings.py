"""The form of a run: every setting with its limits, nothing filled in, text as it was typed."""

import traceback
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError as Invalid
from prefect.utilities.schema_tools.validation import validate
from pydantic import ValidationError
from ruamel.yaml import YAML

from cnnpipe.errors import UserError
from cnnpipe.params import Params, load
from flows.pipeline import pipeline
from flows.settings import Settings, options

SECTIONS = [name for name in Params.model_fields if name != "promote"]


def test_the_form_has_every_setting_of_the_stages_with_its_words_and_limits() -> None:
    forms = parameter_schema(pipeline).model_dump()["definitions"]
    assert list(forms["Settings"]["properties"]) == SECTIONS
    known = Params.model_json_schema()["$defs"]
    for section in SECTIONS:
        title = section.capitalize()
        shown = forms[title]["properties"]
        allowed = {
            name: {key: value for key, value in setting.items() if key != "default"}
            for name, setting in known[title]["properties"].items()
        }
        for setting in allowed.values():  # a switch, which cannot be left alone, is a choice
            if setting.get("type") == "boolean":
                del setting["type"]
                setting["enum"] = [True, False]
        assert shown == allowed  # and so no default, which a form would send
        assert all(setting["description"] for setting in shown.values())
    assert forms["Model"]["properties"]["filters"]["minimum"] == 1


def test_only_what_is_filled_in_changes_anything() -> None:
    settings = Settings.model_validate(
        {"model": {"filters": 20}, "train": {"patience": None, "learning_rate": 1e-5}}
    )
    assert settings.changes() == {
        "model.filters": 20,
        "train.learning_rate": 1e-5,
        "train.patience": None,
    }
    assert settings.model_dump(mode="json") == {  # what Prefect keeps of it
        "model": {"filters": 20},
        "train": {"learning_rate": 1e-5, "patience": None},
    }
    assert Settings().changes() == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": {"filters": 0}},
        {"model": {"filters": "10"}},
        {"model": {"filter": 10}},
        {"split": {"val": 1.0}},
        {"training": {}},
        {"promote": {"alpha": 1}},
    ],
)
def test_what_is_out_of_range_or_unknown_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate(wrong)


@pytest.mark.parametrize("url", ["https://me:hidden@host/a.zip", "https://h/a?sig=hidden"])
def test_credentials_in_the_url_are_refused_and_not_repeated(url: str) -> None:
    given = {"settings": {"download": {"url": url}}}
    # As Prefect's server does before it keeps them, ...
    schema = parameter_schema(pipeline).model_dump()
    with pytest.raises(Invalid, match=r"credentials .* the environment, ~/.aws") as refused:
        validate(given, schema, raise_on_error=True, ignore_required=True)
    assert "hidden" not in str(refused.value)
    for fine in ({"url": "s3://photos/a.zip"}, {"url": None}, {"folder": url}, {}):
        settings = {"settings": {"download": fine}}
        assert validate(settings, schema, ignore_required=True, allow_none_with_default=True) == []
    # ... and a flow that is run without one.
    with pytest.raises(UserError, match=r"download.url: holds credentials") as failure:
        pipeline.validate_parameters(given)
    assert "hidden" not in "".join(traceback.format_exception(failure.value))


@pytest.mark.parametrize(
    "value",
    ["data/inbox", "/a b/ä,ö", "it's \"so\"", "a\\b", "a\\", 'a\\"b', "C:\\\\x\\", "$x",
     "${base.seed}", "[1,2]", "x=1", "null", "yes", "1e3", "{a: b}", "~", "# no comment",
     "choice(1,2)", None, True, 7, 0.001, 1e-07, 1e16],
)  # fmt: skip
def test_dvc_takes_a_value_as_it_was_given(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("download: {folder: before}\n")
    (_, override) = options({"download.folder": value})
    apply_overrides(path, [override])
    assert YAML(typ="safe", pure=True).load(path) == {"download": {"folder": value}}


def test_settings_that_contradict_each_other_are_found_with_those_of_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("resize: {size: 12}\nmodel:\n")
    assert load(path, {"model.filters": 3}).model.filters == 3
    with pytest.raises(Exception, match=r"\(12 - 14 \+ 2·0\)/1 \+ 1 = -1"):
        load(path, {"model.kernel_size": 14})
