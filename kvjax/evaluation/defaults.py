"""What a comparison measures unless told otherwise. Imports nothing, so that a command line can show it at once."""

#: What every other method is compared with.
REFERENCE = "full"
#: Floors and ceilings: every table has them, and beating them is no finding.
BASELINES = (REFERENCE, "random", "streaming_llm")

METHODS = (*BASELINES, "h2o", "snapkv", "kivi-4", "kivi-2", "int8", "int4")
TASKS = ("needle", "kv", "multiquery", "perplexity-prefill")
#: Tokens of a row; a model with a shorter limit takes that.
CONTEXT = 1024
SEEDS = 3
EXAMPLES = 32
BATCH = 16
DTYPE = "bfloat16"
CHUNK = 256
