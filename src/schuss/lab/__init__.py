"""Comparing optimizers on a task: what the `schuss` command shows. Needs the `lab` extra."""
