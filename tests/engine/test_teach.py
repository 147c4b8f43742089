import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dfkd_fast import NonFiniteLossError, Optimizer
from dfkd_fast.engine.teach import TeacherTrainer


def blobs() -> TensorDataset:
    """Three classes that a linear layer can tell apart."""
    labels = torch.arange(60) % 3
    noise = torch.randn(60, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(noise + 4.0 * labels[:, None, None, None], labels)


def make(seed: int = 0, *, epochs: int = 4, lr: float = 0.05, batches: object = None) -> TeacherTrainer:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(4, 3))
    stream = torch.Generator().manual_seed(seed)
    loader = batches or DataLoader(blobs(), 8, shuffle=True, generator=stream)
    return TeacherTrainer(network, loader, Optimizer(lr=lr, schedule="cosine"), epochs, stream, torch.device("cpu"))  # type: ignore[arg-type]


def weights(trainer: TeacherTrainer) -> list[Tensor]:
    return list(trainer.network.parameters())


def test_cross_entropy_falls() -> None:
    losses = [epoch.losses["teacher"] for epoch in make(epochs=20)]
    assert losses[-1] < losses[0] / 2


def test_stopped_in_an_epoch_it_goes_on_from_that_epochs_beginning_bit_for_bit() -> None:
    whole = make()
    for _ in whole:
        pass

    stopped = make()
    running = iter(stopped)
    next(running)
    stopped.stop()
    assert list(running) == []
    assert stopped.done == 1

    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = make(seed=8)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [epoch.number for epoch in resumed] == [2, 3, 4]
    for ours, theirs in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loss_that_is_not_finite_stops_it() -> None:
    broken = [(torch.full((4, 1, 2, 2), float("inf")), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(NonFiniteLossError, match="teacher's loss is nan in epoch 1"):
        list(make(batches=broken))
