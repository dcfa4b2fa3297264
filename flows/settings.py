"""The settings of params.yaml as a form: a run changes those that are filled in."""

import copy
import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, create_model, model_serializer

from cnnpipe.addresses import SECRET, WHERE_CREDENTIALS_BELONG
from cnnpipe.params import Params, Section


def _unfilled(schema: dict[str, Any]) -> None:
    # What a form shows as default it also sends: nobody means to change all settings at once. Nor
    # can a switch, unlike a choice, be left alone: it would send false.
    for setting in schema["properties"].values():
        setting.pop("default", None)
        if setting.get("type") == "boolean":
            del setting["type"]
            setting["enum"] = [True, False]
    if schema["title"] == "Download":
        # Prefect's server refuses what does not fit, and keeps what does. Of its checks this one
        # does not repeat what was given.
        schema["if"] = {"properties": {"url": {"type": "string", "pattern": SECRET}}}
        belong = f"taking the credentials out of it, into {WHERE_CREDENTIALS_BELONG},"
        schema["then"] = {"dependentRequired": {"url": [belong]}}


def _form(section: type[Section]) -> Any:
    """The section with nothing filled in."""
    fields: dict[str, Any] = {}
    for name, known in section.model_fields.items():
        field = copy.copy(known)
        field.default = None
        fields[name] = (known.annotation, field)
    config = ConfigDict(**{**section.model_config, "json_schema_extra": _unfilled})
    return create_model(section.__name__, __config__=config, __doc__=section.__doc__, **fields)


# The rules of promotion are those of the checkout, whatever an experiment tries.
_FORMS: dict[str, Any] = {
    name: _form(field.annotation)  # type: ignore[arg-type]
    for name, field in Params.model_fields.items()
    if name != "promote"
}
_SECTIONS: dict[str, Any] = {name: (form, form()) for name, form in _FORMS.items()}
_Sections: Any = create_model(
    "_Sections",
    __config__=ConfigDict(extra="forbid", protected_namespaces=(), json_schema_extra=_unfilled),
    **_SECTIONS,
)


class Settings(_Sections):
    """What is to differ from params.yaml; what is left empty is as it says there."""

    @model_serializer
    def filled_in(self) -> dict[str, dict[str, Any]]:
        """The sections and settings that are filled in."""
        sections = {name: getattr(self, name).model_dump(exclude_unset=True) for name in _FORMS}
        return {name: values for name, values in sections.items() if values}

    def changes(self) -> dict[str, Any]:
        """The settings that are filled in, by dotted name."""
        return {
            f"{section}.{name}": value
            for section, values in self.filled_in().items()
            for name, value in values.items()
        }


def options(changes: Mapping[str, Any]) -> list[str]:
    """The changes as options of `dvc exp run`."""
    return [part for name, value in changes.items() for part in ("-S", f"{name}={_written(value)}")]


def _written(value: Any) -> str:
    """The value in Hydra's grammar, which DVC reads with; a text must not come to mean more."""
    if not isinstance(value, str):
        return json.dumps(value)
    # Backslashes are literal but before a quote, and "${" begins a reference.
    text = re.sub(r'(\\*)("|$)', lambda end: 2 * end[1] + end[2].replace('"', '\\"'), value)
    return '"' + text.replace("${", r"\${") + '"'
