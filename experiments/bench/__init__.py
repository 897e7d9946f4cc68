"""What `experiments.bench_kernels` is made of: contests, who takes part, how they are timed and shown."""
