"""Fine-tune vision language models to read documents as JSON, one notebook at a time.

A module is a chapter of the course (`nbs/`), and holds a few verbs of the command `vlm`: `vlm train tiny` is
`from vlm_tutor.train import train; train("tiny")`. Begin reading at `vlm_tutor.cli` and follow one verb down.
"""

__version__ = "0.1.0"
