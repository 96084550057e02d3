"""Inception as an extractor against torch-fidelity's own, on random weights of the real shapes; extractors by name."""

import hashlib
import os
import pickle
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from varpi.errors import VarpiError
from varpi.evaluation.distribution import DistributionSettings, evaluate_distribution
from varpi.evaluation.reference import open_reference
from varpi.networks.inception import INCEPTION_FILE
from varpi.networks.loading import load_extractor
from varpi.samples.images import save_png
from varpi.samples.reading import open_samples


def pictures(n: int = 3, size: int = 40, seed: int = 0) -> torch.Tensor:
    """Smooth colours, uint8 (n,3,size,size): on plain noise a random network sees the same in every image."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file as torch-fidelity's, of random weights that keep the signal alive through all layers."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    unfilled = type("Unfilled", (module.FeatureExtractorInceptionV3,), {"load_state_dict": lambda self, _: None})
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = unfilled("inception", ["2048"], feature_extractor_weights_path=path)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.8, 1.2)
            for tensor in (layer.bias, layer.running_mean):
                nn.init.normal_(tensor, std=0.1)
            nn.init.uniform_(layer.running_var, 0.8, 1.2)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def original(weights):
    """torch-fidelity's own network, loaded its own way."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    return module.FeatureExtractorInceptionV3("i", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)


@pytest.fixture(scope="module")
def inception(weights):
    return load_extractor("inception", weights=weights)


def test_streams_are_torch_fidelitys(inception, original):
    seen = {}
    hook = original.Mixed_6d.branch1x1.register_forward_hook(lambda _m, _i, output: seen.update(map=output.clone()))
    with torch.inference_mode():
        pool, logits = original(pictures())
    hook.remove()
    theirs = {"pool": pool, "logits": logits, "spatial": seen["map"].permute(0, 2, 3, 1)[..., :7].flatten(1)}
    ours = inception(pictures())
    assert {name: stream.shape[1] for name, stream in ours.items()} == dict(inception.streams)
    assert dict(inception.streams) == {"pool": 2048, "spatial": 2023, "logits": 1008}
    for name, stream in ours.items():
        scale = theirs[name].abs().max()
        assert stream.dtype == torch.float32
        assert theirs[name].std(dim=0).mean() > 0.01 * scale, "the images must differ for the comparison to mean much"
        torch.testing.assert_close(stream / scale, theirs[name] / scale, rtol=1e-3, atol=1e-5)


def test_bfloat16_is_near_and_called_another_evaluator(weights, inception):
    half = load_extractor("inception", weights=weights, precision="bf16")
    expected, found = inception(pictures(1)), half(pictures(1))
    for name, stream in found.items():
        drift = (stream - expected[name]).norm() / expected[name].norm()
        assert 1e-5 < drift < 0.05
    assert {key for key in half.identity if half.identity[key] != inception.identity[key]} == {"precision"}


def test_bfloat16_of_the_digits():
    digits = pictures(2, size=32)
    exact, half = (load_extractor("digits", precision=precision)(digits)["logits"] for precision in ("fp32", "bf16"))
    assert 1e-5 < (half - exact).norm() / exact.norm() < 0.05


def test_identity_names_the_weights(weights, inception):
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert inception.identity["weights_sha256"] == sha256
    assert inception.identity["software"].startswith("torch-fidelity 0.")
    assert inception.warnings == (
        f"the Inception weights (sha256 {sha256[:8]}…) are not the published ones (6726825d…): no published number "
        "compares with these",
    )


def test_metrics_of_the_same_images_are_torch_fidelitys(inception, original, tmp_path):
    """Of the parts that take no 2048-wide matrix root; `test_the_whole_of_torch_fidelity` has FID as well."""
    isc, kid, prc = (pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("isc", "kid", "prc"))
    samples, reference = pictures(5), pictures(4, seed=1)
    write(tmp_path / "samples", samples)
    write(tmp_path / "reference", reference)
    result = evaluate_distribution(
        open_samples(tmp_path / "samples"),
        open_reference(tmp_path / "reference"),
        extractor=inception,
        metrics=("is", "precision", "recall", "kid"),
        settings=DistributionSettings(inception_score_splits=1, neighbors=1, kid_subsets=3, kid_subset_size=3),
        batch_size=4,
    )
    with torch.inference_mode():
        (made, logits), (real, _) = original(samples), original(reference)
    score = isc.isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    distance = kid.kid_features_to_metric(made, real, kid_subsets=3, kid_subset_size=3, verbose=False)
    balls = prc.prc_features_to_metric(made, real, prc_neighborhood=1, verbose=False)
    assert result is not None
    assert dict(result.metrics) == pytest.approx(
        {
            "inception_score": score,
            "precision": balls["precision"],
            "recall": balls["recall"],
            "kid": distance["kernel_inception_distance_mean"],
        },
        rel=1e-3,
    )


