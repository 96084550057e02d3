"""DINOv2 as an extractor, against transformers' own network and the original's preprocessing, on random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torchvision import transforms

from varpi.errors import VarpiError
from varpi.networks.loading import load_extractor
from varpi.networks.resizing import resize_like_pillow


def pictures(n: int = 3, size: int = 40, seed: int = 0) -> torch.Tensor:
    """Smooth colours, uint8 (n,3,size,size): on plain noise a random network sees the same in every image."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    """A transformers directory: the real grid of 37 x 37 positions, everything else small."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14, layer_norm_eps=1e-6
    )
    torch.manual_seed(0)
    network = transformers.Dinov2Model(config)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("dinov2")
    network.save_pretrained(path)
    return path


def original_features(path: Path, images: torch.Tensor) -> torch.Tensor:
    """As dgm-eval computes them: torchvision's transforms of PIL images, positions resampled by DINOv2's own rule."""
    transformers = pytest.importorskip("transformers")
    prepare = transforms.Compose(
        [
            transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    network = transformers.Dinov2Model.from_pretrained(path).eval()
    places = network.embeddings.position_embeddings
    grid = places[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
    resampled = torch.cat([places[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, -1)], dim=1)
    network.embeddings.interpolate_pos_encoding = lambda *_args: resampled
    pixels = torch.stack([prepare(Image.fromarray(image)) for image in images.permute(0, 2, 3, 1).numpy()])
    with torch.inference_mode():
        return network(pixel_values=pixels).last_hidden_state[:, 0]


@pytest.mark.parametrize(("size", "tolerance"), [(224, 1e-6), (64, 0.01), (256, 0.01)])
def test_dinov2_features_are_the_originals(dinov2, size, tolerance):
    """Exactly where nothing is resized; elsewhere a few pixels may be rounded the other way."""
    images = pictures(2, size=size)
    extractor = load_extractor("dinov2", weights=dinov2)
    found, expected = extractor(images)["pool"], original_features(dinov2, images)
    assert dict(extractor.streams) == {"pool": 24}
    torch.testing.assert_close(found, expected, atol=tolerance * expected.std().item(), rtol=0)


def test_dinov2_resampling_of_positions_matters(dinov2):
    """By transformers' rule the features are others, by far more than the tolerance above."""
    transformers = pytest.importorskip("transformers")
    images = pictures(2, size=224)
    network = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    mean, deviation = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.inference_mode():
        plain = network(pixel_values=(images / 255 - mean) / deviation).last_hidden_state[:, 0]
    expected = original_features(dinov2, images)
    assert (plain - expected).abs().max() > 1e-3 * expected.std()


def test_pillows_resize_within_one():
    noise = torch.randint(0, 256, (1, 3, 100, 256), dtype=torch.uint8)
    found = resize_like_pillow(noise, 224)[0].permute(1, 2, 0).numpy()
    image = Image.fromarray(noise[0].permute(1, 2, 0).numpy())
    expected = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(found - expected).max() <= 1
    assert np.abs(found - expected).mean() < 0.01


def test_dinov2_directories_that_are_refused(dinov2, tmp_path):
    with pytest.raises(VarpiError, match=r"dinov2 extractor: .* holds no checkpoint"):
        load_extractor("dinov2", weights=tmp_path)
    (tmp_path / "model.safetensors").write_bytes((dinov2 / "model.safetensors").read_bytes())
    with pytest.raises(VarpiError, match=r"its config\.json cannot be read"):
        load_extractor("dinov2", weights=tmp_path)
    config = (dinov2 / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"model_type": "dinov2"', '"model_type": "vit"'))
    with pytest.raises(VarpiError, match="is a model of type 'vit'; expected 'dinov2'"):
        load_extractor("dinov2", weights=tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"hidden_size": 24', '"hidden_size": 48'))
    with pytest.raises(VarpiError, match=r"dinov2 extractor: .* cannot be loaded"):
        load_extractor("dinov2", weights=tmp_path)


def test_another_size_of_dinov2_is_told(dinov2):
    warnings = load_extractor("dinov2", weights=dinov2).warnings
    assert warnings == ("published FD-DINOv2 is of ViT-L/14, 1,024 features; these are 24",)
