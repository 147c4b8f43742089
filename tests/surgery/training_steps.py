"""Steps of training with batch norms, to compare a network before and after a change."""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["Calls", "assert_equal_results", "images", "randomized", "results"]

Calls = list[tuple[str, bool, bool]]
"""Activation, and whether residual and input bias were given, of each call of the kernel."""


def randomized(network: nn.Module) -> nn.Module:
    """Returns the network in float64 with batch norms whose parameters and statistics differ from their initial values."""
    torch.manual_seed(0)
    for norm in (layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)):
        for tensor, low in ((norm.weight, 0.5), (norm.bias, -0.5), (norm.running_mean, -0.1), (norm.running_var, 0.5)):
            if tensor is not None:
                nn.init.uniform_(tensor, low, low + 1)
    return network.double().train()


def results(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Returns output, gradients and buffers of a step in training mode, and the output in evaluation mode after it."""
    torch.manual_seed(0)
    network.train()
    network.zero_grad()
    x = x.detach().clone().requires_grad_()
    outputs = [leaf for leaf in tree_leaves(network(x.clone())) if isinstance(leaf, Tensor)]
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    assert x.grad is not None
    found = {"input gradient": x.grad} | {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    found |= {f"{name}.grad": parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    found |= {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.eval()
    with torch.no_grad():
        found["evaluation"] = network(x.clone())
    network.train()
    return found


def assert_equal_results(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    actual, expected = results(ours, x), results(theirs, x)
    scale = max(float(gradient.abs().max()) for name, gradient in expected.items() if name.endswith("grad"))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():  # gradients of biases before batch norms are rounding errors
        atol = 1e-9 * scale if name.endswith("grad") else 1e-10
        torch.testing.assert_close(actual[name], value, rtol=1e-7, atol=atol, msg=name)


def images(size: int = 32, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)).double()
