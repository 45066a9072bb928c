"""The benchmarks, one file each; `registry.tasks` imports them all."""
