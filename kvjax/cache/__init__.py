"""The cache: segments of slots, the flow of tokens between them, and the methods that steer it."""
