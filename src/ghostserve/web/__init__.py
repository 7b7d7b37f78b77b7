"""Our HTTP routes and the live page. Reads the control page only; never waits for the engine."""
