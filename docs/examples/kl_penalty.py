r"""
A loss of one's own, in one file: PPO with a penalty on how far the policy has moved from the one that collected the rollout.

.. math:: L = L^{PPO} + \beta\, \mathrm{mean}[KL(\pi_{old} \| \pi_{new})]

It is the adaptive-KL variant of https://arxiv.org/abs/1707.06347, section 4, with a fixed coefficient. Run it as it is::

    python docs/examples/kl_penalty.py
"""

from __future__ import annotations

from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.buffer import RolloutData
from sb3_ppo_from_scratch.distributions import exact_kl
from sb3_ppo_from_scratch.losses import PPOLoss
from sb3_ppo_from_scratch.update import PolicyOutputs, UpdateConfig, minibatch_loss

BETA = 1.0
"""Weight of the penalty, per nat"""


def loss_with_kl_penalty(outputs: PolicyOutputs, batch: RolloutData, config: UpdateConfig) -> PPOLoss:
    """
    :param outputs: what the policy makes of the minibatch now, with gradient
    :param batch: what the rollout knows of it
    :param config: this update's coefficients
    """
    loss = minibatch_loss(outputs, batch, config)
    kl = exact_kl(outputs.distribution, batch.dist_params, outputs.dist_params).mean()
    return loss._replace(total=loss.total + BETA * kl)


class KLPenaltyPPO(ScratchPPO):
    """Everything else stays: engines that cannot differentiate this loss decline it, and ``"auto"`` takes one that can."""

    loss = staticmethod(loss_with_kl_penalty)


if __name__ == "__main__":
    KLPenaltyPPO("MlpPolicy", "CartPole-v1", verbose=1).learn(20_000)
