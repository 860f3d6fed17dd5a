"""Coverage-guided fuzzing of everything that reads what a peer sent; ``make fuzz``."""
