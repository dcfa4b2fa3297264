"""The schema of params.yaml: one model a section, and the checks that need no data.

The defaults are the settings of the tutorial that this project began with. `load` is the first
thing every stage does, so that an impossible setting stops the pipeline before anything runs.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from cnnpipe.addresses import WHERE_CREDENTIALS_BELONG, has_secret, without_secrets
from cnnpipe.errors import UserError
from cnnpipe.network.architectures import layers_of
from cnnpipe.network.geometry import ImpossibleSize, PoolingKind, Shape, shapes

PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
Share = Annotated[float, Field(gt=0, lt=1)]


def _without_credentials(url: str | None) -> str | None:
    """The URL; what this raises is no error of pydantic's, which repeats the value."""
    if url is not None and has_secret(url):
        raise UserError(
            "download.url: holds credentials, which would be kept in params.yaml, dvc.lock and "
            f"MLflow: they belong in {WHERE_CREDENTIALS_BELONG}; take them out of the URL"
        )
    return url


SPREAD = {"resize": {"workers", "scheduler"}, "train": {"num_processes"}}
"""The settings of how the work is spread over processes, which the result does not depend on."""


class Section(BaseModel):
    """What all sections have in common: unknown keys, guessed types and NaN are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Base(Section):
    """What concerns more than one stage."""

    seed: int = Field(42, ge=0, lt=2**32)
    """All randomness follows from it: the drawn images, the split, and the training's seed."""


class Download(Section):
    """Where the images come from."""

    source: Literal[
        "drawn-pets", "digits", "cats-dogs", "mnist", "fashion-mnist", "folder", "url"
    ] = "drawn-pets"
    """The data set: built in, a known download, or the user's own."""
    folder: str = Field("data/inbox", min_length=1)
    """For `folder`: class folders, or train/val/test folders of class folders."""
    url: Annotated[str | None, AfterValidator(_without_credentials)] = Field(None, min_length=1)
    """For `url`: a zip or tar archive of such folders, on a web server or s3://bucket/key."""
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] | None = None
    """For `url`: the archive's checksum, in hexadecimal."""
    limit_per_class: PositiveInt | None = None
    """At most so many images of each class, for a quick look; null takes all."""


class Resize(Section):
    """The one size that all images get."""

    size: Pixels = 300
    """Height and width, in pixels."""
    mode: Literal["stretch", "crop", "pad"] = "stretch"
    """Another aspect is stretched to the square, cut to it, or filled up with black."""
    color: Literal["rgb", "grey"] = "rgb"
    """Three channels or one."""
    max_pixels: int = Field(100_000_000, ge=1, le=178_956_970)
    """Height times width of an image file; larger ones are quarantined, not decoded."""
    workers: Literal["auto"] | PositiveInt = "auto"
    """Processes; auto is one a core. The result does not depend on it."""
    scheduler: str | None = Field(None, min_length=1)
    """Of Dask, tcp://HOST:8786: its workers do it instead; null is the one that the variable
    DASK_SCHEDULER_ADDRESS names, or none. Nor does the result depend on this."""


class Split(Section):
    """The shares held out. An official test or validation split is kept instead."""

    val: Share = 0.15
    """The share that chooses the checkpoint."""
    test: Share = 0.15
    """The share that is opened once, by `evaluate`."""


