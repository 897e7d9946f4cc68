"""One decode step of a layer's cache, as an op of the table: what all kernels together become where they are used."""
