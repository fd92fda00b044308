"""Table of the models of several channels: each requested name has the row of the channel that is preferred for it."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from imagegen.channels_file import MAX_CACHED_MODELS, Channels
from imagegen.providers.model_rules import ModelRow, ModelTable


class ChannelModelTable(ModelTable):
    """Rows by the names that clients use. tables: by provider."""

    def __init__(self, channels: Channels, tables: Mapping[str, ModelTable], provider: str) -> None:
        first = tables[provider]
        super().__init__(first.all_rows, provider, first.checked)
        self._channels = channels
        self._tables = tables
        self._found: dict[str, ModelRow | None] = {}
        listed = [row.id for table in tables.values() for row in table.listed]
        names = dict.fromkeys((*channels.named_models, *listed))
        rows = (self.describe(name) for name in names if channels.serving(name))
        self.listed = tuple(row for row in rows if row is not None)

    def find(self, model: str) -> ModelRow | None:
        """Return the row that limits a model, under its requested name."""
        if model not in self._found:
            if len(self._found) >= MAX_CACHED_MODELS:
                self._found.clear()
            self._found[model] = self._find(model)
        return self._found[model]

    def describe(self, model: str) -> ModelRow | None:
        """Return the row that describes a model; the sandbox draws the models of every provider."""
        if (row := self.find(model)) is not None:
            return row
        preferred = self._channels.preferred(model)
        if preferred is None or not self._channels.is_sandbox(model):
            return None
        row = self._tables[preferred.provider].describe(preferred.sent_name(model) or model)
        return None if row is None else replace(row, id=model)

    def _find(self, model: str) -> ModelRow | None:
        preferred = self._channels.preferred(model)
        if preferred is None:
            return None
        sent = preferred.sent_name(model) or model
        row = self._tables[preferred.provider].find(sent)
        return row if row is None or sent == model else replace(row, id=model)