class Model(Section):
    """The network; `cnnpipe summary` prints what these settings make."""

    architecture: Literal["article", "deep", "residual", "mlp"] = "article"
    """A function in cnnpipe/network/architectures.py."""
    filters: int = Field(10, ge=1, le=4096)
    """Of the first convolution; `deep` and `residual` double it from block to block."""
    kernel_size: Pixels = 5
    """F, in pixels: a filter is F x F."""
    stride: Pixels = 1
    """S: how far a filter moves, in pixels."""
    padding: Literal["valid", "same"] | Annotated[int, Field(ge=0, le=4096)] = "valid"
    """No zeros around the image, as many as keep its size at stride 1, or so many a side (P)."""
    pooling: PoolingKind = "max"
    """What becomes of a window: its maximum, its average, or its L2 norm."""
    pool_size: Pixels = 2
    """Height, width and stride of that window."""
    blocks: int = Field(1, ge=1, le=16)
    """Of convolution and pooling (`deep`), residual (`residual`), hidden layers (`mlp`)."""
    dense_units: int = Field(0, ge=0, le=65536)
    """Units of a hidden dense layer before the output; 0 is no such layer."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """The share of values set to zero before the output while training."""
    batch_norm: bool = False
    """Batch normalisation after each convolution (`residual` always has it)."""
    head: Literal["softmax", "sigmoid"] = "softmax"
    """A unit a class and cross-entropy, or one unit for two classes and binary cross-entropy."""
    init: Literal["normal", "xavier_uniform", "xavier_normal", "he_normal"] = "xavier_uniform"
    """How the weights begin."""
    flip_average: bool = False
    """Predict the mean of an image's and its mirror image's probabilities."""


class Train(Section):
    """How the network learns."""

    seed: int | None = Field(None, ge=0, lt=2**32)
    """Of the first weights, the order of the images, augmentation and dropout; None is base.seed.

    With several of these the same images tell how much of a result is chance."""
    epochs: PositiveInt = 5
    """Times that every training image is seen; fewer where `patience` ends it."""
    batch_size: PositiveInt = 128
    """Images a step."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """`sgd` has Nesterov momentum 0.9."""
    learning_rate: float = Field(0.001, gt=0)
    """The peak, where a schedule varies it."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled for `adamw`, an L2 penalty for the others; none on biases and normalisations."""
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"
    """The learning rate step by step: level, falling to zero, or rising first."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """The share of each label spread over all classes."""
    augment: Literal["none", "flip", "crop", "photo"] = "none"
    """Mirror; random resized crop and mirror; or these and brightness, contrast, saturation."""
    crop_size: Pixels | None = None
    """For `crop` and `photo`: the size trained at, in pixels; null is resize.size."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each class in the loss by the inverse of its frequency."""
    patience: PositiveInt | None = None
    """Stop after so many epochs without a better validation; null is never."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is bfloat16 for 64 filters and more on a GPU that has it, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU where there is one."""
    residency: Literal["auto", "resident", "streaming"] = "auto"
    """All images in the device's memory, or read epoch by epoch; auto: in a GPU's if they fit."""
    num_processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Of this machine, each with its share of every batch, and with its GPU where there are GPUs.
    The result is that of one, but for rounding. torchrun starts them on several machines."""
    compile: bool = False
    """Let torch.compile make one program of the network; a minute at the start, a C++ compiler."""


class Evaluate(Section):
    """How the test split is judged."""

    calibration_bins: PositiveInt = 15
    """Equal intervals of confidence for the calibration error."""
    mistakes: PositiveInt = 16
    """So many of the most confident mistakes, and of the least sure hits, are shown."""


class Promote(Section):
    """When `cnnpipe promote` lets a candidate take the champion's place; no stage looks at it.

    Either rule is enough: better beyond luck, or smaller and not worse. Both compare the two models
    on the same test images.
    """

    alpha: Share | None = 0.05
    """Better: the exact McNemar test's p-value is below it, and the interval of the difference in
    accuracy, of 1 - alpha, above 0. The test is two-sided, so that of equal models at most half of
    alpha are promoted. null switches the rule off."""
    tolerance: Share | None = 0.01
    """Not worse: that interval is above minus this, a difference in accuracy. null switches this
    rule off."""
    smaller: Annotated[float, Field(gt=0, le=1)] | None = 0.5
    """Smaller: at most this share of the champion's parameters. null switches this rule off."""
    resamples: int = Field(10_000, ge=1000, le=1_000_000)
    """Of the bootstrap that makes the interval."""


class Params(Section):
    """params.yaml, validated."""

    base: Base = Base()
    download: Download = Download()
    resize: Resize = Resize()
    split: Split = Split()
    model: Model = Model()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    promote: Promote = Promote()

    @property
    def input_shape(self) -> Shape:
        """(C, H, W) of the images that the network gets."""
        return (1 if self.resize.color == "grey" else 3, self.resize.size, self.resize.size)

    @property
    def training_seed(self) -> int:
        """Of all that is random in a training."""
        return self.base.seed if self.train.seed is None else self.train.seed

    def flat(self) -> dict[str, Any]:
        """Every setting that makes a result, by its dotted name, as -S and MLflow call it.

        `promote` is none of them: it judges results that are there. Nor is what says only how many
        processes compute it: a training that was stopped may go on with more.
        """
        return {
            f"{section}.{key}": value
            for section, settings in self.model_dump(exclude={"promote": True, **SPREAD}).items()
            for key, value in settings.items()
        }


