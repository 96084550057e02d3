"""The whole evaluation on a network small enough to follow: numbers, resuming, sharing, references, refusals."""

import json
import os

import numpy as np
import pytest
import torch

from varpi.data import open_dataset
from varpi.errors import VarpiError
from varpi.evaluation import feature_store, frechet_distance, precision_recall
from varpi.evaluation.distribution import METRICS, DistributionSettings, evaluate_distribution
from varpi.evaluation.reference import open_reference
from varpi.evaluation.result import differences, read_result, write_result
from varpi.evaluation.statistics import frechet, moments
from varpi.networks.judges import embed, load_judge
from varpi.networks.loading import load_extractor
from varpi.runtime import parts
from varpi.runtime.processes import World
from varpi.samples.images import save_npz, save_png
from varpi.samples.reading import open_samples

SMALL = DistributionSettings(inception_score_splits=2, kid_subsets=5, kid_subset_size=10)


class Toy:
    """Random projections of the pixels, as a `FeatureExtractor`; counts what it sees, and may die of it."""

    warnings = ()

    def __init__(self, name="inception", dies_after=None, streams=("pool", "spatial", "logits")):
        self.name = name
        self.streams = {stream: {"pool": 6, "spatial": 4, "logits": 5}[stream] for stream in streams}
        self.identity = {"name": name, "weights_sha256": "0"}
        self.seen, self.dies_after = 0, dies_after

    def __call__(self, images):
        if self.dies_after is not None and self.seen >= self.dies_after:
            raise RuntimeError("killed")
        self.seen += len(images)
        generator = torch.Generator().manual_seed(0)
        pixels = images.float().flatten(1) / 255 - 0.5
        return {
            stream: pixels @ torch.randn(pixels.shape[1], width, generator=generator)
            for stream, width in self.streams.items()
        }


