"""Proximal Policy Optimization as an SB3 algorithm: set-up, the loop of rollout and update, saving and loading."""

from __future__ import annotations

import io
import math
import pathlib
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.utils import FloatSchedule, explained_variance, get_device
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch.buffer import RolloutData, is_replaceable
from sb3_ppo_from_scratch.checkpoint import Resumed, all_callbacks, guarded_training, load_run
from sb3_ppo_from_scratch.checks.arguments import (
    check_device,
    check_flag,
    check_integer,
    check_number,
    check_observation_space,
    check_scheduled,
    check_trainable_actions,
    errors_for_assertions,
    resolve_schedule,
)
from sb3_ppo_from_scratch.checks.hyperparameters import check_hyperparameters, check_rollout_size
from sb3_ppo_from_scratch.distributed import update_together
from sb3_ppo_from_scratch.engines import Choice, Engine, choose_engine, has_bf16_instructions
from sb3_ppo_from_scratch.evaluation import mask_evaluation
from sb3_ppo_from_scratch.losses import PPOLoss
from sb3_ppo_from_scratch.policies import (
    MASKABLE,
    MASKABLE_RECURRENT,
    RECURRENT,
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    SharedMlpPolicy,
    import_policy,
    imported,
    takes_masks,
)
from sb3_ppo_from_scratch.recurrent import check_remembered, is_recurrent
from sb3_ppo_from_scratch.rollout import RolloutAlgorithm
from sb3_ppo_from_scratch.safe_files.algorithms import errors_name_the_algorithm, warn_of_defaults
from sb3_ppo_from_scratch.safe_files.models import (
    check_schedules_read,
    check_weights,
    errors_of_file,
    finish_load,
    moved_fields,
    safe_archive,
    weights_archive,
)
from sb3_ppo_from_scratch.update import PolicyOutputs, UpdateConfig, UpdateStats, minibatch_loss
from sb3_ppo_from_scratch.vec_env import NativeVecEnv, mask_reset_rows
from sb3_ppo_from_scratch.vec_env.failures import explained_failures, watch_workers
from sb3_ppo_from_scratch.vec_env.lean import make_lean
from sb3_ppo_from_scratch.vec_env.masks import KEY, MaskSource, find_masks, leave_masks_raw, masks_given
from sb3_ppo_from_scratch.vec_env.memory import ObservationGuard

__all__ = ["ScratchPPO"]

_EVERY_FORMAT = ("stdout", "log", "json", "csv", "tensorboard")

SelfScratchPPO = TypeVar("SelfScratchPPO", bound="ScratchPPO")


