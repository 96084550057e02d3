"""The objective: pure functions from tensors (and plain callables) to tensors. No model, file or process group.

In the order of a step: corrupt -> sample_tokens -> score_samples -> group_advantages -> policy_loss and a prior.
"""

from varpi.objective.advantages import group_advantages, local_advantages
from varpi.objective.corruption import corrupt
from varpi.objective.first_order import first_order_loss, residual_advantages
from varpi.objective.guidance import guide, guided_prior
from varpi.objective.losses import entropy, kl_prior, policy_loss, prior_loss, token_log_probs
from varpi.objective.rewards import Perceptual, Rewards, RewardWeights, score_codes, score_samples
from varpi.objective.rollout import sample_tokens

__all__ = [
    "Perceptual",
    "RewardWeights",
    "Rewards",
    "corrupt",
    "entropy",
    "first_order_loss",
    "group_advantages",
    "guide",
    "guided_prior",
    "kl_prior",
    "local_advantages",
    "policy_loss",
    "prior_loss",
    "residual_advantages",
    "sample_tokens",
    "score_codes",
    "score_samples",
    "token_log_probs",
]