def load(path: str | Path, changes: Mapping[str, Any] | None = None) -> Params:
    """The settings in a params.yaml.

    Args:
        path: the file.
        changes: settings that take the place of the file's, by dotted name, as -S makes them.

    Raises:
        UserError: the file cannot be read, or there are unknown keys or impossible values. All
            mistakes are in the one message.
    """
    try:
        # DVC's own reader, so that a value means the same to both: 1e-3 is a number (YAML 1.2).
        content = YAML(typ="safe", pure=True).load(Path(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: run cnnpipe in the folder that holds it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(error.problem).split())
        raise UserError(f"{path}{where}: not valid YAML: {problem}") from None
    except Exception as error:  # the reader raises many kinds for control characters and the like
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold the sections {', '.join(Params.model_fields)}")
    for name, value in (changes or {}).items():
        section, _, key = name.partition(".")
        content[section] = {**(content.get(section) or {}), key: value}
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(_mistakes(error.errors()))}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if mistakes := _contradictions(params):
        raise UserError(f"{path}: {'; '.join(mistakes)}")
    return params


def _contradictions(params: Params) -> list[str]:
    """What is wrong between settings that are each possible alone."""
    download, split, model, train = params.download, params.split, params.model, params.train
    mistakes = []
    if download.source == "url":
        mistakes += [
            f"download.{key} is null: the source url needs it"
            for key in ("url", "sha256")
            if getattr(download, key) is None
        ]
    if split.val + split.test >= 1:
        mistakes.append(
            f"split.val + split.test = {split.val + split.test:g}: must leave images to train on, "
            "so less than 1"
        )
    if model.architecture == "article" and model.blocks > 1:
        mistakes.append(
            f"model.blocks = {model.blocks}: the article's network has one block; "
            "use model.architecture=deep for more"
        )
    if train.batch_size == 1 and (model.batch_norm or model.architecture == "residual"):
        mistakes.append("train.batch_size = 1: batch normalisation needs at least 2 images a batch")
    if isinstance(model.padding, int) and model.padding >= model.kernel_size:
        mistakes.append(
            f"model.padding = {model.padding}: must be less than model.kernel_size, "
            f"{model.kernel_size}, or a filter would see nothing but zeros"
        )
    if train.crop_size is not None:
        if train.augment not in ("crop", "photo"):
            mistakes.append(
                f"train.crop_size = {train.crop_size}: train.augment is {train.augment}, which "
                "does not crop; use crop or photo, or null"
            )
        if model.architecture != "residual":
            mistakes.append(
                f"train.crop_size = {train.crop_size}: the network {model.architecture} takes one "
                "size only; use null, or model.architecture=residual"
            )
        if train.crop_size > params.resize.size:
            mistakes.append(
                f"train.crop_size = {train.crop_size}: must be at most resize.size, "
                f"{params.resize.size}"
            )
    sizes = [params.resize.size]
    if train.crop_size is not None and train.crop_size < params.resize.size:
        sizes.append(train.crop_size)
    for size in sizes:
        try:
            shapes(layers_of(model, num_classes=2), (params.input_shape[0], size, size))
        except ImpossibleSize as error:
            larger = "resize.size" if size == params.resize.size else "train.crop_size"
            mistakes.append(
                f"{error}: use a larger {larger}, fewer model.blocks, or a smaller "
                "model.kernel_size, stride or pool_size"
            )
    return mistakes


def _mistakes(errors: list[ErrorDetails]) -> list[str]:
    """A clause for each wrong key: the key, the value, what is allowed."""
    allowed: dict[tuple[str, ...], list[str]] = {}
    given: dict[tuple[str, ...], Any] = {}
    for error in errors:
        key = tuple(_name(str(part)) for part in error["loc"][:2])
        if error["type"] in ("extra_forbidden", "invalid_key"):
            allowed[key] = [f"{'.'.join(key)}: unknown{_suggestion(key)}"]
            continue
        given[key] = error["input"]
        # A value of two possible types fails twice: "... or ...".
        text = error["msg"].replace("Input should be", "must be")
        if error["type"] == "string_pattern_mismatch":
            text = "must be 64 hexadecimal digits, in small letters"
        elif error["type"] == "model_type":
            setting, default = next(iter(getattr(Params(), key[0]).model_dump().items()))
            text = f"must be the section's settings, such as {setting}: {default}"
        allowed.setdefault(key, []).append(text[0].lower() + text[1:])
    return [
        f"{'.'.join(key)} = {_shown(given[key])}: {' or '.join(texts)}"
        if key in given
        else texts[0]
        for key, texts in allowed.items()
    ]


def _suggestion(key: tuple[str, ...]) -> str:
    section: Any = Params.model_fields[key[0]].annotation if len(key) == 2 else Params
    known = list(section.model_fields)
    close = difflib.get_close_matches(key[-1], known, n=1)
    return f", did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _name(key: str) -> str:
    return key if key.isprintable() else repr(key)


def _shown(value: Any) -> str:
    try:
        text = "null" if value is None else without_secrets(repr(value))
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
