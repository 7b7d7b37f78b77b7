"""ghostserve: LLM serving that does not lose a request when a GPU, a process or a node dies."""

__version__ = "0.1.0"
