"""koala-bench: a benchmark and reproducibility suite for speculative-decoding draft heads."""
