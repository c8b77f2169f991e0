"""The perceptual loss (Table 2a) compares pictures in the features of a VGG-16 that someone else has trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.engine.models.config import IMAGENET_MEAN, IMAGENET_STD
from mirl.engine.models.interop.files import read_torch_checkpoint
from mirl.errors import UserError

# In torchvision's vgg16().features: the last ReLU before each of the first four poolings (relu1_2 ... relu4_3).
LAYERS = (3, 8, 15, 22)


class PerceptualLoss(nn.Module):
    """Average the mean squared difference of VGG-16 features over four depths; the weights are never trained.

    mean, std: of the channels of the given images, which the loss changes to those of ImageNet.
    """

    def __init__(self, state: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Load ``state``, ``features.*`` of torchvision's vgg16. UserError names a missing or misshapen weight."""
        super().__init__()
        from torchvision.models import vgg16  # an import of seconds that only this loss pays

        self.features = vgg16(weights=None).features[: LAYERS[-1] + 1]
        wanted = self.features.state_dict()
        given = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
        wrong = [key for key, value in wanted.items() if key not in given or given[key].shape != value.shape]
        if wrong:
            raise UserError(
                f"vgg_weights: features.{wrong[0]} is missing or of another shape; the file must hold torchvision's "
                "vgg16 (for example vgg16-397923af.pth)"
            )
        self.features.load_state_dict({key: given[key] for key in wanted})
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the feature before it is compared too
        self.requires_grad_(False)
        scale = torch.tensor(std) / torch.tensor(IMAGENET_STD)
        shift = (torch.tensor(mean) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        self.register_buffer("scale_C11", scale[:, None, None])
        self.register_buffer("shift_C11", shift[:, None, None])

    @torch.no_grad()
    def targets(self, true_BCHW: Tensor) -> list[Tensor]:
        """Return the features of [B, 3, H, W], normalised with mean and std, with which `forward` compares."""
        return self.extract(true_BCHW)

    def forward(self, predicted_BCHW: Tensor, wanted: list[Tensor]) -> Tensor:
        """Return a float32 scalar, differentiable in ``predicted`` [B, 3, H, W], normalised with mean and std."""
        pairs = zip(self.extract(predicted_BCHW), wanted, strict=True)
        return torch.stack([F.mse_loss(a.float(), b.float()) for a, b in pairs]).mean()

    def extract(self, images_BCHW: Tensor) -> list[Tensor]:
        x = images_BCHW * self.scale_C11 + self.shift_C11
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x.to(layer.weight.dtype) if isinstance(layer, nn.Conv2d) else x)
            if index in LAYERS:
                found.append(x)
        return found


def read_vgg(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a .pth or .safetensors file; no code in it is run. UserError if it has no state dict."""
    try:
        return read_torch_checkpoint(path)
    except FileNotFoundError:
        raise UserError(f"vgg_weights is {str(path)!r}: no such file; save torchvision's vgg16 there") from None
    except UserError as error:
        raise UserError(f"vgg_weights: {error}") from error