def pictures(n, seed=0, bright=0.0):
    noise = np.random.default_rng(seed).normal(110 + 40 * bright, 60, (n, 4, 4, 3))
    return noise.clip(0, 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(feature_store, "CHUNK", 8)


@pytest.fixture
def files(tmp_path):
    save_npz(tmp_path / "samples.npz", pictures(36))
    save_npz(tmp_path / "reference.npz", pictures(30, seed=1, bright=1.0))
    return tmp_path


def evaluate(files, extractor=None, samples="samples.npz", reference="reference.npz", **options):
    options = {"settings": SMALL, "batch_size": 3, **options}
    return evaluate_distribution(
        open_samples(files / samples),
        None if reference is None else open_reference(files / reference),
        extractor=extractor or Toy(),
        **options,
    )


def test_numbers_are_torch_fidelitys_on_the_same_images(files):
    fid, isc, kid, prc = (pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("fid", "isc", "kid", "prc"))
    toy = Toy()
    made, real = (toy(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (pictures(36), pictures(30, 1, 1.0)))

    def fid_of(stream):
        statistics = [fid.fid_features_to_statistics(side[stream]) for side in (made, real)]
        return fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]

    inception = isc.isc_features_to_metric(made["logits"], splits=2, shuffle=False)
    kernel = kid.kid_features_to_metric(made["pool"], real["pool"], kid_subsets=5, kid_subset_size=10, verbose=False)
    balls = prc.prc_features_to_metric(made["pool"], real["pool"], verbose=False)
    result = evaluate(files)
    assert dict(result.metrics) == pytest.approx(
        {
            "fid": fid_of("pool"),
            "sfid": fid_of("spatial"),
            "inception_score": inception["inception_score_mean"],
            "precision": balls["precision"],
            "recall": balls["recall"],
            "kid": kernel["kernel_inception_distance_mean"],
        },
        rel=1e-4,
    )
    assert result.details["kid_deviation"] == pytest.approx(kernel["kernel_inception_distance_std"], rel=1e-4)
    assert 0 < result.metrics["precision"] < 1


def test_every_form_of_the_samples_gives_the_same_result(files):
    expected = evaluate(files)
    for folder in ("folder", "sampled"):
        for i, image in enumerate(pictures(36)):
            save_png(files / folder / f"{i:05d}.png", image)
    save_npz(files / "sampled" / "samples.npz", pictures(36))
    (files / "sampled" / "sample.json").write_text(json.dumps({"seed": 5, "classes": [i % 3 for i in range(36)]}))
    for form in ("folder", "sampled"):
        for workers in (0, 1) if form == "folder" else (0,):
            found = evaluate(files, samples=form, workers=workers)
            assert found.metrics == expected.metrics
            assert found.samples["sha256"] == expected.samples["sha256"]
            assert found.reference == expected.reference
    assert found.samples == {**expected.samples, "source": str(files / "sampled")}
    assert found.sampling == {"seed": 5, "classes": {"count": 36, "different": 3}}
    assert expected.sampling is None


@pytest.mark.parametrize("seen", [0, 7, 24, 60])
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_numbers(files, seen):
    whole = Toy()
    expected = evaluate(files, whole)
    assert whole.seen == 66
    cache = files / "cache"
    with pytest.raises(RuntimeError, match="killed"):
        evaluate(files, Toy(dies_after=seen), cache=cache)
    again = Toy()
    result = evaluate(files, again, cache=cache)
    assert result == expected
    kept = len(list(cache.glob("*/*.safetensors")))
    assert kept == 5 + 4
    about = [json.loads(path.read_text()) for path in cache.glob("*/about.json")]
    assert {entry["source"] for entry in about} == {str(files / "samples.npz"), str(files / "reference.npz")}
    assert again.seen <= 66 - seen + 8  # no more than a chunk is lost
    assert not list(cache.glob("*/.*.part"))


def test_two_processes_give_the_numbers_of_one(files, monkeypatch):
    monkeypatch.setattr(parts, "PATIENCE", 0.1)
    expected = evaluate(files)
    toys = [Toy(), Toy()]
    cache = files / "cache"
    assert evaluate(files, toys[1], cache=cache, world=World(1, 2, "cpu")) is None
    with pytest.raises(VarpiError, match=r"000002.safetensors: not there after 0 seconds; another process"):
        evaluate(files, Toy(), cache=cache, world=World(0, 9, "cpu"))
    assert evaluate(files, toys[0], cache=cache, world=World(0, 2, "cpu")) == expected
    assert toys[1].seen == 16 + 14  # chunks 1 and 3 of samples and reference
    with pytest.raises(VarpiError, match="by several processes needs a cache directory"):
        evaluate(files, world=World(0, 2, "cpu"))


def test_a_reference_is_seen_once(files):
    cache = files / "cache"
    evaluate(files, cache=cache)
    save_npz(files / "others.npz", pictures(20, seed=3))
    toy = Toy()
    evaluate(files, toy, samples="others.npz", cache=cache)
    assert toy.seen == 20
    for change in ({"name": "other"}, {"streams": ("pool",)}):
        toy = Toy(**change)
        evaluate(files, toy, cache=cache)
        assert toy.seen == 66, f"another network, or one with other streams, looks for itself ({change})"


def test_a_damaged_chunk_is_made_again(files):
    expected = evaluate(files, cache=files / "cache")
    chunks = sorted((files / "cache").glob("*/000001.safetensors"))
    for chunk in chunks:
        chunk.write_bytes(chunk.read_bytes()[:-40])
    toy = Toy()
    assert evaluate(files, toy, cache=files / "cache") == expected
    assert toy.seen == 16


def test_changed_samples_are_measured_anew(files):
    before = evaluate(files, cache=files / "cache")
    stat = (files / "samples.npz").stat()
    save_npz(files / "samples.npz", pictures(36, seed=9))
    os.utime(files / "samples.npz", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = evaluate(files, cache=files / "cache")
    assert after.samples["sha256"] != before.samples["sha256"]
    assert after == evaluate(files)


def test_samples_that_change_meanwhile(files):
    class Meddler(Toy):
        def __call__(self, images):
            os.utime(files / "samples.npz", ns=(0, 0))
            return super().__call__(images)

    with pytest.raises(VarpiError, match=r"samples\.npz: its files changed while they were measured"):
        evaluate(files, Meddler())


def test_the_batch_size_changes_nothing_but_rounding(files):
    expected = evaluate(files).metrics
    assert dict(evaluate(files, batch_size=100).metrics) == pytest.approx(dict(expected), rel=1e-4)


def stored(files, **arrays):
    real = Toy()(torch.from_numpy(pictures(500, 4)).permute(0, 3, 1, 2))
    fitted = {name: moments(stream.numpy()) for name, stream in real.items()}
    content = {
        "mu": fitted["pool"].mean,
        "sigma": fitted["pool"].covariance,
        "mu_s": fitted["spatial"].mean,
        "sigma_s": fitted["spatial"].covariance,
        **arrays,
    }
    np.savez(files / "adm.npz", **{name: array for name, array in content.items() if array is not None})
    return fitted


def test_stored_statistics_are_used_as_they_are(files):
    fitted = stored(files, arr_0=pictures(30, 1, 1.0))
    made = Toy()(torch.from_numpy(pictures(36)).permute(0, 3, 1, 2))
    toy = Toy()
    result = evaluate(files, toy, reference="adm.npz")
    for name, stream in (("fid", "pool"), ("sfid", "spatial")):
        expected = frechet(moments(made[stream].numpy()), fitted[stream])
        assert result.metrics[name] == pytest.approx(expected, rel=1e-6)
    plain = evaluate(files)
    for name in ("precision", "recall", "kid", "inception_score"):
        assert result.metrics[name] == plain.metrics[name]
    assert result.metrics["fid"] != pytest.approx(plain.metrics["fid"], rel=0.01)
    assert result.reference["statistics"] == {"fid": "stored in the file", "sfid": "stored in the file"}
    assert plain.reference["statistics"]["fid"] == "computed from its images"
    toy = Toy()
    alone = evaluate(files, toy, reference="adm.npz", metrics=("fid", "sfid"))
    assert toy.seen == 36  # the reference's images were not needed
    assert alone.metrics == {name: result.metrics[name] for name in ("fid", "sfid")}
    assert alone.reference["sha256"] == result.reference["sha256"]


def test_statistics_alone(files):
    stored(files)
    with pytest.raises(VarpiError, match=r"recall cannot be computed: .*adm\.npz holds statistics and no images"):
        evaluate(files, reference="adm.npz", metrics=("fid", "recall"))
    result = evaluate(files, reference="adm.npz")
    assert set(result.metrics) == {"fid", "sfid", "inception_score"}
    assert [line for line in result.warnings if line.startswith("kid is left out: ")]
    assert [line for line in result.warnings if "does not tell the size of the images" in line]
    stored(files, mu_s=None, sigma_s=None)
    with pytest.raises(VarpiError, match=r"sfid cannot be computed: .* holds mu and sigma and no images"):
        evaluate(files, reference="adm.npz", metrics=("sfid",))
    with pytest.raises(VarpiError, match=r"fid cannot be computed: .* holds statistics of Inception and no images"):
        evaluate(files, Toy("other"), reference="adm.npz", metrics=("fid",))
    stored(files, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(VarpiError, match=r"its statistics are of 3 features, and inception \(pool\) has 6"):
        evaluate(files, reference="adm.npz")


def test_statistics_of_inception_are_not_used_for_another_network(files):
    stored(files, arr_0=pictures(30, 1, 1.0))
    result = evaluate(files, Toy("other"), reference="adm.npz", metrics=("fid",))
    assert result.metrics["frechet_distance"] == evaluate(files).metrics["fid"]


def test_names_tell_the_network(files):
    """And what a network has no features for is no cause for a warning."""
    assert not evaluate(files, Toy("dinov2", streams=("pool",))).warnings
    assert set(evaluate(files, Toy("dinov2", streams=("pool",))).metrics) == {
        "fd_dinov2",
        "precision",
        "recall",
        "kd_dinov2",
    }
    assert set(evaluate(files, Toy("digits", streams=("pool", "logits"))).metrics) == {
        "frechet_distance",
        "inception_score",
        "precision",
        "recall",
        "kernel_distance",
    }


def test_precision_and_recall_use_part_of_a_large_reference(files):
    result = evaluate(
        files, settings=DistributionSettings(2, max_reference_for_pr=10, kid_subset_size=10), metrics=("precision",)
    )
    toy = Toy()
    made, real = (toy(torch.from_numpy(x).permute(0, 3, 1, 2))["pool"] for x in (pictures(36), pictures(30, 1, 1.0)))
    assert result.metrics == {"precision": precision_recall(real[::3], made)[0]}


def test_the_inception_score_needs_no_reference(files):
    result = evaluate(files, reference=None, metrics=("is",))
    assert result.metrics == {"inception_score": evaluate(files).metrics["inception_score"]}
    assert result.reference is None
    with pytest.raises(VarpiError, match="fid cannot be computed: there is no reference"):
        evaluate(files, reference=None, metrics=("fid",))


def test_of_no_metric_the_samples_are_recorded(files):
    result = evaluate(files, metrics=())
    assert (result.metrics, result.reference) == ({}, None)
    assert result.samples == evaluate(files).samples


def test_a_result_is_written_read_and_compared(files, tmp_path):
    stored(files, arr_0=pictures(30, 1, 1.0))
    first = evaluate(files, reference="adm.npz", metrics=("fid",))
    write_result(tmp_path / "result.json", first)
    assert read_result(tmp_path / "result.json") == first
    save_npz(files / "fewer.npz", pictures(20))
    second = evaluate(files, samples="fewer.npz", reference="adm.npz", metrics=("fid",))
    assert differences({"a": first, "b": second}) == ["samples.count: a 36, b 20"]
    more = evaluate(files, reference="adm.npz", metrics=("fid", "sfid"))
    assert differences({"a": first, "more": more, "is": evaluate(files, reference="adm.npz", metrics=("is",))}) == []
    other = evaluate(files, reference="adm.npz", metrics=("fid",), settings=DistributionSettings())
    with pytest.raises(VarpiError, match="have another evaluator"):
        differences({"a": first, "b": other})


def test_warnings(files):
    save_npz(files / "few.npz", pictures(5))
    (files / "sampled").mkdir()
    save_npz(files / "sampled" / "samples.npz", pictures(36))
    (files / "sampled" / "sample.json").write_text(json.dumps({"classes": [0] * 30 + [1] * 6}))
    warnings = evaluate(files, samples="sampled").warnings
    assert "36 samples; published ImageNet numbers use 50,000" in warnings
    assert "30 reference images; published precision and recall use ADM's batch of 10,000" in warnings
    assert [line for line in warnings if line.startswith("images of 4x4 pixels; the paper resizes to 256x256 first")]
    assert "unbalanced classes: 6 to 30 samples each; compare with sets drawn alike" in warnings
    assert not [line for line in warnings if "biased upwards" in line]
    warnings = evaluate(files, samples="few.npz", metrics=("fid",)).warnings
    assert "5 samples for 6 features: fid is biased upwards; published ones use 50,000" in warnings
    assert list(evaluate(files, Toy("other")).warnings) == []


def test_metrics_that_are_refused(files):
    with pytest.raises(VarpiError, match=r"no metric 'fidd': there are fid, sfid, .*; did you mean fid"):
        evaluate(files, metrics=("fidd",))
    with pytest.raises(VarpiError, match=r"no metric 'zzz': there are fid, sfid, is, precision, recall, kid$"):
        evaluate(files, metrics=("zzz",))
    with pytest.raises(VarpiError, match="sfid cannot be computed: the extractor inception gives no 'spatial', only p"):
        evaluate(files, Toy(streams=("pool",)), metrics=("sfid",))
    save_npz(files / "one.npz", pictures(1))
    save_npz(files / "three.npz", pictures(3))
    for samples, metric, message in (
        ("one.npz", "fid", "has 1 samples, and at least 2 are needed: a covariance"),
        ("one.npz", "is", "at least 2 are needed: one for each split"),
        ("three.npz", "recall", "has 3 samples, and at least 4 are needed: more than its neighbors"),
        ("three.npz", "kid", "at least 10 are needed: as many as a subset has"),
    ):
        with pytest.raises(VarpiError, match=f"{metric} cannot be computed: .*{message}"):
            evaluate(files, samples=samples, metrics=(metric,))
    with pytest.raises(VarpiError, match=r"three\.npz has 3 reference images, and at least 4"):
        evaluate(files, reference="three.npz", metrics=("precision",))
    few = evaluate(files, samples="three.npz")
    assert set(few.metrics) == {"fid", "sfid", "inception_score"}
    assert sum("left out" in line for line in few.warnings) == 3
    with pytest.raises(VarpiError, match=r"fid cannot be computed: .* at least 2"):
        evaluate(files, samples="one.npz")


def test_settings_that_are_refused(files):
    for name in ("inception_score_splits", "neighbors", "max_reference_for_pr", "kid_subsets"):
        with pytest.raises(VarpiError, match=f"{name} is 0; it must be at least 1"):
            DistributionSettings(**{name: 0})
    with pytest.raises(VarpiError, match="kid_subset_size is 1; it must be at least 2"):
        DistributionSettings(kid_subset_size=1)
    with pytest.raises(VarpiError, match="distance_dtype is 'half'"):
        DistributionSettings(distance_dtype="half")
    with pytest.raises(VarpiError, match="batch_size is 0"):
        evaluate(files, batch_size=0)


def test_a_reference_of_another_size(files):
    save_npz(files / "wide.npz", np.zeros((5, 4, 8, 3), dtype=np.uint8))
    with pytest.raises(VarpiError, match=r"wide\.npz: its images are 8x4 and those of .*samples\.npz 4x4"):
        evaluate(files, reference="wide.npz")


def test_features_that_are_refused(files):
    class Diverged(Toy):
        def __call__(self, images):
            streams = super().__call__(images)
            if self.seen > 12:
                streams["pool"][-1] = float("nan")
            return streams

    with pytest.raises(
        VarpiError, match=r"samples\.npz: 2 images, first number 13, have features \(pool\) that are NaN"
    ):
        evaluate(files, Diverged())

    class Narrow(Toy):
        def __call__(self, images):
            return {name: stream[:, 1:] for name, stream in super().__call__(images).items()}

    with pytest.raises(VarpiError, match=r"stream 'pool' is torch.float32 \(8, 5\); it must be float32 \(8, 6\)"):
        evaluate(files, Narrow())


def test_the_judge_of_the_digits(tmp_path):
    """Of the embedded judge, the numbers that `varpi demo` computes from tensors."""
    digits = open_dataset("digits", image_size=32, split="test")
    images = torch.stack([digits[i].image for i in range(0, 800, 8)])
    darker = images * 0.8 - 0.2
    save_npz(tmp_path / "samples.npz", ((darker + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 1).numpy())
    save_npz(tmp_path / "reference.npz", ((images + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 1).numpy())
    result = evaluate(tmp_path, load_extractor("digits"), metrics=("fid", "precision", "recall"))
    judge = load_judge()
    made, real = (embed(judge, open_images(tmp_path / name)) for name in ("samples.npz", "reference.npz"))
    assert result.metrics["frechet_distance"] == pytest.approx(frechet_distance(real[0], made[0]), rel=1e-4)
    assert result.metrics["frechet_distance"] > 0.01
    found = result.metrics["precision"], result.metrics["recall"]
    assert found == pytest.approx(precision_recall(real[0], made[0]), abs=0.011)
    assert result.evaluator["extractor"]["name"] == "digits"
    with pytest.raises(VarpiError, match="images of 4x4 pixels; the judge digits knows images of 32x32"):
        load_extractor("digits")(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def open_images(path):
    with np.load(path) as file:
        return torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_every_metric_is_described():
    assert set(METRICS) == {"fid", "sfid", "is", "precision", "recall", "kid"}
