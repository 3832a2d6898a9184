"""The one loop, the two engines, optimizers, checkpoints, actions and stopping."""
