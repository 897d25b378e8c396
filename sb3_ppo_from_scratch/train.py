"""``python -m sb3_ppo_from_scratch.train ...``: the zoo's ``python -m rl_zoo3.train``, with ``--algo scratch_ppo``."""

from __future__ import annotations

import sys

from sb3_ppo_from_scratch.zoo import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
