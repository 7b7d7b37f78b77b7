"""`ghostserve serve s3://...`: a model at a URL is fetched into the cache, and served from there."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ghostserve.cli.models_progress import Bar
from ghostserve.config import GhostConfig
from ghostserve.errors import UsageError
from ghostserve.weights.remote_names import is_url


def fetch_model(arguments: Namespace, config: GhostConfig) -> None:
    """Put the folder in the place of the URL; clients go on to name the model by its URL. Raises UsageError, WeightsError.

    Whoever asks for vLLM's own streamer, or for vLLM as it is, gets that.
    """
    url = str(arguments.model)
    if not is_url(url) or config.protection == "none" or str(arguments.load_format).startswith("runai"):
        return
    if arguments.revision is not None:
        raise UsageError(
            f"--revision {arguments.revision}: only models of the Hugging Face Hub have revisions, not {url}"
        )
    from ghostserve.weights.pull import resolve  # and what it needs, only where it is needed

    with Bar(url) as bar:
        root = Path(arguments.download_dir) if arguments.download_dir else None
        folder = str(resolve(url, root=root, progress=bar).path)
    arguments.model = folder
    if arguments.model_tag is not None:
        arguments.model_tag = folder
    if arguments.tokenizer == url:
        arguments.tokenizer = folder
    if not arguments.served_model_name:
        arguments.served_model_name = [url]
