"""What every metric on the page is called, which side of it is better, and what it says, in a sentence."""

from typing import Literal, NamedTuple


class Column(NamedTuple):
    """How a column of a table is read."""

    label: str
    better: Literal["lower", "higher", "nearer 0"]
    meaning: str


_FRECHET = "How far the distribution of the samples' features lies from that of real images, both taken as Gaussian. "
_KERNEL = "Squared distance of the two sets' means in a cubic polynomial kernel (MMD), unbiased by how many there are. "
_GENEVAL = "Share of the images that a detector finds to show "

COLUMNS = {
    "frechet_distance": Column("Fréchet distance", "lower", _FRECHET + "Zero when mean and covariance coincide."),
    "fid": Column("FID", "lower", _FRECHET + "Features: the last pooling of Inception."),
    "sfid": Column("sFID", "lower", _FRECHET + "Features: an inner layer of Inception that keeps places apart."),
    "fd_dinov2": Column("FD-DINOv2", "lower", _FRECHET + "Features: DINOv2."),
    "inception_score": Column(
        "Inception score",
        "higher",
        "How sure the classifier is of each sample and how evenly the samples spread over its classes. "
        "Between 1 and the number of classes.",
    ),
    "precision": Column(
        "Precision",
        "higher",
        "Fidelity: the share of samples that fall among real images, that is, no farther from one than its "
        "third-nearest real neighbour.",
    ),
    "recall": Column(
        "Recall",
        "higher",
        "Diversity: the share of real images that fall among the samples by the same rule. It drops when a model "
        "keeps to few kinds of image.",
    ),
    "kid": Column("KID", "lower", _KERNEL + "Features: the last pooling of Inception. It can fall below 0 by chance."),
    "kd_dinov2": Column("KD-DINOv2", "lower", _KERNEL + "Features: DINOv2. It can fall below 0 by chance."),
    "kernel_distance": Column("Kernel distance", "lower", _KERNEL + "It can fall below 0 by chance."),
    "class_agreement": Column(
        "Class agreement",
        "higher",
        "The share of samples in which a separately trained classifier sees the class that was asked for.",
    ),
    "clip_score": Column(
        "CLIP score", "higher", "Cosine of the angle between the image's and its prompt's CLIP vectors."
    ),
    "hps_v2.1": Column(
        "HPS v2.1", "higher", "What a model trained on human choices thinks of the image for its prompt."
    ),
    "hps_v2.0": Column("HPS v2.0", "higher", "The same by the first release of that model; not on the scale of v2.1."),
    "overall": Column("GenEval", "higher", "Mean of the shares of the tasks beside it, each task counting alike."),
    "single_object": Column("Single object", "higher", _GENEVAL + "the object that the prompt names."),
    "two_object": Column("Two objects", "higher", _GENEVAL + "both objects that the prompt names."),
    "counting": Column("Counting", "higher", _GENEVAL + "exactly as many of an object as the prompt says."),
    "colors": Column("Colours", "higher", _GENEVAL + "an object in the colour that the prompt gives it."),
    "position": Column("Position", "higher", _GENEVAL + "two objects on the sides of each other that the prompt says."),
    "color_attr": Column("Colour attribution", "higher", _GENEVAL + "two objects, each in its own colour."),
    "reconstruction_reward": Column(
        "Reconstruction reward",
        "higher",
        "What VA-π trains on: minus the error, in pixels and features, between an image and what the generator draws "
        "while it is shown the image's own tokens.",
    ),
    "prior_term": Column(
        "Prior term",
        "lower",
        "Cross-entropy of real images' tokens, in nats a token: how likely the generator finds them.",
    ),
    "lower_bound": Column(
        "Lower bound", "higher", "Reconstruction reward minus the weighted prior term: the objective as a whole."
    ),
    "entropy_gap": Column(
        "Entropy gap",
        "nearer 0",
        "How much less certain, in nats a token, the generator is after its own tokens than after real ones. Below 0 "
        "it is more certain.",
    ),
    "log_likelihood_gap": Column(
        "Log-likelihood gap",
        "nearer 0",
        "How much likelier, in nats a token, the generator finds its own samples than real images.",
    ),
    "teacher_free_distance": Column(
        "Teacher-free distance",
        "lower",
        "Fréchet distance between images drawn with the real tokens shown and images drawn freely: how far training "
        "lies from use.",
    ),
    "round_trip_distance": Column(
        "Round-trip distance",
        "lower",
        "Mean squared change of a sample that is encoded and decoded once more. Tokens that decode into no image the "
        "tokenizer knows come back changed.",
    ),
    "round_trip_changed": Column(
        "Tokens changed", "lower", "The share of a sample's tokens that this encoding changes."
    ),
}
"""By name, in the order of the columns."""

STANDARD_ERROR = "_standard_error"
"""What a result appends to a metric's name for its standard error over images."""
