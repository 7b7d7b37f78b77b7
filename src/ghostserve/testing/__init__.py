"""Shipped test tools: a streaming client, a server under test, the oracle. Used by tests and cli only."""
