"""The objective: pure functions from tensors (and plain callables) to tensors. No model, file or process group.

In the order of a step: corrupt -> sample_tokens -> score_samples -> group_advantages -> policy_loss and a prior.
"""

from varpi.objective.advantages import group_advantages
from varpi.objective.corruption import corrupt
from varpi.objective.losses import entropy, kl_prior, policy_loss, prior_loss, token_log_probs
from varpi.objective.rewards import Perceptual, Rewards, RewardWeights, score_samples
from varpi.objective.rollout import sample_tokens

__all__ = [
    "Perceptual",
    "RewardWeights",
    "Rewards",
    "corrupt",
    "entropy",
    "group_advantages",
    "kl_prior",
    "policy_loss",
    "prior_loss",
    "sample_tokens",
    "score_samples",
    "token_log_probs",
]