@pytest.mark.slow
def test_the_whole_of_torch_fidelity(weights, inception, tmp_path):
    fidelity = pytest.importorskip("torch_fidelity")
    write(tmp_path / "samples", pictures(12))
    write(tmp_path / "reference", pictures(10, seed=1))
    expected = fidelity.calculate_metrics(
        input1=str(tmp_path / "samples"),
        input2=str(tmp_path / "reference"),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        isc_splits=3,
        kid_subsets=4,
        kid_subset_size=8,
        prc_neighborhood=2,
        samples_shuffle=False,
        cuda=False,
        cache=False,
        verbose=False,
    )
    result = evaluate_distribution(
        open_samples(tmp_path / "samples"),
        open_reference(tmp_path / "reference"),
        extractor=inception,
        metrics=("fid", "is", "precision", "recall", "kid"),
        settings=DistributionSettings(inception_score_splits=3, neighbors=2, kid_subsets=4, kid_subset_size=8),
        batch_size=5,
    )
    assert result is not None
    assert dict(result.metrics) == pytest.approx(
        {
            "fid": expected["frechet_inception_distance"],
            "inception_score": expected["inception_score_mean"],
            "precision": expected["precision"],
            "recall": expected["recall"],
            "kid": expected["kernel_inception_distance_mean"],
        },
        rel=1e-3,
    )


def write(folder: Path, images: torch.Tensor) -> None:
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        save_png(folder / f"{i:05d}.png", np.ascontiguousarray(image))


def test_weights_in_torch_hubs_cache_are_found(weights, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    os.link(weights, tmp_path / "checkpoints" / INCEPTION_FILE)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_a, **_k: pytest.fail("nothing is to be downloaded"))
    assert load_extractor("inception").name == "inception"


def test_absent_weights_without_a_network(monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(url, *_args, **_kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    where = f"{tmp_path}/checkpoints/{INCEPTION_FILE}: Inception's weights are not there and cannot be downloaded"
    with pytest.raises(
        VarpiError, match=rf"^{where} \(.*no route to host.*\); fetch https://.* and put it there, or .*--w"
    ):
        load_extractor("inception")


def test_a_downloaded_file_is_checked_by_its_name(weights, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = {}

    def download(url, destination, hash_prefix, progress):
        asked.update(url=url, hash_prefix=hash_prefix)
        os.link(weights, destination)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    load_extractor("inception")
    assert asked["url"].endswith("/v0.2.0/weights-inception-2015-12-05-6726825d.pth")
    assert asked["hash_prefix"] == "6726825d"


def altered(weights: Path, path: Path, change) -> Path:
    tensors = torch.load(weights, weights_only=True, mmap=True)
    change(tensors)
    torch.save(tensors, path)
    return path


def test_weights_that_are_refused(weights, tmp_path):
    with pytest.raises(VarpiError, match=r"nowhere\.pth: no such file"):
        load_extractor("inception", weights=tmp_path / "nowhere.pth")
    path = tmp_path / "a.pth"
    for change, message in (
        (lambda t: t.pop("Mixed_6d.branch1x1.conv.weight"), "1 missing: Mixed_6d.branch1x1.conv.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), "1 unexpected: extra"),
        (lambda t: t.update({"fc.bias": torch.zeros(7)}), r"fc.bias \(7,\) instead of \(1008,\)"),
        (lambda t: t.update({"fc.bias": torch.full((1008,), torch.nan)}), "fc.bias holds NaN"),
    ):
        with pytest.raises(VarpiError, match=message):
            load_extractor("inception", weights=altered(weights, path, change))

    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path.write_bytes(pickle.dumps({"fc.bias": Harmful()}, protocol=2))
    with pytest.raises(VarpiError, match=r"a\.pth: .*(refused|not a readable)"):
        load_extractor("inception", weights=path)
    assert not (tmp_path / "ran").exists()


def test_files_without_counters_of_batches_are_read(weights, inception, tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if name.endswith("num_batches_tracked")]:
            del tensors[name]

    older = load_extractor("inception", weights=altered(weights, tmp_path / "older.pth", drop))
    assert torch.equal(older(pictures(1))["pool"], inception(pictures(1))["pool"])


def test_arguments_that_are_refused(inception, monkeypatch):
    with pytest.raises(VarpiError, match=r"no feature extractor 'vgg'; there are inception, dinov2, .*digits, cifar10"):
        load_extractor("vgg")
    with pytest.raises(VarpiError, match="precision is 'fp16'; it must be one of fp32, bf16"):
        load_extractor("digits", precision="fp16")
    with pytest.raises(
        VarpiError, match=r"expected uint8 images of shape \(B, 3, H, W\), got torch.float32 \(1, 3, 8, 8"
    ):
        inception(torch.zeros(1, 3, 8, 8))
    with pytest.raises(VarpiError, match=r"got torch.uint8 \(1, 8, 8, 3\)"):
        inception(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    for name, package, extra in (
        ("inception", "torch_fidelity", "evaluation"),
        ("dinov2", "transformers", "evaluation,text"),
    ):
        for loaded in [module for module in sys.modules if module.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(VarpiError, match=rf"the {name} extractor needs.*: pip install 'varpi\[{extra}\]'"):
            load_extractor(name)
