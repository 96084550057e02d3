"""The VQ tokenizer against the golden outputs of the original, and its parts against their formulas."""

import pytest
import torch
from golden import golden, original_state
from torch import nn

from varpi.errors import VarpiError
from varpi.tokenizers import VQ, VQConfig
from varpi.tokenizers.vq import Upsample
from varpi.weights import load_tokenizer


@pytest.mark.parametrize(("name", "downsample"), [("vq16", 16), ("vq8", 8)])
def test_vq(name: str, downsample: int) -> None:
    values, metadata = golden(name)
    state = original_state(VQ(VQConfig(downsample=downsample)), metadata["salt"])
    tokenizer = load_tokenizer({"model": state})
    assert isinstance(tokenizer, VQ)
    assert tokenizer.config == VQConfig(downsample=downsample)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.latents(values["images"]), values["latents"], atol=1e-4, rtol=0)
        assert torch.equal(tokenizer.encode(values["images"]), values["indices"])
        torch.testing.assert_close(tokenizer.decode(values["indices"]), values["decoded"], atol=1e-4, rtol=0)
        decoded = tokenizer.decode(values["random_indices"])
    torch.testing.assert_close(decoded, values["decoded_random"], atol=1e-4, rtol=0)


def test_norms_divide_by_the_root_of_variance_and_a_millionth() -> None:
    """The golden inputs vary too much to tell 1e-6 from PyTorch's 1e-5."""
    tokenizer = VQ(VQConfig(downsample=4, channels=32, channel_multipliers=(1, 1, 2), latent_channels=64))
    norms = [module for module in tokenizer.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 47
    for norm in norms:
        x = torch.randn(2, norm.num_channels, 4, 4) * 1e-3  # of variance 1e-6
        groups = x.view(2, 32, -1)
        centered = groups - groups.mean(-1, keepdim=True)
        expected = centered / (groups.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        torch.testing.assert_close(norm(x), expected.view_as(x), atol=1e-4, rtol=1e-4)


def test_the_gradient_passes_straight_through_the_codes() -> None:
    tokenizer = VQ(VQConfig(downsample=4, channels=8, channel_multipliers=(1, 1, 1), latent_channels=8, norm_groups=4))
    reconstruction, latents, codes = tokenizer(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert latents.shape == codes.shape == (2, 8, 4, 4)
    torch.testing.assert_close(latents.norm(dim=1), torch.ones(2, 4, 4))
    torch.testing.assert_close(reconstruction, tokenizer.decode_codes(codes), atol=1e-5, rtol=1e-5)
    (to_latents,) = torch.autograd.grad(reconstruction.square().sum(), latents, retain_graph=True)
    leaf = codes.detach().requires_grad_()
    (to_codes,) = torch.autograd.grad(tokenizer.decode_codes(leaf).square().sum(), leaf)
    torch.testing.assert_close(to_latents, to_codes, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [torch.zeros(64, dtype=torch.int64), torch.zeros(1, 63).long(), torch.zeros(1, 64)])
def test_tokens_that_are_no_square_of_whole_numbers(tokens: torch.Tensor) -> None:
    with pytest.raises(VarpiError, match=rf"VQ.decode: tokens are {tokens.dtype} .*int64 \(B, N\) with N a square"):
        load_tokenizer("digits").decode(tokens)


def small() -> VQ:
    torch.manual_seed(0)
    tokenizer = VQ(VQConfig(downsample=4, channels=32, channel_multipliers=(1, 1, 2), latent_channels=64))
    nn.init.normal_(tokenizer.quantize.embedding.weight)
    return tokenizer.requires_grad_(False).eval()


def test_up_sampling_folded_into_its_convolution_is_the_same() -> None:
    tokenizer = small()
    upsample = next(module for module in tokenizer.decoder.modules() if isinstance(module, Upsample))
    x = torch.randn(2, upsample.conv.in_channels, 5, 7, requires_grad=True)
    plain = upsample(x)
    upsample.fold()
    folded = upsample(x)
    assert folded.shape == plain.shape == (2, upsample.conv.out_channels, 10, 14)
    torch.testing.assert_close(folded, plain, atol=1e-5, rtol=0)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (plain, folded)]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


def test_a_lowered_decoder_is_near_the_exact_one() -> None:
    tokenizer = small()
    tokens = torch.randint(tokenizer.codebook_size, (4, 64))
    exact, codes = tokenizer.decode(tokens), tokenizer.code_vectors()[tokens].mT.reshape(4, 8, 8, 8)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    before = tokenizer.encode(images)
    tokenizer.lower_decoder()
    low = tokenizer.decode(tokens)
    assert low.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact.flatten(), low.flatten()]))[0, 1] > 0.999
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.decode(tokens), low)
    assert torch.equal(tokenizer.encode(images), before)  # the encoder is as it was
    codes.requires_grad_()
    (gradient,) = torch.autograd.grad(tokenizer.decode_codes(codes).square().mean(), codes)
    assert gradient.dtype == torch.float32
    assert gradient.abs().sum() > 0
