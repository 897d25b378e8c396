"""
Several processes train one agent: ``torchrun --nproc_per_node 2 train.py`` with ``ScratchPPO(..., data_parallel=True)``.

Every process (a *rank*) steps environments of its own, and holds the same policy. What they tell each other, by
``torch.distributed``: in an update the gradient of each minibatch (:mod:`.learning`); between two iterations what training
has learned besides (:mod:`.sharing`); and all the time that they are alive (:mod:`.health`). :mod:`.group` carries it.
"""

from sb3_ppo_from_scratch.distributed.algorithm import DataParallelAlgorithm
from sb3_ppo_from_scratch.distributed.group import ALONE, Group, group_of, n_processes, rank, rank_folder
from sb3_ppo_from_scratch.distributed.learning import ReducedLearner, update_together

__all__ = [
    "ALONE",
    "DataParallelAlgorithm",
    "Group",
    "ReducedLearner",
    "group_of",
    "n_processes",
    "rank",
    "rank_folder",
    "update_together",
]
