"""
Policies with a memory: what an LSTM remembers of each environment, and the sequences that it learns from.

A recurrent minibatch is still B transitions. Only the network sees sequences; loss, statistics and optimizer know of none.
"""

from sb3_ppo_from_scratch.recurrent.memory import (
    LSTM_STATES,
    Memory,
    check_recurrent_arguments,
    check_remembered,
    is_recurrent,
    remembered,
)
from sb3_ppo_from_scratch.recurrent.sequences import EPISODE_STARTS, SEQUENCE_STARTS, Sequences, sequence_minibatches

__all__ = [
    "EPISODE_STARTS",
    "LSTM_STATES",
    "SEQUENCE_STARTS",
    "Memory",
    "Sequences",
    "check_recurrent_arguments",
    "check_remembered",
    "is_recurrent",
    "remembered",
    "sequence_minibatches",
]
