"""What engines for GPUs do on one: a bundle is made where there is none, and run where there is."""
