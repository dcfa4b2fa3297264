"""Tests of the networks: gradients everywhere, a sensible start, the same weights again."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnpipe.network import build
from cnnpipe.network.architectures import ARCHITECTURES, layers_of
from cnnpipe.params import Model

VARIANTS = [
    Model(architecture=architecture, filters=4, kernel_size=3, pooling=pooling, init=init,
          batch_norm=more, dense_units=6 if more else 0, dropout=0.2 if more else 0.0,
          blocks=1 if architecture == "article" else 2, head=head)
    for architecture, pooling, init, head, more in product(
        ARCHITECTURES, ["max", "average", "l2"],
        ["normal", "xavier_uniform", "xavier_normal", "he_normal"],
        ["softmax", "sigmoid"], [False, True],
    )
]  # fmt: skip


def test_every_parameter_of_every_network_gets_a_finite_gradient() -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 12, 12)
    for model in VARIANTS:
        network = build(model, (3, 12, 12), 2)
        network(images).square().sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, (model, name)
            assert parameter.grad.isfinite().all(), (model, name)
            # Before a batch normalisation a bias is taken away again: rounding errors remain.
            is_undone = model.batch_norm and name.startswith("conv") and name.endswith("bias")
            assert is_undone or parameter.grad.abs().sum() > 0, (model, name)


@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_have_a_column_a_class(architecture: str, num_classes: int) -> None:
    network = build(Model(architecture=architecture, kernel_size=3), (1, 8, 8), num_classes)
    assert network(torch.zeros(5, 1, 8, 8)).shape == (5, num_classes)


def test_the_sigmoid_head_has_one_unit() -> None:
    network = build(Model(head="sigmoid", kernel_size=3), (3, 8, 8), 2)
    assert network(torch.zeros(5, 3, 8, 8)).shape == (5, 1)
    with pytest.raises(ValueError, match=r"3 classes: use model\.head=softmax"):
        build(Model(head="sigmoid", kernel_size=3), (3, 8, 8), 3)


@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize(
    ("architecture", "init"),
    [
        *product(["article", "deep"], ["normal", "xavier_uniform", "xavier_normal"]),
        # With Xavier a network that is one dense layer has outputs of variance 2 from the start.
        ("mlp", "normal"),
    ],
)
def test_the_first_loss_is_about_ln_of_the_classes(
    architecture: str, init: str, num_classes: int
) -> None:
    torch.manual_seed(0)
    model = Model(architecture=architecture, kernel_size=3, init=init, pooling="average")
    network = build(model, (3, 8, 8), num_classes)
    images, labels = torch.randn(1000, 3, 8, 8), torch.arange(1000) % num_classes
    loss = F.cross_entropy(network(images), labels).item()
    # Not far below: nothing is known yet. Not far above: no output is large.
    assert math.log(num_classes) - 0.05 < loss < math.log(num_classes) + 0.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_seed_gives_the_same_weights(architecture: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        network = build(Model(architecture=architecture, kernel_size=3), (3, 8, 8), 2)
        return nn.utils.parameters_to_vector(network.parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_filters_double_from_block_to_block() -> None:
    model = Model(architecture="deep", filters=5, blocks=3, kernel_size=3)
    convolutions = [m for m in build(model, (3, 40, 40), 2).modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [5, 10, 20]


def test_deep_with_one_block_computes_what_the_article_does() -> None:
    networks = []
    for architecture in ("article", "deep"):
        torch.manual_seed(0)
        networks.append(build(Model(architecture=architecture, kernel_size=3), (3, 9, 9), 2))
    images = torch.randn(4, 3, 9, 9)
    assert torch.equal(networks[0](images), networks[1](images))


def test_hidden_layers_and_dropout_stand_before_the_output() -> None:
    names = [layer.name for layer in layers_of(Model(dense_units=8, dropout=0.5), 2)]
    assert names[-5:] == ["flatten", "hidden", "hidden_relu", "dropout", "dense"]
    names = [
        layer.name for layer in layers_of(Model(architecture="mlp", dense_units=8, blocks=2), 2)
    ]
    assert names == ["flatten", "hidden_1", "hidden_relu_1", "hidden_2", "hidden_relu_2", "dense"]
