"""The layer table: every size and the sum behind it, every parameter, before anything is built."""

from dataclasses import dataclass
from typing import Any

from cnnpipe.network.architectures import layers_of
from cnnpipe.network.geometry import Dropout, Relu, Shape, mlp_parameters, shapes
from cnnpipe.params import Model


@dataclass(frozen=True)
class Row:
    """One layer of the table."""

    name: str
    output: Shape
    """(C, H, W); what has been flattened is (features, 1, 1)."""
    formula: str
    """The sum behind the output's height and width."""
    parameters: int
    parameters_formula: str
    """The sum behind the parameters, empty where there are none."""


@dataclass(frozen=True)
class Summary:
    """The layer table of a network."""

    input: Shape
    layers: tuple[Row, ...]
    parameters: int
    parameters_trainable: int
    parameters_mlp: int
    """Of the network in which each convolution is a dense layer between the same values."""

    def to_dict(self) -> dict[str, Any]:
        """What `cnnpipe summary --json` prints."""
        return {
            "input": list(self.input),
            "layers": [
                {
                    "name": row.name,
                    "output": list(row.output),
                    "formula": row.formula,
                    "parameters": row.parameters,
                    "parameters_formula": row.parameters_formula,
                }
                for row in self.layers
            ],
            "parameters": self.parameters,
            "parameters_trainable": self.parameters_trainable,
            "parameters_mlp": self.parameters_mlp,
        }

    def __str__(self) -> str:
        rows = [("layer", "output", "size, (W - F + 2P)/S + 1", "parameters", "")]
        rows += [("input", size_text(self.input), "", "", "")]
        rows += [
            (row.name, size_text(row.output), row.formula, f"{row.parameters:,}",
             f"= {row.parameters_formula}" if row.parameters_formula else "")
            for row in self.layers
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)),
                 row[3].rjust(widths[3]), row[4]]
            ).rstrip()
            for row in rows
        ]  # fmt: skip
        lines.insert(1, "-" * max(map(len, lines)))
        saving = self.parameters_mlp / self.parameters
        lines += [
            "",
            f"parameters             {self.parameters:,}",
            f"  of them trainable    {self.parameters_trainable:,}",
            f"as an MLP              {self.parameters_mlp:,}"
            + (f", {saving:,.0f} times as many" if saving > 1 else "")
            + ": every convolution a dense layer",
        ]
        return "\n".join(lines)


def summarize(model: Model, input_shape: Shape, num_classes: int) -> Summary:
    """The layer table of the network that `build` makes from the same arguments.

    ReLU and dropout change neither a size nor a count and have no row.

    Raises:
        ImpossibleSize: a layer's output would be smaller than 1 x 1.
        ValueError: the head is `sigmoid` and there are not two classes.
    """
    layers = layers_of(model, num_classes)
    sizes = shapes(layers, input_shape)
    rows = tuple(
        Row(layer.name, after, layer.formula(before), layer.parameters(before),
            layer.parameters_formula(before))
        for layer, before, after in zip(layers, sizes, sizes[1:], strict=False)
        if not isinstance(layer, Relu | Dropout)
    )  # fmt: skip
    total = sum(row.parameters for row in rows)
    return Summary(input_shape, rows, total, total, mlp_parameters(layers, input_shape))


def size_text(shape: Shape) -> str:
    """Height x width x channels, as people write it; of what has been flattened the number."""
    return f"{shape[1]} x {shape[2]} x {shape[0]}" if shape[1:] != (1, 1) else f"{shape[0]:,}"
