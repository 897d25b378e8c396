"""
The minibatch step as a function over static tensors, and the update that calls it again and again.

Before an update the host uploads a *plan*, the rows of every minibatch of every epoch, and the coefficients. Then it only
replays: a step counts itself, takes its rows from the plan, and writes what it measured into a log. What would need a decision
of the host is decided on the device: an early stop, or a gradient that is not finite, turns steps into measurements. The log
is read at the end, and is the one thing that the host waits for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution, MultiCategoricalDistribution, make_proba_distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from typing_extensions import override

from sb3_ppo_from_scratch.buffer import RolloutData
from sb3_ppo_from_scratch.distributions import UncheckedDistributions, distribution_parameters, exact_kl, give_parameters
from sb3_ppo_from_scratch.engines.cudagraph.acting import Heads
from sb3_ppo_from_scratch.engines.cudagraph.cuda_graph import Captured
from sb3_ppo_from_scratch.engines.cudagraph.device_buffer import DeviceRolloutBuffer
from sb3_ppo_from_scratch.engines.cudagraph.transfer import Upload
from sb3_ppo_from_scratch.engines.inspection import parts_of_the_loss
from sb3_ppo_from_scratch.engines.replayed import MEASURED, ReplayedLearner, ReplayedMinibatch
from sb3_ppo_from_scratch.losses import PPOLoss, weighted_mean
from sb3_ppo_from_scratch.update import PolicyOutputs, UpdateConfig, minibatch_loss

__all__ = ["GraphLearner", "ReplayedUpdate", "draw_plan"]

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]

_COEFFICIENTS = ("learning_rate", "clip_range", "clip_range_vf", "ent_coef", "vf_coef", "max_grad_norm", "kl_limit", "raises")
_NUMBERS = ("advantages", "returns", "old_values", "old_log_prob")


def draw_plan(rows: np.ndarray, width: int, n_epochs: int) -> tuple[np.ndarray, list[Any]]:
    """
    Every minibatch of an update, drawn as :meth:`RolloutData.minibatches` draws them, from NumPy's global generator.

    :param rows: ``[B]``, numbers of the rows to learn from
    :param width: rows per minibatch
    :param n_epochs: passes over all of them
    :return: ``[n_epochs * ceil(B / width), width + 1]``, int64: per minibatch its rows, padded with its first one's like, and
        last how many count; and the generator's states after each epoch's draw
    """
    per_epoch = -(-len(rows) // width)
    plan = np.empty((n_epochs, per_epoch, width + 1), np.int64)
    states = []
    for epoch in plan:
        order = rows[np.random.permutation(len(rows))]
        states.append(np.random.get_state())
        padding = np.full(per_epoch * width - len(rows), order[0])
        epoch[:, :-1] = np.concatenate([order, padding]).reshape(per_epoch, width)
        epoch[:, -1] = width
        epoch[-1, -1] = width - len(padding)
    return plan.reshape(-1, width + 1), states


class ReplayedUpdate(ReplayedLearner):
    """
    An update that has been done already: its minibatches are the rows of the log.

    :param log: ``[n_minibatches, len(MEASURED)]``, float32
    :param per_epoch: minibatches per epoch
    """

    def __init__(self, log: np.ndarray, per_epoch: int):
        self.epochs = 0
        """How many have been read."""
        self._log, self._per_epoch = log, per_epoch

    @override
    def minibatches(self) -> Iterable[ReplayedMinibatch]:
        first = self.epochs * self._per_epoch
        self.epochs += 1
        return [ReplayedMinibatch.of(row) for row in self._log[first : first + self._per_epoch]]


class GraphLearner:
    """
    Updates a policy on the rollouts in one buffer.

    :param policy: its parameters and its optimizer's moments are changed in place; its optimizer is an Adam
    :param heads: the policy's networks
    :param buffer: holds every rollout
    :param config: for the sizes, and for what is there at all; coefficients may change from update to update
    :param compiler: makes what follows the network faster, ``torch.compile`` or the like; ``None`` to take it as it is
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        heads: Heads,
        buffer: DeviceRolloutBuffer,
        config: UpdateConfig,
        compiler: Compiler | None = None,
    ):
        self.policy, self.heads, self.buffer = policy, heads, buffer
        self.data = buffer.rows()
        self.parameters: list[th.Tensor] = list(policy.parameters())
        self.key = self.key_of(policy, buffer, config)
        device, dtype = self.parameters[0].device, self.parameters[0].dtype
        self.width = min(config.batch_size, self.data.size)
        capacity = config.n_epochs * -(-self.data.size // self.width)
        self.plan = Upload(np.zeros((capacity, self.width + 1), np.int64), device)
        numbers = np.zeros(len(_COEFFICIENTS) + len(self.parameters), th.empty(0, dtype=dtype).numpy().dtype)
        self.numbers = Upload(numbers, device)
        coefficients, self.steps = self.numbers.tensor.split([len(_COEFFICIENTS), len(self.parameters)])
        self.coefficients = dict(zip(_COEFFICIENTS, coefficients.unbind(), strict=True))
        on_device = {name: self.coefficients[name] for name in ("clip_range", "ent_coef", "vf_coef")}
        if config.clip_range_vf is not None:
            on_device["clip_range_vf"] = self.coefficients["clip_range_vf"]
        self._config = dataclasses.replace(config, **on_device)
        self.index = th.zeros(1, dtype=th.int64, device=device)
        self.stopped = th.zeros((), dtype=th.bool, device=device)
        self.log = th.zeros((capacity, len(MEASURED)), device=device)
        self.positions = th.arange(self.width, device=device)
        # one vector, which is what several GPUs would have to add up
        self.gradient = th.zeros(sum(p.numel() for p in self.parameters), dtype=dtype, device=device)
        parts = zip(self.gradient.split([p.numel() for p in self.parameters]), self.parameters, strict=True)
        self.gradients = [part.view_as(parameter) for part, parameter in parts]
        self._distribution = make_proba_distribution(policy.action_space)
        if isinstance(self._distribution, MultiCategoricalDistribution):  # Python's numbers are what a compiler knows
            self._distribution.action_dims = [int(size) for size in self._distribution.action_dims]
        with UncheckedDistributions():  # torch's compiler leaves them unchecked for the whole process
            self._compiled = None if compiler is None else compiler(_anew(self._measure_by_parameters))
        self._minibatch = Captured(self.step, device)
        self._is_ready = False

    @staticmethod
    def key_of(policy: ActorCriticPolicy, buffer: DeviceRolloutBuffer, config: UpdateConfig) -> tuple[Any, ...]:
        """Everything that a graph of :meth:`step` holds by value or by address. With another key it takes another learner."""
        group = policy.optimizer.param_groups[0]
        settings = [group.get(name) for name in (*_ADAM_SETTINGS, "decoupled_weight_decay")]
        tensors = [*policy.parameters(), *(moment for state in _adam_states(policy) for moment in _moments(state))]
        dist_params = buffer.on_device["dist_params"]
        structure = (config.batch_size, config.n_epochs, config.normalize_advantage, config.clip_range_vf is None)
        addresses = [tensor.data_ptr() for tensor in tensors]
        return id(buffer), dist_params is None, structure, tuple(settings), tuple(addresses), parts_of_the_loss()

    # ------------------------------------------------------------- one minibatch

    @th.enable_grad()
    def step(self) -> None:
        """The part that a CUDA graph holds: gather, gradient, clip, Adam, log. It takes its own number from :attr:`index`."""
        plan = self.plan.tensor.index_select(0, self.index)[0]
        batch = self.data.take(plan[:-1], channels_last=True)
        with UncheckedDistributions(), fresh_leaves(self.policy) as leaves:
            loss, kl = self._loss(batch, plan[-1])
            gradients = th.autograd.grad(loss.total, leaves)
        with th.no_grad():
            th.cat([gradient.reshape(-1) for gradient in gradients], out=self.gradient)
            # as torch's clip_grad_norm_ takes it; of the vector at once float32 would lose a digit more
            norm = th.linalg.vector_norm(th.stack(th._foreach_norm(self.gradients)))
            self.gradient.mul_(th.clamp(self.coefficients["max_grad_norm"] / (norm + 1e-6), max=1.0))
            takes_step = self._decide(loss, norm)
            self._adam(takes_step)
            row = [part.detach().float() for part in (*loss, norm, kl, takes_step)]
            self.log.index_copy_(0, self.index, th.stack(row)[None])
            self.index.add_(1).remainder_(len(self.log))  # a rehearsal must not lead out of the plan

    def _loss(self, batch: RolloutData, n_rows: th.Tensor) -> tuple[PPOLoss, th.Tensor]:
        """The loss, and the exact KL between the behaviour policy and the one now (NaN where the former is not known)."""
        values, distribution = self.heads(batch.observations)
        values, batch = values.flatten(), batch._replace(observations=self.positions)  # the rest does without
        if self._compiled is None:
            return self._measure(values, distribution, batch, n_rows)
        return self._compiled(values, distribution_parameters(distribution), batch, n_rows)

    def _measure(
        self, values: th.Tensor, distribution: Distribution, batch: RolloutData, n_rows: th.Tensor
    ) -> tuple[PPOLoss, th.Tensor]:
        """What :meth:`_loss` does after the network: many small kernels on few numbers."""
        actions = batch.actions
        if isinstance(self.policy.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        outputs = PolicyOutputs(values, distribution.log_prob(actions), distribution.entropy(), distribution)
        weights = (self.positions < n_rows).to(values.dtype)
        numbers = {name: getattr(batch, name).to(values.dtype) for name in _NUMBERS}
        loss = minibatch_loss(outputs, batch._replace(**numbers), self._config, weights)
        with th.no_grad():
            old, new = batch.dist_params, outputs.dist_params
            if old is None or new is None:
                return loss, th.full_like(loss.total, th.nan)
            return loss, weighted_mean(exact_kl(distribution, old, new), weights)

    def _measure_by_parameters(
        self, values: th.Tensor, params: th.Tensor, batch: RolloutData, n_rows: th.Tensor
    ) -> tuple[PPOLoss, th.Tensor]:
        """:meth:`_measure`, of tensors only: what a compiler takes."""
        return self._measure(values, give_parameters(self._distribution, params), batch, n_rows)

    def _decide(self, loss: PPOLoss, norm: th.Tensor) -> th.Tensor:
        """
        Whether to step along this gradient (scalar, bool): the decisions of the loop of an update, on the device.

        What stops the update stops it for all later minibatches.
        """
        self.stopped.logical_or_(th.isfinite(loss.total) & (loss.approx_kl > self.coefficients["kl_limit"]))
        is_finite = th.isfinite(loss.total + norm)
        takes_step = is_finite & ~self.stopped
        self.stopped.logical_or_(~is_finite & (self.coefficients["raises"] > 0))
        return takes_step

    def _adam(self, takes_step: th.Tensor) -> None:
        """Torch's fused Adam, whose way to leave out a step is made for gradients that overflowed."""
        group = self.policy.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        self.steps.add_(takes_step)
        states = _adam_states(self.policy)
        update = th._fused_adamw_ if group.get("decoupled_weight_decay", False) else th._fused_adam_
        update(
            self.parameters,
            self.gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states if group["amsgrad"]],
            list(self.steps.unbind()),
            lr=self.coefficients["learning_rate"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            grad_scale=None,
            found_inf=(~takes_step).float(),
        )

    # ---------------------------------------------------------------- the update

    @contextmanager
    def replayed(self, config: UpdateConfig) -> Iterator[ReplayedUpdate]:
        """
        Do an update, and yield what the loop reads of it. Between the first line and the reading of the log nobody waits.

        :param config: with the same :meth:`key_of` as the constructor's
        """
        rows = self.buffer.transitions()
        plan, states = draw_plan(np.arange(self.data.size) if rows is None else rows, self.width, config.n_epochs)
        self._upload(plan, config)
        if not self._is_ready:
            self.stopped.fill_(True)  # so that no rehearsal changes the policy
            self._minibatch.prepare()
            self._is_ready = True
        self.index.zero_()
        self.stopped.zero_()
        for _ in range(len(plan)):
            self._minibatch()
        log = self.log[: len(plan)].cpu().numpy()
        self._write_back(int(log[:, -1].sum()))
        update = ReplayedUpdate(log, len(plan) // config.n_epochs)
        try:
            yield update
        finally:  # as if the epochs after an early stop had never been drawn
            np.random.set_state(states[max(update.epochs, 1) - 1])

    def _upload(self, plan: np.ndarray, config: UpdateConfig) -> None:
        whole = np.zeros(tuple(self.plan.tensor.shape), np.int64)  # with fewer transitions there are fewer minibatches
        whole[:, -1] = 1  # which a rehearsal may see
        whole[: len(plan)] = plan
        self.plan(whole)
        coefficients = {
            **vars(config),
            "learning_rate": self.policy.optimizer.param_groups[0]["lr"],
            "clip_range_vf": config.clip_range_vf or 0.0,
            "kl_limit": config.kl_limit,
            "raises": config.nan_policy == "raise",
        }
        steps = [float(state["step"]) for state in _adam_states(self.policy)]
        self.numbers(np.array([*(float(coefficients[name]) for name in _COEFFICIENTS), *steps]))

    def _write_back(self, n_steps: int) -> None:
        """Leave the optimizer as torch would: its count of steps, no state before the first one, and gradients."""
        for parameter, gradient, state in zip(self.parameters, self.gradients, _adam_states(self.policy), strict=True):
            parameter.grad = gradient
            state["step"] += n_steps
            if n_steps == 0 and state["step"] == 0:
                del self.policy.optimizer.state[parameter]


def _anew(method: Any) -> Any:
    """A method with code of its own: a compiler counts how often it has compiled the same, and gives up in the end."""
    function = method.__func__
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return MethodType(copy, method.__self__)


@contextmanager
def fresh_leaves(policy: ActorCriticPolicy) -> Iterator[list[th.Tensor]]:
    """
    Within it, the policy computes with leaves of autograd that nobody has used before, in its parameters' memory.

    Autograd's node of a parameter remembers the stream of its first use, and lives as long as anybody holds a graph with it:
    the policy's ``action_dist`` after ``evaluate_actions`` in a callback, say. The gradient would wait for that stream, which
    ends a recording.

    :param policy: whose parameters are back in their places afterwards
    :return: the leaves, in the order of ``policy.parameters()``
    """
    leaves = {parameter: parameter.detach().requires_grad_() for parameter in policy.parameters()}
    registers: list[dict[str, Any]] = [module._parameters for module in policy.modules()]
    before = [dict(register) for register in registers]
    try:
        for register in registers:
            register.update({name: leaves[parameter] for name, parameter in register.items() if parameter is not None})
        yield list(leaves.values())
    finally:
        for register, parameters in zip(registers, before, strict=True):
            register.update(parameters)


_ADAM_SETTINGS = ("betas", "eps", "weight_decay", "amsgrad", "maximize")


def _adam_states(policy: ActorCriticPolicy) -> list[dict[str, th.Tensor]]:
    """Adam's state of each parameter, made as torch makes it where there is none yet."""
    optimizer, group = policy.optimizer, policy.optimizer.param_groups[0]
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
    for parameter in policy.parameters():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = th.zeros((), device=parameter.device if group["fused"] else "cpu")
            state.update({name: th.zeros_like(parameter, memory_format=th.preserve_format) for name in names})
    return [optimizer.state[parameter] for parameter in policy.parameters()]


def _moments(state: dict[str, th.Tensor]) -> Iterator[th.Tensor]:
    return (value for name, value in state.items() if name != "step")
