"""Parts of the class-incremental study (`experiments.bottleneck`): the stream, the heads that learn it, the encoder."""
