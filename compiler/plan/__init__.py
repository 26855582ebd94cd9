"""Predictions of a model's memory on each rank and of the time of a step on a target, before anything is built."""
