import torch

from varpi.objective.adversarial import adversarial_loss, discriminator_loss


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0, 1.0]), torch.tensor([-3.0, -0.5, 0.0, 2.0])
    # (0 + 0.5 + 2 + 0) / 4 = 0.625 and (0 + 0.5 + 1 + 3) / 4 = 1.125, of which half the sum
    assert discriminator_loss(real, fake).item() == 0.875
    assert adversarial_loss(fake).item() == 0.375
    assert discriminator_loss(torch.tensor([1.0]), torch.tensor([-1.0])).item() == 0  # a margin won is enough
