"""What methods must know of a model beforehand: statistics of sample texts, and what is fitted to them."""
