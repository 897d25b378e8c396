"""``python -m sb3_ppo_from_scratch.zoo SCRIPT ...``"""

from sb3_ppo_from_scratch.zoo import main

if __name__ == "__main__":
    main()