class ScratchPPO(RolloutAlgorithm):
    """
    Proximal Policy Optimization with a clipped objective (https://arxiv.org/abs/1707.06347), a drop-in for SB3's ``PPO``.

    The arguments are those of SB3's ``PPO``, by name, order and default; ``engine`` and ``precision`` are added at the end.
    With ``engine="torch"`` on CPU, training yields the bits that SB3's does.

    A *schedule* is a function of the progress remaining, which falls from 1 to 0 over a ``learn``.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, ``"SharedMlpPolicy"``; for masks of invalid
        actions ``"MaskableMlpPolicy"``, ``"MaskableCnnPolicy"``, ``"MaskableMultiInputPolicy"``, and with the memory of an
        LSTM ``"MlpLstmPolicy"``, ``"CnnLstmPolicy"``, ``"MultiInputLstmPolicy"``, which are sb3-contrib's; with both
        ``"MaskableMlpLstmPolicy"``, ``"MaskableCnnLstmPolicy"``, ``"MaskableMultiInputLstmPolicy"``; or a policy class
    :param env: a Gymnasium environment or vector environment, a ``VecEnv``, or the name of a registered environment
    :param learning_rate: Adam's step size, at least 0; or a schedule
    :param n_steps: steps per environment and rollout; a rollout holds ``n_steps * n_envs`` transitions
    :param batch_size: transitions per minibatch, at least 2 if advantages are normalised
    :param n_epochs: passes over a rollout per update
    :param gamma: discount factor, in [0, 1]
    :param gae_lambda: bias (0) against variance (1) of the advantages, in [0, 1]
    :param clip_range: how far the probability ratio may move from 1, above 0; or a schedule
    :param clip_range_vf: how far a value may move from the old one, above 0; or a schedule; ``None`` for no such limit.
        It depends on the scale of the rewards.
    :param normalize_advantage: shift and scale advantages to mean 0 and standard deviation 1 in each minibatch
    :param ent_coef: weight of the entropy loss; or a schedule
    :param vf_coef: weight of the value loss, at least 0
    :param max_grad_norm: 2-norm that a gradient is scaled down to, above 0
    :param use_sde: explore with generalized state-dependent noise (gSDE) instead of independent noise; Box actions only
    :param sde_sample_freq: steps between new gSDE noise matrices; -1 for one per rollout
    :param rollout_buffer_class: a subclass of SB3's ``RolloutBuffer``; ``None`` for the engine's own, which is
        :class:`ScratchRolloutBuffer`, or for ``"cudagraph"`` a ``DeviceRolloutBuffer``
    :param rollout_buffer_kwargs: more arguments for the rollout buffer
    :param target_kl: end an update when a minibatch's approximate KL (nats) exceeds 1.5 times it, above 0; ``None`` for never
    :param stats_window_size: episodes that logged means are taken over
    :param tensorboard_log: folder for TensorBoard's logs; ``None`` for none
    :param policy_kwargs: more arguments for the policy
    :param verbose: 0 prints nothing, 1 progress and choices, 2 details
    :param seed: seed of all random generators, the environments' included; ``None`` leaves them as they are
    :param device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or a ``torch.device``
    :param _init_setup_model: whether to build the networks now
    :param engine: ``"torch"``, the reference, which serves every policy; ``"numpy"``, several times faster, for small
        networks on a CPU (:mod:`sb3_ppo_from_scratch.engines.numpy_mlp`); ``"compiled"``, for the same, faster still where a
        C compiler has built it (:mod:`sb3_ppo_from_scratch.engines.compiled`); ``"channels_last"``, for ``CnnPolicy`` on a
        CPU; ``"lstm"``, for policies with an LSTM on a CPU (:mod:`sb3_ppo_from_scratch.engines.lstm`); ``"cudagraph"``, for
        CUDA devices (:mod:`sb3_ppo_from_scratch.engines.cudagraph`); ``"auto"``, the fastest of these but the last, which has
        not been run on a GPU yet
    :param precision: ``"fp32"``, or ``"bf16"`` for bfloat16 products in a ``CnnPolicy``'s convolutions: faster on hardware
        that has instructions for it, and less exact. Parameters, loss and optimizer remain float32. ``"tf32"`` is for
        ``"cudagraph"``: TensorFloat-32 in all products.
    :param nan_policy: for a minibatch whose loss or gradient is not finite: ``"raise"`` a :class:`NonFiniteError`, or
        ``"skip"`` it, with a warning and a count. No step is taken on it either way.
    :param nan_observations: where NaN in observations stands for what is missing, and the network knows: ``True``, or the keys
        of a Dict space; ``False`` for nowhere. By default it is an error, unless a network of your own makes finite numbers
        of it, which is a warning. Infinity is always an error.
    :param data_parallel: whether several processes, started by ``torchrun``, train one agent together
        (:mod:`sb3_ppo_from_scratch.distributed`). ``batch_size`` and timesteps are then those of all of them, ``env`` holds
        each one's own environments. It changes nothing where there is one process.
    :raises TypeError: for an argument of the wrong type
    :raises ValueError: for one out of range, an unsupported space, or an unknown policy, device or engine
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy] | str]] = {  # type: ignore[assignment]  # SB3's are classes
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
        "SharedMlpPolicy": SharedMlpPolicy,
        **MASKABLE,
        **RECURRENT,
        **MASKABLE_RECURRENT,
    }
    """Policies by name: classes, or where those lie that need sb3-contrib, which is imported when one is asked for."""
    loss: staticmethod[[PolicyOutputs, RolloutData, UpdateConfig], PPOLoss] = staticmethod(minibatch_loss)
    """A minibatch's. A subclass may have one of its own, which ``"auto"`` leaves to an engine that differentiates it."""

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        engine: str = "auto",
        precision: str = "fp32",
        nan_policy: str = "raise",
        nan_observations: bool | Collection[str] | None = None,
        data_parallel: bool = False,
    ):
        check_flag("data_parallel", data_parallel)
        self.data_parallel = data_parallel
        verbose = verbose if self.is_rank_zero else 0
        check_device(device)
        check_integer("stats_window_size", stats_window_size, 1)
        if not isinstance(policy, str) and not (isinstance(policy, type) and issubclass(policy, BasePolicy)):
            raise TypeError(f"policy must be the name of a policy or a policy class, not {policy!r}")
        if hasattr(env, "observation_space"):  # before SB3's wrappers stumble over it
            check_observation_space(getattr(env, "single_observation_space", env.observation_space))
        with errors_for_assertions("env"):
            super().__init__(
                policy,
                env,
                learning_rate=learning_rate,
                n_steps=n_steps,
                gamma=gamma,
                gae_lambda=gae_lambda,
                ent_coef=ent_coef,  # type: ignore[arg-type]  # stored as it is, and resolved for each update
                vf_coef=vf_coef,
                max_grad_norm=max_grad_norm,
                use_sde=use_sde,
                sde_sample_freq=sde_sample_freq,
                rollout_buffer_class=rollout_buffer_class,
                rollout_buffer_kwargs=rollout_buffer_kwargs,
                stats_window_size=stats_window_size,
                tensorboard_log=tensorboard_log,
                policy_kwargs=policy_kwargs,
                verbose=verbose,
                device=device,
                seed=seed,
                _init_setup_model=False,
            )
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.engine = engine
        self.precision = precision
        self.nan_policy = nan_policy
        self.nan_observations = nan_observations
        self._nan_understood: set[str] = set()
        self._guard: ObservationGuard | None = None
        self._last_memory = None
        self._engine: Engine | None = None
        self._is_training = False
        self._warned_of_skipped = False
        self._train_metrics: dict[str, Any] = {}
        self._resumed: Resumed | None = None
        self.use_masking = True
        self._mask_source: MaskSource | None = None
        self._last_action_masks: np.ndarray | None = None
        self._warned_of_masks = False
        if _init_setup_model:
            self._setup_model()
            self._check_engine()
            self._check_trainable()
            check_rollout_size(self.n_steps, self.n_envs * self.group.size, self.batch_size, self.normalize_advantage)

    # ------------------------------------------------------------------ set-up

    @staticmethod
    def _wrap_env(env: GymEnv | VectorEnv | str, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """
        As SB3 does; names are welcome in :meth:`load` and :meth:`set_env` too; a vector environment becomes a
        :class:`NativeVecEnv`, SB3's wrappers learn of its reset rows, its ``DummyVecEnv`` and ``VecNormalize`` take leaner
        steps, and processes are watched from now on.
        """
        if isinstance(env, VectorEnv):
            if verbose >= 1:
                print("Wrapping the env in a NativeVecEnv.")
            env = NativeVecEnv(env)
        env = maybe_make_env(env, verbose)
        env = make_lean(mask_reset_rows(OnPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)))
        watch_workers(env)
        return env

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            names = ", ".join(map(repr, self.policy_aliases))
            raise ValueError(f"policy must be one of {names} or a policy class, not {policy_name!r}")
        policy = self.policy_aliases[policy_name]
        return import_policy(policy) if isinstance(policy, str) else policy

    @property
    def _named_policies(self) -> dict[type[BasePolicy], str]:
        """The names of policies, as far as they have been imported."""
        aliases = self.policy_aliases.items()
        return {imported(policy) if isinstance(policy, str) else policy: name for name, policy in aliases}

    @property
    def _policy_name(self) -> str:
        return self._named_policies.get(self.policy_class, self.policy_class.__name__)

    def _setup_model(self) -> None:
        """Check everything, seed everything, build the policy. The rollout buffer comes with the first ``learn``."""
        check_hyperparameters(self)
        self._be_quiet()
        self._setup_lr_schedule()
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)
        self.set_random_seed(self.seed)
        with errors_for_assertions(f"policy {self._policy_name!r}", self.observation_space):
            policy = self.policy_class(
                self.observation_space,
                self.action_space,
                self.lr_schedule,
                **({} if takes_masks(self.policy_class) else {"use_sde": self.use_sde}),  # a maskable one has no gSDE
                **self.policy_kwargs,
            )
        self.policy = policy.to(self.device)  # type: ignore[assignment]  # policy_class is typed as any policy
        self.__dict__.pop("rollout_buffer", None)
        self._engine = None
        for mlp_policy in (MlpPolicy, SharedMlpPolicy):
            self._maybe_recommend_cpu(mlp_policy.__name__)

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self._scheduled_rate = self.learning_rate

    def _check_engine(self, replace: bool = False) -> None:
        """Raises if there is none. One from a file may be replaced: who trains on a GPU may watch on a CPU."""
        if not callable(self.loss):
            raise TypeError(f"loss must be a function of a minibatch's outputs, batch and config, not {self.loss!r}")
        try:
            self._choose_engine(self.engine)
        except ValueError as error:
            if not replace or self.engine == "auto":
                raise
            if self.precision == "tf32":  # which no CPU has
                self.precision = "fp32"
            self._choose_engine("auto")
            warnings.warn(f"the model was saved with another engine, and goes on with 'auto': {error}", stacklevel=3)
            self.engine = "auto"
        if self.precision == "bf16" and self.device.type == "cpu" and not has_bf16_instructions():
            warnings.warn(
                "precision='bf16' is slower than 'fp32' on this CPU, which has no bfloat16 instructions (AVX-512 BF16 or AMX)",
                stacklevel=3,
            )

    def _choose_engine(self, name: str) -> Choice:
        return choose_engine(name, self.policy, self.precision, self.loss, is_shared=self.group.size > 1)

    def _check_trainable(self) -> None:
        """What only training asks for: models may predict whose actions cannot be learned. The buffer follows ``n_steps``."""
        self._check_processes()
        check_trainable_actions(self.action_space)
        check_integer("n_steps", self.n_steps, 1)
        buffer = self.__dict__.get("rollout_buffer")
        if buffer is not None and buffer.buffer_size != self.n_steps:  # it has been changed since the last learn
            del self.__dict__["rollout_buffer"]

    @cached_property
    def rollout_buffer(self) -> RolloutBuffer:  # type: ignore[override]  # SB3 assigns it; here it waits for its first use
        """The rollout buffer, allocated when first asked for: a model that only predicts never has one."""
        buffer_class = self.rollout_buffer_class
        if buffer_class is None or is_replaceable(buffer_class):
            buffer_class = self._current_engine().buffer_class
        return buffer_class(
            self.n_steps,
            self.observation_space,
            self.action_space,
            device=self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
            **self.rollout_buffer_kwargs,
        )

    def _current_engine(self) -> Engine:
        """The engine for the policy as it is now: users may replace ``policy``, change it, or change ``engine``."""
        engine = self._engine
        if engine is None or not self._is_current(engine):
            if engine is not None:
                engine.release()
            choice = self._choose_engine(self.engine)
            engine = self._engine = choice.engine(self.policy, self.precision, self.loss)
            if self.verbose >= 1:
                print(f"Using the engine {choice}")
        return engine

    @contextmanager
    def _engine_released(self) -> Iterator[None]:
        """After the outermost, parameters lie where they lay before, for those who hold, share or save them one by one."""
        is_outermost, self._is_training = not self._is_training, True
        try:
            yield
        finally:
            self._is_training = not is_outermost
            if is_outermost and self._engine is not None:
                self._engine.release()

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies make an engine of their own."""
        state = {**self.__dict__, "_engine": None, "_is_training": False}
        state.pop("_sharing", None)
        return state

    def _is_current(self, engine: Engine) -> bool:
        same = engine.policy is self.policy and engine.loss == self.loss and self.engine in ("auto", engine.name)
        return same and engine.objection() is None

    # ------------------------------------------------------- rollout and update

    def learn(
        self: SelfScratchPPO,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str = "ScratchPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        use_masking: bool = True,
    ) -> SelfScratchPPO:
        """
        Train: collect a rollout, update the policy on it, log both, until ``total_timesteps`` steps are done.

        :param total_timesteps: environment steps, over all environments; the last rollout may overshoot it
        :param callback: one or several of SB3's callbacks, or a function of ``(locals, globals)``
        :param log_interval: iterations per logged row (the last one is always logged); ``None`` for no log
        :param tb_log_name: name of the run in TensorBoard
        :param reset_num_timesteps: whether steps count from 0; if not, ``total_timesteps`` come on top of those done
        :param progress_bar: show one (needs tqdm and rich)
        :param use_masking: whether a maskable policy gets the masks of its environments
        :return: the model
        :raises ValueError: if its environments give none; see :mod:`sb3_ppo_from_scratch.vec_env.masks`
        """
        check_number("total_timesteps", total_timesteps, 0.0, finite=False)
        if log_interval is not None:
            check_integer("log_interval", log_interval, 1)
        if float(total_timesteps).is_integer():
            total_timesteps = int(total_timesteps)
        check_flag("use_masking", use_masking)
        self.use_masking = bool(use_masking)
        self._resumed = None
        iteration = 0
        with self._watched():
            total_timesteps, callback = self._setup_learn(
                total_timesteps,
                callback,
                reset_num_timesteps,
                tb_log_name,
                progress_bar,
            )
            callback.on_training_start(locals(), globals())
            self._train_until(total_timesteps, callback, log_interval, iteration)
        return self

    def continue_learning(self: SelfScratchPPO, callback: MaybeCallback = None, progress_bar: bool = False) -> SelfScratchPPO:
        """
        Do what is left of the ``learn`` that a checkpoint was taken of, as if it had never ended; see :meth:`resume`.

        Schedules, ``log_interval`` and the end are those of that ``learn``. Its log goes on in the same files, unless
        ``set_logger`` has been called.

        :param callback: callbacks made as they were for ``learn``; each gets its state back
        :param progress_bar: show one (needs tqdm and rich)
        :return: the model
        :raises ValueError: if the model does not come from :meth:`resume`, or has gone on already
        """
        if self._resumed is None:
            raise ValueError("nothing to continue: this model is not fresh from ScratchPPO.resume(path, env)")
        resumed, self._resumed = self._resumed, None
        if not self._custom_logger:
            self._logger = resumed.make_logger()
        callback = self._init_callback(callback, progress_bar)
        total_timesteps, log_interval, tb_log_name = (
            resumed.learn[name] for name in ("total_timesteps", "log_interval", "tb_log_name")
        )
        n_envs = self.n_envs * self.group.size
        iteration = (self.num_timesteps - self._num_timesteps_at_start) // (self.n_steps * n_envs)
        with self._watched():
            callback.on_training_start(locals(), globals())
            with explained_failures():
                resumed.restore_run(self, callback)
                self._find_masks()
            if self.is_rank_zero:
                resumed.announce(self.num_timesteps)
            self._begin_together()
            self._train_until(total_timesteps, callback, log_interval, iteration, resumed.folder)
        return self

    def _train_until(
        self,
        total_timesteps: int,
        callback: BaseCallback,
        log_interval: int | None,
        iteration: int,
        resumed_from: Path | None = None,
    ) -> None:
        """The training loop. A boundary is where one pass ends and the next begins; checkpoints are taken there."""
        assert self.env is not None  # _setup_learn has reset it
        complete = logged = True
        self._begin_iterations()
        with self._engine_released(), guarded_training(self, callback, resumed_from) as checkpoints, explained_failures():
            while self.num_timesteps < total_timesteps:
                for checkpoint in checkpoints:
                    checkpoint.at_boundary()
                start = time.perf_counter()
                try:
                    complete = self.collect_rollouts(self.env, callback, self.rollout_buffer, n_rollout_steps=self.n_steps)
                except BaseException:
                    self._last_obs = None  # whatever state the environments are in, the next learn resets them
                    raise
                complete = self._all_complete(complete)
                if not complete:
                    break
                collected = time.perf_counter()
                iteration += 1
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                self.train()
                self.logger.record("time/rollout_seconds", collected - start)
                self.logger.record("time/update_seconds", time.perf_counter() - collected)
                logged = log_interval is None or iteration % log_interval == 0
                if log_interval is not None and logged:
                    self.dump_logs(iteration)
            if not logged:
                self.dump_logs(iteration)
            callback.on_training_end()
            for checkpoint in checkpoints:
                checkpoint.at_end(complete)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self.env is None:
            raise ValueError("env is not set: this model was loaded without one; call set_env(env) or load(path, env=env)")
        self._check_trainable()
        self._begin_together()
        before, check = self._last_obs, self._step_check(self.env)
        check.before_step()
        if self._masks_actions:
            leave_masks_raw(self.env)
        with explained_failures():
            prepared = super()._setup_learn(*args, **kwargs)
            if self._last_obs is not before:
                self._last_action_masks = None
            self._find_masks()
        if self._last_obs is not before:
            self._guard = self._last_memory = None
            try:
                check(self._last_obs, None, 0)
            except ValueError:
                self._last_obs = None
                raise
        return prepared

    @property
    def _masks_actions(self) -> bool:
        return self.use_masking and takes_masks(type(self.policy))

    def _find_masks(self) -> None:
        """Where the masks of this ``learn`` come from, if it has any."""
        assert self.env is not None  # its callers have looked
        self._mask_source = None
        if self._masks_actions:
            self._mask_source = find_masks(self.env, self.action_space, self._last_action_masks)
            if self.verbose >= 1:
                print(f"Actions are masked by {self._mask_source.name}")

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        callback = super()._init_callback(callback, progress_bar)
        for each in all_callbacks(callback):
            for env in vars(each).values():  # those to evaluate in, say
                if isinstance(env, VecEnv):
                    watch_workers(env)
            if isinstance(each, EvalCallback) and self._masks_actions and not hasattr(each, "use_masking"):  # contrib's has
                mask_evaluation(self, each)
        return callback

    def train(self) -> None:
        """Update the policy on the rollout in ``rollout_buffer``, and record what the update measured."""
        config = self._update_config()
        self.policy.set_training_mode(True)
        if self.learning_rate != self._scheduled_rate:  # assigned since the schedule was made of it
            check_scheduled("learning_rate", self.learning_rate, 0.0)
            self._setup_lr_schedule()
        resolve_schedule("learning_rate", self.lr_schedule, self._current_progress_remaining)
        self._update_learning_rate(self.policy.optimizer)
        with self._engine_released():  # where nobody but the caller trains
            engine, buffer = self._current_engine(), self.rollout_buffer
            is_alone = self.group.size == 1
            stats = engine.update(buffer, config) if is_alone else update_together(engine, buffer, config, self.group)
        self._n_updates += stats.epochs
        self._record(stats, config)

    def _update_config(self) -> UpdateConfig:
        progress = self._current_progress_remaining
        clip_range_vf = self.clip_range_vf
        return UpdateConfig(
            batch_size=self.batch_size,
            n_epochs=self.n_epochs,
            clip_range=resolve_schedule("clip_range", self.clip_range, progress),
            clip_range_vf=None if clip_range_vf is None else resolve_schedule("clip_range_vf", clip_range_vf, progress),
            normalize_advantage=self.normalize_advantage,
            ent_coef=resolve_schedule("ent_coef", self.ent_coef, progress, low=-math.inf),
            vf_coef=self.vf_coef,
            max_grad_norm=self.max_grad_norm,
            target_kl=self.target_kl,
            nan_policy=self.nan_policy,
        )

    def _record(self, stats: UpdateStats, config: UpdateConfig) -> None:
        self._report_skipped(stats)
        if stats.stopped_early and self.verbose >= 1:
            print(f"Update ended in epoch {stats.epochs} of {config.n_epochs}: KL above 1.5 * target_kl={self.target_kl}")
        for key in self._train_metrics:  # the last update's, kept readable by dump_logs
            self.logger.name_to_value.pop(key, None)
            self.logger.name_to_excluded.pop(key, None)
        metrics = self._metrics(stats, config)
        for key, value in metrics.items():
            self.logger.record(key, value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self._train_metrics = {**metrics, "train/n_updates": self._n_updates}

    def _metrics(self, stats: UpdateStats, config: UpdateConfig) -> dict[str, Any]:
        buffer = self.rollout_buffer
        metrics: dict[str, Any] = dict(stats.metrics())
        metrics["explained_variance"] = stats.explained_variance
        if stats.explained_variance is None:
            metrics["explained_variance"] = explained_variance(*_in_order(buffer, buffer.values, buffer.returns))
        if hasattr(self.policy, "log_std"):
            metrics["std"] = th.exp(self.policy.log_std).mean().item()
        metrics["clip_range"] = config.clip_range
        if config.clip_range_vf is not None:
            metrics["clip_range_vf"] = config.clip_range_vf
        if callable(self.ent_coef):
            metrics["ent_coef"] = config.ent_coef
        if self.nan_policy == "skip":
            metrics["skipped_minibatches"] = stats.skipped
        return {f"train/{key}": value for key, value in metrics.items()}

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Write the log. Afterwards ``logger.name_to_value`` still has the last update's metrics, as callbacks of SB3's PPO find
        them there in the next rollout (SB3 issue 784); whoever writes the log meanwhile leaves them out.

        :param iteration: number of rollouts so far
        """
        super().dump_logs(iteration)
        self.logger.name_to_value.update(self._train_metrics)
        self.logger.name_to_excluded.update(dict.fromkeys(self._train_metrics, _EVERY_FORMAT))

    def _report_skipped(self, stats: UpdateStats) -> None:
        if stats.skipped > 0 and not self._warned_of_skipped:
            self._warned_of_skipped = True
            warnings.warn(
                f"{stats.skipped} minibatches of this update were left out, since their loss or gradient was not finite "
                "(nan_policy='skip'); train/skipped_minibatches counts them, and this warning comes once",
                stacklevel=4,
            )

    # ------------------------------------------------------------------ acting

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        The policy's actions, and its memory after them.

        :param observation: ``[*obs_shape]``, or ``[n, *obs_shape]`` for n environments, or a dict of such
        :param state: of a recurrent policy, what the last call returned; ``None`` for a memory of nothing
        :param episode_start: ``[n]``, whether each observation is the first of an episode; ``None`` for no
        :param deterministic: whether to take the most probable actions instead of sampling
        :param action_masks: ``[n_choices]`` or ``[n, n_choices]``, which actions are allowed, for a maskable policy.
            If not given, those that a Dict observation has as ``"action_mask"``; without such, all are, with one warning.
        :return: ``[*action_shape]`` or ``[n, *action_shape]``; and the state, ``None`` for a policy without one
        :raises ValueError: if there are not as many states or starts as observations; for masks of another shape, ones that
            allow nothing, or with a policy that is not maskable
        """
        if is_recurrent(self.policy):
            check_remembered(self.policy, observation, state, episode_start)
        if not takes_masks(type(self.policy)):
            if action_masks is not None:
                raise ValueError(f"action_masks must be None for {self._policy_name}, which is no maskable policy")
            return super().predict(observation, state, episode_start, deterministic)
        if action_masks is None and self.use_masking:
            action_masks = self._masks_in(observation)
        if action_masks is not None:
            action_masks = masks_given(action_masks, observation, self.observation_space, self.action_space)
        policy: Any = self.policy
        return policy.predict(observation, state, episode_start, deterministic, action_masks=action_masks)

    def _masks_in(self, observation: Any) -> np.ndarray | None:
        if isinstance(observation, dict) and KEY in observation:
            return observation[KEY]
        if not self._warned_of_masks:
            self._warned_of_masks = True
            warnings.warn(
                "predict() was given no action_masks, and chooses among all actions: pass action_masks=..., or evaluate with "
                "sb3_ppo_from_scratch.evaluation.evaluate_policy, which asks the environments. This warning comes once",
                stacklevel=3,
            )
        return None

    # ------------------------------------------------------------------ saving

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Continue on another environment, of the same spaces and the same number of environments.

        :param env: a Gymnasium environment or a ``VecEnv``
        :param force_reset: whether to reset it before training goes on
        :raises ValueError: if its spaces or its number do not match the model's
        """
        with errors_for_assertions("env"):
            env = self._wrap_env(env, self.verbose)
            if env.num_envs != self.n_envs:  # SB3 asserts it
                raise ValueError(
                    f"env must have the number of environments that the model has ({env.num_envs} != {self.n_envs}); "
                    "load(path, env=env) takes another number"
                )
            super().set_env(env, force_reset=force_reset)
        self._guard = None

    @classmethod
    def load(
        cls: type[SelfScratchPPO],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> SelfScratchPPO:
        """
        A saved model, ours or SB3's. By default nothing that it holds is run (:mod:`sb3_ppo_from_scratch.safe_files.models`).

        :param path: the file, with or without ``.zip``, or an open binary file
        :param env: the environments to go on with; ``None`` for a model that only predicts
        :param device: see the constructor
        :param custom_objects: values by the name of the field that they replace; what they replace is not read
        :param print_system_info: whether to print on what machine the model was saved
        :param force_reset: whether to reset ``env`` before training goes on
        :param allow_pickle: for a file that you trust: unpickle it as SB3 does, your own classes and functions included
        :param kwargs: attributes to change
        :return: the model
        :raises UnsafeFileError: if the file holds more than built-in policies, spaces, schedules and plain data, or is made to
            harm its reader; the message says what to do if you trust it
        :raises ValueError: if the file is damaged, or its weights or ``env`` do not fit
        """
        check_flag("allow_pickle", allow_pickle)
        with errors_name_the_algorithm(path):
            if allow_pickle:
                custom_objects = moved_fields(path, custom_objects)
                model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
                model._check_engine(replace="engine" not in kwargs)
                return model
            file = safe_archive(path, custom_objects, cls)
            warn_of_defaults(file.fields)
            with errors_of_file(path, {**kwargs, **(custom_objects or {})}):
                model = super().load(file.archive, env, device, file.fields, print_system_info, force_reset, **kwargs)
                model._check_engine(replace="engine" not in kwargs)
                return finish_load(model, file, kwargs)

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Put weights and optimizer state in place, from a saved model or from what ``get_parameters`` returned.

        :param load_path_or_dict: a file, or state dicts by name
        :param exact_match: whether all of the model's state dicts, with all parameters, must be there
        :param device: where tensors of a file go
        :raises UnsafeFileError: see :meth:`load`; a file's weights are never unpickled
        :raises ValueError: if a tensor has not its parameter's shape; then none is changed
        """
        params: Any = load_path_or_dict
        if not isinstance(params, dict):
            params = load_from_zip_file(weights_archive(params), device=get_device(device), load_data=False)[1]
        check_weights(self.policy, params)
        super().set_parameters(params, exact_match, device)

    def _excluded_save_params(self) -> list[str]:
        ours = [
            "loss",
            "_engine",
            "_guard",
            "_is_training",
            "_mask_source",
            "_nan_understood",
            "_resumed",
            "_scheduled_rate",
            "_sharing",
            "_train_metrics",
            "_warned_of_masks",
            "_warned_of_skipped",
        ]
        return [*super()._excluded_save_params(), *ours]

    @classmethod
    def resume(
        cls: type[SelfScratchPPO],
        path: str | Path,
        env: GymEnv | str,
        device: th.device | str = "auto",
        allow_pickle: bool = False,
        custom_objects: dict[str, Any] | None = None,
        logs: str | Path | None = None,
    ) -> SelfScratchPPO:
        """
        The model of a checkpoint that a ``ResumableCheckpoint`` wrote, its environments and all random generators, where they
        were; :meth:`continue_learning` then goes on.

        :param path: a checkpoint, or a folder of them, of which the newest intact one is taken
        :param env: made as the run's was
        :param device: where to go on
        :param allow_pickle: whether the checkpoint may bring objects of any class, as environments with attributes of other
            classes than a fresh one's need. Such a file can run code: only for files that you trust.
        :param custom_objects: see :meth:`load`, for schedules that are functions of your own
        :param logs: a folder that the run's logs may lie in, as ``tensorboard_log``, besides the one that holds the folder of
            checkpoints: a file does not choose where we write
        :return: a model to call :meth:`continue_learning` on
        :raises FileNotFoundError: if there is no checkpoint
        :raises ValueError: if it is damaged or of an unknown format, or if ``env`` is of another make
        """
        if env is None:
            raise ValueError("env must be an environment made as the run's was, not None")
        state = load_run(path, cls)
        with errors_for_assertions("env"):
            env = cls._wrap_env(env)
        if env.num_envs != state["n_envs"]:
            raise ValueError(f"env must have {state['n_envs']} environments as the checkpoint's run had, not {env.num_envs}")
        saved = io.BytesIO(state["model"])
        model = cls.load(saved, env, device, custom_objects, force_reset=False, allow_pickle=allow_pickle)
        check_schedules_read(model)
        model.observation_space, model.action_space = env.observation_space, env.action_space  # whose generators go on
        model._resumed = Resumed(state, allow_pickle, None if logs is None else Path(logs))
        with explained_failures():
            model._resumed.restore_env(model)
        return model


def _in_order(buffer: RolloutBuffer, *arrays: np.ndarray) -> list[np.ndarray]:
    """
    A buffer's ``[n_steps, n_envs]`` arrays, flat and environment-major: sums depend on the order of their terms.

    Rows that are no transitions are left out.
    """
    valid = getattr(buffer, "valid", None)
    return [array.T.ravel() if valid is None else array.T[valid.T] for array in arrays]
