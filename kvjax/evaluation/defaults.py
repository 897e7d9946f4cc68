"""What a comparison measures unless told otherwise. Imports nothing, so that a command line can show it at once."""

METHODS = ("full", "random", "streaming_llm", "h2o", "snapkv", "kivi-4", "kivi-2", "int8", "int4")
TASKS = ("needle", "kv", "multiquery", "perplexity-prefill")
CONTEXT = 1024
SEEDS = 3
EXAMPLES = 32
BATCH = 16
