"""First in a process's import path: a run draws no curves.png, which takes half of a tiny run's time, and says so."""

raise ImportError("hidden by tests/unpictured")
