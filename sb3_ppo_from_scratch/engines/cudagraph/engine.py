"""The engine of one GPU; see the package's description."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import PyTorchObs
from typing_extensions import override

from sb3_ppo_from_scratch.buffer import is_ours
from sb3_ppo_from_scratch.engines.base import PolicyStep
from sb3_ppo_from_scratch.engines.channels_last.engine import is_as_built, nature_features
from sb3_ppo_from_scratch.engines.cudagraph import support
from sb3_ppo_from_scratch.engines.cudagraph.acting import Player
from sb3_ppo_from_scratch.engines.cudagraph.device_buffer import DeviceRolloutBuffer
from sb3_ppo_from_scratch.engines.cudagraph.learning import GraphLearner
from sb3_ppo_from_scratch.engines.reference import HeadsEngine
from sb3_ppo_from_scratch.recurrent import Memory
from sb3_ppo_from_scratch.update import Learner, Loss, UpdateConfig, minibatch_loss

__all__ = ["CudaGraphEngine"]


class CudaGraphEngine(HeadsEngine):
    """
    SB3's policies and ``SharedMlpPolicy`` on a CUDA device, with Adam or AdamW, without gSDE.

    Equal to the reference up to rounding. A ``NatureCNN`` gets channels-last frames; with ``precision="bf16"`` it multiplies
    bfloat16 numbers, while its parameters, the heads, the loss and the optimizer remain float32. With ``precision="tf32"`` all
    products round their factors to TensorFloat-32, which has 11 bits; with ``"fp32"`` torch's own settings hold, by which only
    convolutions do.
    """

    name = "cudagraph"
    shares_minibatches = False
    buffer_class = DeviceRolloutBuffer
    precisions = ("fp32", "tf32", "bf16")
    fuses_loss: ClassVar[bool] = False
    """
    Whether ``torch.compile`` makes one kernel of the many between the network's outputs and the gradient by them. To be set
    before the first update, which then takes some seconds or tens of them longer; it needs a C compiler.
    """

    def __init__(self, policy: ActorCriticPolicy, precision: str = "fp32", loss: Loss = minibatch_loss):
        super().__init__(policy, precision, loss)
        self._reads_frames = _has_nature(policy)
        self._divisor = 255.0 if policy.normalize_images and is_image_space(policy.observation_space) else 1.0
        self._player: Player | None = None
        self._learner: GraphLearner | None = None
        self._addresses: list[int] = []
        self._has_warned = False

    @classmethod
    @override
    def unsupported_reason(cls, policy: ActorCriticPolicy) -> str | None:
        return support.device_reason(policy) or support.unsupported_reason(policy)

    @classmethod
    @override
    def loss_reason(cls, loss: Loss) -> str | None:
        """Code of the user's could wait for the device, which cannot be recorded."""
        return None if loss is minibatch_loss else f"it records PPO's own loss, not {getattr(loss, '__name__', loss)}"

    @classmethod
    @override
    def precision_reason(cls, policy: ActorCriticPolicy, precision: str) -> str | None:
        """Only the products of a ``NatureCNN`` are large enough for bfloat16 to pay."""
        if precision == "bf16" and not _has_nature(policy):
            return "precision='bf16' is for CnnPolicy with its NatureCNN shared by actor and critic"
        return super().precision_reason(policy, precision)

    @override
    def begin_rollout(self) -> None:
        """A graph holds the addresses of the parameters."""
        addresses = [parameter.data_ptr() for parameter in self.policy.parameters()]
        if addresses != self._addresses:
            self._player, self._addresses = None, addresses

    @override
    def act(self, obs: PyTorchObs, action_masks: np.ndarray | None = None, memory: Memory | None = None) -> PolicyStep:
        """Values and the rest stay on the device."""
        with self._products():
            if self._player is None or not self._player.fits(obs):
                self._player = Player(self.heads, obs, self.policy.action_space)
            return self._player.act(obs)

    @override
    def predict_values(self, obs: PyTorchObs, memory: Memory | None = None) -> th.Tensor:
        with self._products():
            return super().predict_values(obs)

    @override
    @contextmanager
    def learning(self, buffer: RolloutBuffer, config: UpdateConfig) -> Iterator[Learner[Any]]:
        with self._products(), self._learning(buffer, config) as learner:
            yield learner

    @contextmanager
    def _learning(self, buffer: RolloutBuffer, config: UpdateConfig) -> Iterator[Learner[Any]]:
        if not (is_ours(buffer) and isinstance(buffer, DeviceRolloutBuffer)):
            self._warn(f"updates from a {type(buffer).__name__} are the reference engine's; DeviceRolloutBuffer is faster")
            with super().learning(buffer, config) as by_torch:
                yield by_torch
            return
        if self._learner is None or self._learner.key != GraphLearner.key_of(self.policy, buffer, config):
            self._learner = None
            gc.collect()  # it holds itself in circles, and a graph's memory is large
            compiler = partial(th.compile, fullgraph=True, dynamic=False) if self.fuses_loss else None
            self._learner = GraphLearner(self.policy, self.heads, buffer, config, compiler)
        with self._learner.replayed(config) as update:
            yield update

    def _products(self) -> AbstractContextManager[None]:
        """Around whatever multiplies; a graph's products are as they were when it was recorded."""
        return tensor_float_32() if self.precision == "tf32" else nullcontext()

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, stacklevel=4)

    # ------------------------------------------------------------------ networks

    @override
    def heads(self, obs: PyTorchObs) -> tuple[th.Tensor, Distribution]:
        latent_pi, latent_vf = self._latents(obs)
        return self.policy.value_net(latent_vf), self.policy._get_action_dist_from_latent(latent_pi)

    def _latents(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """What the policy head reads, and what the value head reads."""
        policy = self.policy
        if self._reads_frames:
            assert isinstance(obs, th.Tensor)  # a NatureCNN's are
            dtype = next(policy.parameters()).dtype
            frames = obs.to(th.bfloat16 if self.precision == "bf16" else dtype, memory_format=th.channels_last)
            features = nature_features(policy.features_extractor, frames, self._divisor).to(dtype)  # type: ignore[arg-type]
            return policy.mlp_extractor(features)
        features = policy.extract_features(obs)  # type: ignore[assignment]  # one, or one for each
        if policy.share_features_extractor:
            return policy.mlp_extractor(features)
        return policy.mlp_extractor.forward_actor(features[0]), policy.mlp_extractor.forward_critic(features[1])


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Within it, products of float32 matrices and convolutions on a GPU may take TensorFloat-32."""
    products, convolutions = th.get_float32_matmul_precision(), th.backends.cudnn.allow_tf32
    th.set_float32_matmul_precision("high")
    th.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        th.set_float32_matmul_precision(products)
        th.backends.cudnn.allow_tf32 = convolutions


def _has_nature(policy: ActorCriticPolicy) -> bool:
    """Whether the features are those of one ``NatureCNN`` as SB3 builds it."""
    return policy.share_features_extractor and is_as_built(policy.features_extractor)
