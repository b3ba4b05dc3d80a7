"""Where training runs: the CPU platform and the FSDP engine."""
