"""Real training runs, healthy and ill, on which the guard is measured; see README.md."""
