"""The training loop for many networks at once; this package imports torch but not optuna."""
