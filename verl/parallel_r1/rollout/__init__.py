"""Rollouts that fork at ``<Parallel>`` and join: the state machine, verl's agent loop, vLLM plug-ins."""
