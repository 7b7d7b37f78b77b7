"""Model files: read at disk speed, checked, and kept in host memory for everyone on the machine. Knows no vLLM."""
