"""Speed and accuracy, measured; results are committed under results/."""
