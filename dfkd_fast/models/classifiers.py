"""The small classifiers of the papers; larger ones come from torchvision and timm."""

from torch import Tensor, nn

__all__ = ["LeNet5", "WideResNet", "cifar_resnet"]

LENET5 = (6, 16, 120, 84)
LENET5_HALF = (3, 8, 60, 42)


class LeNet5(nn.Sequential):
    """LeNet-5 as DFAD uses it (arXiv 1912.11006): ReLU, max pooling, no padding, no batch norm.

    Args:
        num_classes: number of logits.
        channels: of the input images, which are 32 × 32.
        widths: channels of the three convolutions and of the hidden linear layer.
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
    """torchvision's basic-block ResNet with the CIFAR stem: a 3×3 convolution of stride 1 and no pooling.

    Args:
        blocks: residual blocks in each of the four stages: (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34.
        num_classes: number of logits.
        channels: of the input images.
    """
    from torchvision.models.resnet import BasicBlock, ResNet

    network: nn.Module = ResNet(BasicBlock, list(blocks), num_classes=num_classes)
    network.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


class WideResNet(nn.Module):
    """Wide residual network for small images (Zagoruyko and Komodakis 2016, arXiv 1605.07146): WRN-depth-width.

    Args:
        depth: convolutional layers, 6n + 4.
        width: factor on the channels 16, 32, 64 of the three groups.
        num_classes: number of logits.
        channels: of the input images.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        layers: list[nn.Module] = [nn.Conv2d(channels, 16, kernel_size=3, padding=1, bias=False)]
        before = 16
        for group, after in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range(blocks):
                stride = 2 if group > 0 and block == 0 else 1
                layers.append(PreActivationBlock(before, after, stride))
                before = after
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(before), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)))


class PreActivationBlock(nn.Module):
    """Batch norm, ReLU, 3×3 convolution, twice, around a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.residual = nn.Sequential(
            nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, kernel_size=3, padding=1, bias=False),
        )
        # The projection reads the activated input, the identity the raw one, as in the paper's code.
        self.projection = None if before == after and stride == 1 else nn.Conv2d(before, after, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activate(x)
        shortcut = x if self.projection is None else self.projection(activated)
        return shortcut + self.residual(activated)
