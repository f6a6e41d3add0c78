"""Alignment, measured; each part is one file beside this one, whose docstring says how.

python bench/align.py --learn [--seeds 0,1,2] [--kinds grpo,ppo,...] [--steps 80] [--picture FILE]
python bench/align.py --dpo [--rounds 3] [--steps 30]        beside TRL: equal losses, processor time, memory
python bench/align.py --grpo [--rounds 3] [--steps 6]        beside TRL: a step with its rollout
python bench/align.py --preferences DIR [--real MODEL] [--steps N]
"""

import argparse
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--dpo", action="store_true")
    parser.add_argument("--grpo", action="store_true")
    parser.add_argument("--preferences", type=Path)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/align"))
    parser.add_argument("--kinds", default="grpo,dr_grpo,dapo,gspo,cispo,ppo")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sft-steps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if options.learn:
        from align_learn import learn_all

        steps, kinds = options.steps or 80, options.kinds.split(",")
        learn_all(
            options.out, kinds=kinds, seeds=seeds, steps=steps, sft_steps=options.sft_steps, picture=options.picture
        )
    if options.dpo:
        from align_peers import compare_dpo, compare_memory

        compare_dpo(options.out, steps=options.steps or 30, rounds=options.rounds, seed=seeds[0])
        compare_memory(options.out)
    if options.grpo:
        from align_peers import compare_grpo

        compare_grpo(options.out, steps=options.steps or 6, rounds=options.rounds, seed=seeds[0])
    if options.preferences:
        from align_preferences import preferences

        preferences(
            options.preferences, options.out / "preferences", real=options.real, steps=options.steps, seed=seeds[0]
        )


if __name__ == "__main__":
    main()
