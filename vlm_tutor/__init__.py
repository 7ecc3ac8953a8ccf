"""Fine-tune vision language models to read documents as JSON, one notebook at a time

Modules:

- `vlm_tutor.assets.peers.donut`: The worker for Donut's own evaluator, as the package `donut-python` installs it."""

__version__ = "0.1.0"
