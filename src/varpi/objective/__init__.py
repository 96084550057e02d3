"""The objective: pure functions from tensors (and plain callables) to tensors. No model, file or process group.

In the order of a step: corrupt -> sample_tokens -> score_samples -> group_advantages -> policy_loss and a prior.
"""

from varpi.objective.advantages import group_advantages
from varpi.objective.corruption import corrupt
from varpi.objective.features import SmallConvNet
from varpi.objective.losses import entropy, kl_prior, policy_loss, prior_loss, token_log_probs
from varpi.objective.perceptual import LPIPS, ConvFeatures, Perceptual
from varpi.objective.randomness import uniforms
from varpi.objective.rewards import Rewards, RewardWeights, score_samples
from varpi.objective.rollout import sample_tokens

__all__ = [
    "LPIPS",
    "ConvFeatures",
    "Perceptual",
    "RewardWeights",
    "Rewards",
    "SmallConvNet",
    "corrupt",
    "entropy",
    "group_advantages",
    "kl_prior",
    "policy_loss",
    "prior_loss",
    "sample_tokens",
    "score_samples",
    "token_log_probs",
    "uniforms",
]
