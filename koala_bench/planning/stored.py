"""Number of tokens that a target reads to store its states, estimated from a part of the dialogues."""

from __future__ import annotations

from koala_bench.dialogues.conversations import encode_all, read_conversations
from koala_bench.dialogues.encoding import ChatTemplate
from koala_bench.engine.target import Target
from koala_bench.planning.requirements import missing_conversations
from koala_bench.presets import Preset
from koala_bench.training.experiment import longest_dialogue

_PART = 400  # dialogues that are encoded


def tokens_to_store(preset: Preset, target: Target, template: ChatTemplate) -> int | None:
    """Tokens of the training and the held-out dialogues, as they are cut; None where the data is not here.

    Of many dialogues an evenly spread sample is encoded, and its mean used for all.

    Raises:
        KoalaBenchError: the data is here and cannot be read.
    """
    if missing_conversations(preset.data.source, target.name) is not None:
        return None
    conversations = read_conversations(preset.data.source, template)
    dialogues = [*conversations.train[: preset.data.limit], *conversations.held_out[: preset.data.held_out]]
    if not dialogues:
        return None
    part = dialogues[:: -(-len(dialogues) // _PART)]
    longest = longest_dialogue(preset, target)
    tokens = sum(min(len(each.ids), longest) for each in encode_all(target, template, part))
    return round(tokens * len(dialogues) / len(part))
