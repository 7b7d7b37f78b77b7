"""What happened: kinds of events, their sentences, the log that keeps them. Knows no process and no shared memory."""
