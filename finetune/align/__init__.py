"""Alignment: preference losses, verifiable rewards and policy gradients, each one small file that can be checked by hand.

logprobs.py      log p(response token | what stands before it), without the (tokens x vocabulary) logits
dpo.py kto.py orpo.py simpo.py    losses on preferences, from log-probabilities
grpo.py ppo.py   losses on rewards: group-relative, and with a value head
reward_model.py  scalar heads on hidden states, and their losses
rewards.py       rewards that are functions of the text
arena.py         battles -> ratings, pass@k, majority vote; compare.py has adapters battle

run.py           the run that all methods share; a method is a Stage in its run_*.py, on rows (preference_task.py) or rollouts
                 (rollout_task.py); setup.py: settings, policy and reference; step_memory.py: its memory, predicted
"""
