"""The methods that can be trained, one row each. A new method is a new row here and its YAML files in args/.

A row answers three questions. Are there special tokens around the thoughts? Does the method think in latents? How does
the written chain of thought go away? Everything else (curriculum, batches, training, evaluation) is the same for all
methods: Coconut with zero latents is chain of thought.
"""

from typing import Literal, NamedTuple


class Method(NamedTuple):
    """One row of the paper's Table 1 (arXiv 2412.06769, section 4.3); `name` is its key in the YAML file."""

    name: str
    title: str  # in tables and pictures
    special_tokens: bool  # start and end token between question and steps, also around zero latents (official)
    thinks: bool  # whether dropped steps are replaced by c_thought latents each
    drops_steps: Literal["by stage", "never", "always"]


_ROWS = (
    Method("coconut", "Coconut", special_tokens=True, thinks=True, drops_steps="by stage"),
    Method("cot", "CoT", special_tokens=False, thinks=False, drops_steps="never"),
    Method("no_cot", "No-CoT", special_tokens=False, thinks=False, drops_steps="always"),
    Method("no_thoughts", "Coconut without thoughts", special_tokens=False, thinks=False, drops_steps="by stage"),
)
METHODS = {method.name: method for method in _ROWS}
