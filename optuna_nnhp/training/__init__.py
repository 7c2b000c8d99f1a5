"""The training loop of many networks at once; imports torch, never optuna."""
