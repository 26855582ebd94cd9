"""What a model takes on a target before anything is built: memory of each rank and time of a step, from shapes and rates."""
