"""Reinforcement learning of the policy and of the improver: rollouts, rewards, experience, curriculum, alarms."""
