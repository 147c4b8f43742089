"""Small classifiers used in the papers; larger ones come from torchvision and timm."""

from torch import Tensor, nn

__all__ = ["LeNet5", "WideResNet", "cifar_resnet"]

LENET5 = (6, 16, 120, 84)
LENET5_HALF = (3, 8, 60, 42)


class LeNet5(nn.Sequential):
    """LeNet-5 as used by DFAD (arXiv 1912.11006): ReLU, max pooling, no padding, no batch norm.

    Shape: (N, channels, 32, 32) → (N, num_classes).

    Args:
        num_classes: number of logits.
        channels: number of channels of the input images.
        widths: output channels of the three convolutions, and size of the hidden linear layer.
    """

    def __init__(self, num_classes: int = 10, channels: int = 1, widths: tuple[int, int, int, int] = LENET5) -> None:
        first, second, third, hidden = widths
        super().__init__(
            nn.Conv2d(channels, first, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(second, third, kernel_size=5),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(third, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )


def cifar_resnet(blocks: tuple[int, int, int, int], num_classes: int = 10, channels: int = 3) -> nn.Module:
    """Builds torchvision's basic-block ResNet with the CIFAR stem: a 3×3 convolution of stride 1 and no max pooling.

    Args:
        blocks: number of residual blocks in each of the four stages: (2, 2, 2, 2) for ResNet-18, (3, 4, 6, 3) for ResNet-34.
        num_classes: number of logits.
        channels: number of channels of the input images.

    Returns:
        A randomly initialized network, images (N, channels, H, W) → logits (N, num_classes).
    """
    from torchvision.models.resnet import BasicBlock, ResNet

    network: nn.Module = ResNet(BasicBlock, list(blocks), num_classes=num_classes)
    network.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


class WideResNet(nn.Module):
    """Wide residual network for small images (Zagoruyko and Komodakis 2016, arXiv 1605.07146): WRN-depth-width.

    Shape: (N, channels, H, W) → (N, num_classes).

    Args:
        depth: number of convolutional layers, 6n + 4.
        width: multiplier of the channels 16, 32, 64 of the three groups.
        num_classes: number of logits.
        channels: number of channels of the input images.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        layers: list[nn.Module] = [nn.Conv2d(channels, 16, kernel_size=3, padding=1, bias=False)]
        in_channels = 16
        for group, out_channels in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range(blocks):
                stride = 2 if group > 0 and block == 0 else 1
                layers.append(PreActivationBlock(in_channels, out_channels, stride))
                in_channels = out_channels
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(in_channels), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)))


class PreActivationBlock(nn.Module):
    """Residual block with two sequences of batch norm, ReLU and 3×3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU())
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        )
        # As in the paper's code, the projection shortcut takes the activated input, the identity shortcut the raw input.
        self.projection = (
            None
            if in_channels == out_channels and stride == 1
            else nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activate(x)
        shortcut = x if self.projection is None else self.projection(activated)
        return shortcut + self.residual(activated)
