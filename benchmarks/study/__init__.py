"""Does pretraining pay? `python -m benchmarks.study` pretrains, and probes on labels that pretraining never saw."""
