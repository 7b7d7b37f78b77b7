"""A simulated cluster around the product's own shadow and recovery; see docs/simulation.md."""
