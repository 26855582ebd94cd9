"""Predicts what a model takes on a target before anything is built: memory of each rank, time of a step."""
