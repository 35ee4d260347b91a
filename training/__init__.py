"""A run: processes, folder, logs, checkpoints, optimisers, and the plan that its knobs make."""
