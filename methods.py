"""The methods that can be trained, one row each.

A new method is a new row here and its YAML files in args/, and a key in config.py where no key selects it yet.

A row answers three questions. Are there special tokens around the latents? What fills a latent place? How does the
written chain of thought go away? Everything else (batches, training, evaluation) is the same for all methods: Coconut
with zero latents is chain of thought.
"""

from typing import Literal, NamedTuple


class Method(NamedTuple):
    """One row of the paper's Table 1 (arXiv 2412.06769, section 4.3).

    The boolean key `key` and the keys `thought` and `curriculum` of the YAML file select the row.
    """

    name: str
    title: str  # in tables and pictures
    key: str
    drops_steps: Literal["by stage", "by token", "at once", "never"]  # never, unless uniform_prob draws a later stage
    thought: str = "hidden"
    curriculum: str = "steps"
    special_tokens: bool = False  # start and end token between question and steps, also around zero latents (official)
    thinks: bool = False  # whether dropped steps are replaced by c_thought latents each

    @property
    def latents(self) -> str:
        """What the latent places of a sequence are called."""
        return "pauses" if self.thought == "pause" else "latents"


_ROWS = (
    # name, title, key, drops_steps, thought, curriculum, special_tokens, thinks
    Method("coconut", "Coconut", "coconut", "by stage", "hidden", "steps", True, True),
    Method("no_curriculum", "Coconut without curriculum", "coconut", "at once", "hidden", "none", True, True),
    Method("pause_as_thought", "Pause as thought", "coconut", "by stage", "pause", "steps", True, True),
    Method("pause_token", "Pause token", "coconut", "at once", "pause", "none", True, True),
    Method("cot", "CoT", "cot", "never"),
    Method("no_cot", "No-CoT", "no_cot", "at once"),
    Method("no_thoughts", "Coconut without thoughts", "no_thoughts", "by stage"),
    Method("icot", "iCoT", "no_thoughts", "by token", curriculum="tokens"),
    Method("no_thoughts_no_curriculum", "No-CoT (no_thoughts)", "no_thoughts", "at once", curriculum="none"),
)
METHODS = {method.name: method for method in _ROWS}
METHOD_KEYS = tuple(dict.fromkeys(method.key for method in _ROWS))


def find_method(key: str, thought: str, curriculum: str) -> Method | None:
    """The row that the three keys select; None where no method combines them."""
    selected = (key, thought, curriculum)
    return next((row for row in _ROWS if (row.key, row.thought, row.curriculum) == selected), None)
