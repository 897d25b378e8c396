"""
``CnnPolicy`` on CPU: the arithmetic of the reference engine, on frames in the order in memory that convolutions like best.

Four things make it faster. Frames stay channels-last bytes from the rollout buffer to the first convolution, so that nothing
is ever transposed. The two arrays that a minibatch's frames pass through are allocated once per update, for fresh memory costs
more than what is written into it. The linear layer's products are oneDNN's, as the convolutions' are (:class:`OneDnnLinear`).
And Adam takes one pass (:func:`~sb3_ppo_from_scratch.engines.adam.fused_adam`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from typing_extensions import override

from sb3_ppo_from_scratch.buffer import RolloutData, ScratchRolloutBuffer, is_ours, minibatch_source
from sb3_ppo_from_scratch.engines.adam import fused_adam
from sb3_ppo_from_scratch.engines.inspection import adam_reason, has_hooks, replaced_method
from sb3_ppo_from_scratch.engines.reference.engine import HeadsEngine, Minibatches
from sb3_ppo_from_scratch.policies import MASKABLE, imported
from sb3_ppo_from_scratch.update import Learner, Loss, UpdateConfig, minibatch_loss

__all__ = ["ChannelsLastEngine", "OneDnnLinear", "has_bf16_instructions", "is_as_built", "nature_features"]

_DTYPES = {"fp32": th.float32, "bf16": th.bfloat16}
_MASKABLE = [MASKABLE[name] for name in ("MaskableMlpPolicy", "MaskableCnnPolicy")]
_CONVOLUTIONS = [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Flatten]


def nature_features(extractor: NatureCNN, frames: th.Tensor, divisor: float = 1.0) -> th.Tensor:
    r"""
    What ``extractor(frames / divisor)`` is, in the dtype and memory format of ``frames``.

    The first layer's few weights are divided, not the many pixels: :math:`W * (x / d) = (W / d) * x`. A byte is exact in
    bfloat16, so that nothing is lost before the first product.

    :param extractor: its parameters are converted to the dtype of ``frames`` as they are used
    :param frames: ``[batch_size, channels, height, width]``
    :param divisor: what the pixels are to be divided by
    :return: ``[batch_size, features_dim]``
    """
    x = frames
    for layer in extractor.cnn:
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight / divisor if x is frames else layer.weight
            assert layer.bias is not None  # NatureCNN's have one
            # in place, since the gradient of a convolution does not need its output
            x = F.conv2d(x, weight.to(x.dtype), layer.bias.to(x.dtype), layer.stride).relu_()
    linear = extractor.linear[0]
    assert isinstance(linear, nn.Linear)
    product = OneDnnLinear.apply if OneDnnLinear.serves(x) else F.linear
    return product(x.flatten(1), linear.weight.to(x.dtype), linear.bias.to(x.dtype)).relu_()


class OneDnnLinear(th.autograd.Function):
    r"""
    ``F.linear`` in float32 with oneDNN's products: :math:`y = x W^T + b`; with the gradient g by y,
    :math:`\partial x = g W,\; \partial W = g^T x,\; \partial b = \sum g`.

    ``F.linear`` itself takes MKL's products, which do without AVX-512 on CPUs of other makers than Intel, and then take twice
    as long. In bfloat16 it takes oneDNN's.
    """

    @staticmethod
    @cache
    def is_available() -> bool:
        """Whether this build of torch has oneDNN's product; its compiler uses it, but it has no public name."""
        return th.backends.mkldnn.is_available() and hasattr(th.ops.mkldnn, "_linear_pointwise")

    @classmethod
    def serves(cls, x: th.Tensor) -> bool:
        """Whether products of ``x`` are to be oneDNN's."""
        return x.dtype is th.float32 and x.device.type == "cpu" and cls.is_available()

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
        """
        :param x: ``[batch_size, n_in]``
        :param weight: ``[n_out, n_in]``
        :param bias: ``[n_out]``
        :return: ``[batch_size, n_out]``
        """
        ctx.save_for_backward(x, weight)
        return _times_transposed(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """The gradients by the three inputs, from that by the output."""
        x, weight = ctx.saved_tensors
        by_weight = _times_transposed(gradient.t().contiguous(), x.t().contiguous())
        return _times_transposed(gradient, weight.t()), by_weight, gradient.sum(0)


def _times_transposed(left: th.Tensor, right: th.Tensor, bias: th.Tensor | None = None) -> th.Tensor:
    """``left @ right.T + bias``"""
    return th.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 numbers itself (AVX-512 BF16 or AMX)."""
    return th.cpu._is_avx512_bf16_supported() or th.cpu._is_amx_tile_supported()


class ChannelsLastEngine(HeadsEngine):
    """
    ``CnnPolicy`` and ``MaskableCnnPolicy`` with SB3's ``NatureCNN`` and any action space, on CPU, with Adam or AdamW.

    Equal to the reference up to rounding. With ``precision="bf16"`` the features extractor multiplies bfloat16 numbers, in
    rollouts and updates alike; its parameters, the heads, the loss and the optimizer remain float32.
    """

    name = "channels_last"
    precisions = tuple(_DTYPES)

    def __init__(self, policy: ActorCriticPolicy, precision: str = "fp32", loss: Loss = minibatch_loss):
        super().__init__(policy, precision, loss)
        self._are_images = is_image_space(policy.observation_space)  # bounds of every pixel are compared to find this out

    @classmethod
    @override
    def unsupported_reason(cls, policy: ActorCriticPolicy) -> str | None:
        # it computes the features in its own way; the rest of the policy may be anything
        if type(policy) not in (ActorCriticPolicy, ActorCriticCnnPolicy, *map(imported, _MASKABLE)):
            return f"the policy must be CnnPolicy or MaskableCnnPolicy, not {type(policy).__name__}"
        if name := replaced_method(policy):
            return f"the policy's {name} was replaced"
        if has_hooks(policy):
            return "there are hooks on the policy or on all modules"
        if not policy.share_features_extractor or not is_as_built(policy.features_extractor):
            return "the features extractor must be SB3's NatureCNN without hooks, shared by actor and critic"
        if any(parameter.device.type != "cpu" or parameter.dtype != th.float32 for parameter in policy.parameters()):
            return "the parameters must be float32 and on the CPU"
        return adam_reason(policy.optimizer, policy.parameters())

    @override
    def heads(self, obs: PyTorchObs) -> tuple[th.Tensor, Distribution]:
        assert isinstance(obs, th.Tensor)  # a NatureCNN's are
        frames = obs.to(_DTYPES[self.precision], memory_format=th.channels_last)
        divisor = 255.0 if self.policy.normalize_images and self._are_images else 1.0
        features = nature_features(self.policy.features_extractor, frames, divisor).float()  # type: ignore[arg-type]
        latent_pi, latent_vf = self.policy.mlp_extractor(features)
        return self.policy.value_net(latent_vf), self.policy._get_action_dist_from_latent(latent_pi)

    @override
    def minibatches_of(self, buffer: RolloutBuffer) -> Minibatches:
        """The same minibatches, with frames as the first convolution wants them. Each is gone when the next one comes."""
        return FrameLoader(buffer, _DTYPES[self.precision]).minibatches if is_ours(buffer) else minibatch_source(buffer)

    @override
    @contextmanager
    def learning(self, buffer: RolloutBuffer, config: UpdateConfig) -> Iterator[Learner[RolloutData]]:
        with fused_adam(self.policy.optimizer), super().learning(buffer, config) as learner:
            yield learner


class FrameLoader:
    """
    Draws minibatches of frames through two arrays that are used again and again.

    :param buffer: full, of observations ``[channels, height, width]``
    :param dtype: of the minibatches' frames
    """

    def __init__(self, buffer: ScratchRolloutBuffer, dtype: th.dtype):
        frames = buffer.flat_observations()
        assert isinstance(frames, th.Tensor)  # a NatureCNN's are
        self._frames = frames.permute(0, 2, 3, 1)
        self._rows = buffer.dataset(by_row=True)
        self._stored = th.empty(0, dtype=self._frames.dtype)
        self._converted = th.empty(0, dtype=dtype)

    def minibatches(self, batch_size: int) -> Iterator[RolloutData]:
        """
        One pass in random order, as :meth:`RolloutData.minibatches` makes it.

        :param batch_size: transitions per minibatch
        :return: batches whose frames are channels-last and valid until the next batch is asked for
        """
        for batch in self._rows.minibatches(batch_size):
            yield batch._replace(observations=self._gather(batch.observations))  # type: ignore[arg-type]  # rows

    def _gather(self, rows: th.Tensor) -> th.Tensor:
        shape = (len(rows), *self._frames.shape[1:])
        th.index_select(self._frames, 0, rows, out=self._stored.resize_(shape))
        return self._converted.resize_(shape).copy_(self._stored).permute(0, 3, 1, 2)


def is_as_built(extractor: nn.Module) -> bool:
    """Whether ``extractor`` is SB3's ``NatureCNN``, layer by layer, and nothing happens besides."""
    if type(extractor) is not NatureCNN or [type(layer) for layer in extractor.cnn] != _CONVOLUTIONS:
        return False
    if [type(layer) for layer in extractor.linear] != [nn.Linear, nn.ReLU]:
        return False
    return not any(has_hooks(module) or replaced_method(module) for module in extractor.modules())
